"""Scans to a training set: one array of slices and a manifest that says where each came from."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.images import save_grid, to_uint8

from .covariates import MEASURED, Covariates, Value, describe
from .frame import FRAME, Frame
from .readers import LABELS, ReadOptions, Scan, Skipped, read_all
from .sources import PREPARED, Job, Subjects, expand, subject_of
from .synthetic import DEFINITIONS

FORMAT = 2
CONVENTION = (
    "row 0 anterior, column 0 patient's left, square pixels, intensity -1 to 1 per volume; pictures as they are"
)
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
SEEDS = 2**32 - 1  # the largest
SHEET_EVERY = 10  # slices to a tile of the contact sheet
SHEET_TILES = 400  # at most
SHEET_NOTICE = "not for diagnosis; L: the patient's left (pictures without L as they are)"


@dataclass(frozen=True)
class Stored:
    """A scan whose slices are in the array, their checksums, and what `Subjects` knows it by."""

    scan: Scan  # without its slices
    checksums: list[str]
    node: tuple[str, ...]


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    split: str = "subject",
    seed: int = 42,
    volume: int | None = None,
    every: int = 1,
    frame: Frame = FRAME,
    volumes: bool = False,
    subject: str | None = None,
    covariates: str | Path | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Write `slices.npy` (`[N, H, W]` float16 in [-1, 1]), `manifest.json` and `contact_sheet.png` to the folder `out`.

    A folder that `prepare` wrote is replaced; one that holds anything else is refused.

    Args:
        sources: NIfTI files, folders of NIfTI, DICOM or PNG/JPG files, `mni152`, `synthetic` or `synthetic:COUNT`.
        split: `"subject"` keeps all slices of a subject in one of train/val/test (70/15/15); `"slice"` is the leaking
            split of paper 001.
        seed: of the split and of the synthetic population.
        volume: which volume of 4-D files.
        every: keep every n-th slice.
        frame: the pixels of a slice and their mm.
        volumes: keep each scan as a volume: all slices from the lowest to the highest with enough head, from the bottom
            up; rows say of which `volume` they are, and the `distance_mm` of its slices.
        subject: a regular expression whose first group is the subject in a file's name, where `subject_of` reads it
            wrongly.
        covariates: a CSV file, see `Covariates`.
        strict: raise at the first unusable file, or subject without covariates, instead of naming and skipping it.
        workers: processes that read at a time; more than one needs a `__main__` that can be imported.

    Returns:
        The manifest. `skipped` names what is not in the array, and why; `without_covariates` the subjects that a table
        has no row for.

    Raises:
        UserError: a source that does not exist, has nothing to read or lies in the folder to be replaced, a folder
            with other files, an ambiguous table, an argument out of its bounds, `volumes` and a split by slice, or
            (`strict`) a broken file.
    """
    if split not in ("subject", "slice"):
        raise UserError(f"split: got {split!r}, allowed are subject, slice")
    if volumes and split == "slice":
        raise UserError("split: got slice, allowed with volumes is subject: slices of a volume stay together")
    for name, value, least in (("every", every, 1), ("workers", workers, 1), ("volume", volume or 0, 0)):
        if value < least:
            raise UserError(f"{name}: got {value}, allowed is {least} or more")
    if not 0 <= seed <= SEEDS:
        raise UserError(f"seed: got {seed}, allowed is 0 to {SEEDS}")
    # all that can be refused is refused before hours of reading
    pattern = None if subject is None else _pattern(subject)
    table = None if covariates is None else Covariates(covariates)
    was_prepared(out)
    jobs = _find_jobs(sources, out)
    people = [subject_of(job, pattern) if job.files else job.name for job in jobs]
    with whole_folder(out) as folder:
        found = tqdm(
            read_all(jobs, ReadOptions(seed, volume, every, frame, volumes), workers),
            "prepare",
            len(jobs),
            unit="file",
            disable=not progress,
        )
        stored, names, skipped = _write_slices(folder / "slices.npy", frame, people, found, strict)
        if not stored:
            reasons = "; ".join(f"{s['source']}: {s['reason']}" for s in skipped[:3])
            raise UserError(f"no usable slice in {', '.join(sources)}" + (f" ({reasons})" if reasons else ""))
        joined, missing = _join(table, stored, names)
        if missing and strict:
            raise UserError(f"{covariates} has no row for {missing[0]}")
        rows = _manifest_rows(stored, names, joined, split, seed)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "convention": CONVENTION,
            "size": list(frame.size),
            # of pictures alone it is not known
            "spacing": frame.spacing if any(row["position_mm"] is not None for row in rows) else 0.0,
            "split": {"by": split, "seed": seed, "slices": dict(Counter(row["split"] for row in rows))},
            "subjects": len({row["subject"] for row in rows}),
            "skipped": skipped,
            "without_covariates": missing,
            "covariates": _describe(rows, table),
            "slices": rows,
        }
        write_json(folder / "manifest.json", manifest)
        _draw_contact_sheet(folder, rows)
    return manifest


def _find_jobs(sources: Sequence[str], out: str | Path) -> list[Job]:
    """The jobs of all sources, a file that two of them hold once; none may lie in the folder to be replaced."""
    found: dict[object, Job] = {}
    for job in (job for source in sources for job in expand(source)):
        found.setdefault(tuple(map(os.path.realpath, job.files)) or job.name, job)
    real = Path(os.path.realpath(out))
    for job in found.values():
        if any(real in Path(os.path.realpath(file)).parents for file in job.files):
            raise UserError(f"{out} holds the source {job.name}, which would be lost; allowed is another folder")
    return list(found.values())


def _pattern(subject: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(subject)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"subject: got {subject!r}, which is no regular expression ({error})") from None
    if not pattern.groups:
        raise UserError(f"subject: got {subject!r}, allowed is a regular expression with a group")
    return pattern


def was_prepared(out: str | Path) -> bool:
    """Whether `out` is a folder that `prepare` wrote, or else one that it may write.

    Raises:
        UserError: a folder that holds anything else, or a place that cannot be replaced.
    """
    if not str(out):
        raise UserError("out: got '', allowed is a folder")
    folder = Path(out)
    if os.path.ismount(folder):  # of a link, too, which Path.is_mount is not
        raise UserError(f"{out} is where a disk is mounted, which cannot be replaced; allowed is a folder in it")
    if not folder.is_dir() or not (there := sorted(folder.iterdir())):
        return False
    lost = next((p.name for p in there if p.name not in PREPARED or not p.is_file()), None)
    with suppress(ValueError):
        if lost is None and {"format", "slices"} <= read_json(folder / "manifest.json").keys():
            return True
    raise UserError(
        f"{out} holds {lost or there[0].name}, which would be lost; allowed is a new folder or one that prepare wrote"
    )


def _write_slices(
    path: Path, frame: Frame, people: list[str], found: Iterable[tuple[list[Scan], Skipped]], strict: bool
) -> tuple[list[Stored], dict[tuple[str, ...], str], Skipped]:
    """Write the array, scan by scan; return the scans, the subject of each node, and what was left out."""
    stored: list[Stored] = []
    skipped: Skipped = []
    subjects = Subjects()
    count = 0
    with path.open("wb") as f:
        _write_header(f, 0, frame)
        for person, (scans, left_out) in zip(people, found, strict=True):
            broken = [s for s in left_out if s["reason"] != LABELS]
            if broken and strict:
                raise UserError(f"{broken[0]['source']}: {broken[0]['reason']}")
            skipped += left_out
            for scan in scans:
                f.write(scan.slices.tobytes())
                count += len(scan.slices)
                checksums = [hashlib.sha256(image.tobytes()).hexdigest() for image in scan.slices]
                node = subjects.add(person, scan.patient, checksums)
                stored.append(Stored(replace(scan, slices=scan.slices[:0].copy()), checksums, node))
        f.seek(0)
        _write_header(f, count, frame)
    return stored, subjects.names(), skipped


def _write_header(file: Any, count: int, frame: Frame) -> None:
    # numpy leaves room for the first axis to grow in place
    npy.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (count, *frame.size)})


def _join(
    table: Covariates | None, stored: list[Stored], names: dict[tuple[str, ...], str]
) -> tuple[dict[str, dict[str, float | str]], list[str]]:
    """The table's covariates of each subject, and the subjects that it has no row for; synthetic brains have their
    own."""
    if table is None:
        return {}, []
    without = sorted({names[one.node] for one in stored if not one.scan.covariates})
    joined = table.of(without)
    return joined, [subject for subject in without if subject not in joined]


def _manifest_rows(
    stored: list[Stored],
    names: dict[tuple[str, ...], str],
    joined: dict[str, dict[str, float | str]],
    split: str,
    seed: int,
) -> list[dict[str, Any]]:
    """What the manifest says of each slice."""
    subjects = [names[one.node] for one in stored for _ in one.checksums]
    units = subjects if split == "subject" else [str(i) for i in range(len(subjects))]
    splits = assign_splits(units, seed)
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(stored):
        subject, scan = names[one.node], one.scan
        whole = {} if scan.distance is None else {"volume": number, "distance_mm": round(float(scan.distance), 3)}
        for position, level, checksum in zip(scan.positions, scan.levels, one.checksums, strict=True):
            measured: dict[str, Value] = {} if level is None else {"position": round(float(level), 3)}
            row = {
                "source": scan.source,
                "subject": subject,
                "modality": scan.modality,
                "position_mm": None if position is None else round(float(position), 3),
                "tilt_deg": round(scan.tilt, 1),
                **whole,
                "covariates": joined.get(subject, scan.covariates) | measured,
                "sha256": checksum,
                "split": splits[units[len(rows)]],
            }
            rows.append(row)
    return rows


def _describe(rows: list[dict[str, Any]], table: Covariates | None) -> dict[str, dict[str, Any]]:
    """Each covariate with its unit, definition and range; made brains and a table may both have one of a name."""
    definitions = dict(MEASURED)
    if any(row["source"] == "synthetic" for row in rows):
        definitions |= DEFINITIONS
    for column in () if table is None else table.columns:
        made = definitions.get(column)
        of_scans = table.definitions.get(column, {}) if table else {}
        both = "; ".join(d["definition"] for d in (made, of_scans) if d and "definition" in d)
        definitions[column] = {**(made or {}), **of_scans} | ({"definition": both} if both else {})
    named = ({} if row["modality"] == "unknown" else {"modality": row["modality"]} for row in rows)
    return describe((row["covariates"] | more for row, more in zip(rows, named, strict=True)), definitions)


def _draw_contact_sheet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Every tenth slice, or of very many evenly spread ones, as one picture that says whose they are."""
    array = np.load(folder / "slices.npy", mmap_mode="r", allow_pickle=False)
    step = max(SHEET_EVERY, -(-len(array) // SHEET_TILES))
    tiles = to_uint8(torch.from_numpy(array[::step].astype(np.float32))[:, None])
    labels = [f"{row['modality']} {row['split']}\n{row['subject'][-20:]}" for row in rows[::step]]
    marks = ["" if row["position_mm"] is None else "L" for row in rows[::step]]
    save_grid(tiles, folder / "contact_sheet.png", SHEET_NOTICE, labels=labels, marks=marks)


def assign_splits(units: Sequence[str], seed: int) -> dict[str, str]:
    """Train, val or test for each distinct unit: 70/15/15, and at least one each where there are three units."""
    distinct = sorted(set(units))
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    held_out = max(1, round(SPLITS["val"] * len(order))) if len(order) >= 3 else 0
    names = ["val"] * held_out + ["test"] * held_out
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))
