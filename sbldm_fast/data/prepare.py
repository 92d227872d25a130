"""Scans to a training set: one array of slices and a manifest that says where each came from."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageOps
from tqdm import tqdm

from sbldm_fast.files import printable, read_json, whole_folder, write_json
from sbldm_fast.images import save_grid, to_uint8

from ..errors import MissingExtra, UserError
from .covariates import Covariates
from .dicom import load_dicom
from .sources import PREPARED, Job, Subjects, expand, modality_of, subject_of
from .synthetic import mni152, synthetic_brain
from .volumes import SIZE, Unusable, Volume, axial_slices, load_nifti, silent

FORMAT = 2
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
LABELS = "a label map, by its name"
SEEDS = 2**32 - 1  # the largest
MAX_SIDE = 8192  # pixels of a picture
SHEET_EVERY = 10  # slices to a tile of the contact sheet
SHEET_TILES = 400  # at most


@dataclass
class Scan:
    """The slices of one volume or picture, float16 `[N, 128, 128]`, and what the manifest says of them."""

    source: str
    modality: str
    slices: np.ndarray
    positions: Sequence[float | None] = (None,)
    tilt: float = 0.0
    covariates: dict[str, float | str] = field(default_factory=dict)
    patient: str = ""  # DICOM's PatientID, to tell people apart; in memory only


Skipped = list[dict[str, str]]


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    split: str = "subject",
    seed: int = 42,
    volume: int | None = None,
    every: int = 1,
    subject: str | None = None,
    covariates: str | Path | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Write `slices.npy` (`[N, 128, 128]` float16 in [-1, 1]), `manifest.json` and `contact_sheet.png` to the folder
    `out`.

    A folder that `prepare` wrote is replaced; one that holds anything else is refused.

    Args:
        sources: NIfTI files, folders of NIfTI, DICOM or PNG/JPG files, `mni152`, `synthetic` or `synthetic:COUNT`.
        split: `"subject"` keeps all slices of a subject in one of train/val/test (70/15/15); `"slice"` is the leaking
            split of paper 001.
        seed: of the split and of the synthetic population.
        volume: which volume of 4-D files.
        every: keep every n-th slice.
        subject: a regular expression whose first group is the subject in a file's name, where `subject_of` reads it
            wrongly.
        covariates: a CSV file, see `Covariates`.
        strict: raise at the first unusable file, or subject without covariates, instead of naming and skipping it.
        workers: processes that read at a time; more than one needs a `__main__` that can be imported.

    Returns:
        The manifest. `skipped` names what is not in the array, and why; `without_covariates` the subjects that a table
        has no row for.

    Raises:
        ValueError: a source that does not exist, has nothing to read or lies in the folder to be replaced, a folder
            with other files, an ambiguous table, an argument out of its bounds, or (`strict`) a broken file.
    """
    if split not in ("subject", "slice"):
        raise UserError(f"split: got {split!r}, allowed are subject, slice")
    for name, value, least in (("every", every, 1), ("workers", workers, 1), ("volume", volume or 0, 0)):
        if value < least:
            raise UserError(f"{name}: got {value}, allowed is {least} or more")
    if not 0 <= seed <= SEEDS:
        raise UserError(f"seed: got {seed}, allowed is 0 to {SEEDS}")
    # all that can be refused is refused before hours of reading
    pattern = None if subject is None else _pattern(subject)
    table = None if covariates is None else Covariates(covariates)
    was_prepared(out)
    found: dict[object, Job] = {}
    for job in (job for source in sources for job in expand(source)):
        # a file that two sources hold is read once
        found.setdefault(tuple(map(os.path.realpath, job.files)) or job.name, job)
    jobs = list(found.values())
    real = Path(os.path.realpath(out))
    if inside := next(
        (job.name for job in jobs for file in job.files if real in Path(os.path.realpath(file)).parents), None
    ):
        raise UserError(f"{out} holds the source {inside}, which would be lost; allowed is another folder")
    people = [subject_of(job, pattern) if job.files else job.name for job in jobs]
    with whole_folder(out) as folder:
        rows, skipped = _write_slices(
            folder / "slices.npy", jobs, people, seed, volume, every, strict, workers, progress
        )
        if not rows:
            reasons = "; ".join(f"{s['source']}: {s['reason']}" for s in skipped[:3])
            raise UserError(f"no usable slice in {', '.join(sources)}" + (f" ({reasons})" if reasons else ""))
        subjects = sorted({row["subject"] for row in rows})
        missing: list[str] = []
        if table is not None:
            # synthetic brains have their own
            without = sorted({row["subject"] for row in rows if not row["covariates"]})
            joined = table.of(without)
            missing = [s for s in without if s not in joined]
            if missing and strict:
                raise UserError(f"{covariates} has no row for {missing[0]}")
            for row in rows:
                row["covariates"] = joined.get(row["subject"], row["covariates"])
        units = [row["subject"] for row in rows] if split == "subject" else [str(i) for i in range(len(rows))]
        where = assign_splits(units, seed)
        for row, unit in zip(rows, units, strict=True):
            row["split"] = where[unit]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "convention": (
                "row 0 anterior, column 0 patient's left, square pixels, intensity -1 to 1 per volume; pictures as"
                " they are"
            ),
            "split": {"by": split, "seed": seed, "slices": dict(Counter(row["split"] for row in rows))},
            "subjects": len(subjects),
            "skipped": skipped,
            "without_covariates": missing,
            "slices": rows,
        }
        write_json(folder / "manifest.json", manifest)
        _contact_sheet(folder)
    return manifest


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
    path: Path,
    jobs: list[Job],
    people: list[str],
    seed: int,
    volume: int | None,
    every: int,
    strict: bool,
    workers: int,
    progress: bool,
) -> tuple[list[dict[str, Any]], Skipped]:
    """The array, scan by scan; its rows for the manifest, and what was left out."""
    rows: list[dict[str, Any]] = []
    skipped: Skipped = []
    subjects = Subjects()
    scans_of: list[tuple[tuple[str, ...], list[dict[str, Any]]]] = []
    with path.open("wb") as f:
        _header(f, 0)
        results = _results(jobs, seed, volume, every, workers)
        for person, (scans, left_out) in zip(
            people, tqdm(results, "prepare", len(jobs), unit="file", disable=not progress), strict=True
        ):
            broken = [s for s in left_out if s["reason"] != LABELS]
            if broken and strict:
                raise UserError(f"{broken[0]['source']}: {broken[0]['reason']}")
            skipped += left_out
            for scan in scans:
                f.write(scan.slices.tobytes())
                made = list(_rows(scan))
                rows += made
                scans_of.append((subjects.add(person, scan.patient, [row["sha256"] for row in made]), made))
        f.seek(0)
        _header(f, len(rows))
    names = subjects.names()
    for node, made in scans_of:
        for row in made:
            row["subject"] = names[node]
    return rows, skipped


def _header(file: Any, count: int) -> None:
    # numpy leaves room for the first axis to grow in place
    npy.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (count, SIZE, SIZE)})


def _rows(scan: Scan) -> Iterator[dict[str, Any]]:
    for image, position in zip(scan.slices, scan.positions, strict=True):
        yield {
            "source": scan.source,
            "subject": "",
            "modality": scan.modality,
            "position_mm": None if position is None else round(float(position), 3),
            "tilt_deg": round(scan.tilt, 1),
            "covariates": scan.covariates,
            "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        }


def _contact_sheet(folder: Path) -> None:
    """Every tenth slice, or of very many evenly spread ones, as one picture."""
    array = np.load(folder / "slices.npy", mmap_mode="r", allow_pickle=False)
    tiles = array[:: max(SHEET_EVERY, -(-len(array) // SHEET_TILES))]
    save_grid(
        to_uint8(torch.from_numpy(tiles.astype(np.float32))[:, None]), folder / "contact_sheet.png", "not for diagnosis"
    )


def assign_splits(units: Sequence[str], seed: int) -> dict[str, str]:
    """Train, val or test for each distinct unit: 70/15/15, and at least one each where there are three units."""
    distinct = sorted(set(units))
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    held_out = max(1, round(SPLITS["val"] * len(order))) if len(order) >= 3 else 0
    names = ["val"] * held_out + ["test"] * held_out
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))


def _results(
    jobs: list[Job], seed: int, volume: int | None, every: int, workers: int
) -> Iterable[tuple[list[Scan], Skipped]]:
    """What each job gives, in the order of the jobs."""
    read = partial(_read, seed=seed, volume=volume, every=every)
    if workers == 1 or len(jobs) == 1:
        yield from map(read, jobs)
        return
    # a fork would share torch's threads
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _begin)
    try:
        for job, future in [(job, pool.submit(read, job)) for job in jobs]:
            try:
                yield future.result()
            except BrokenProcessPool:
                raise UserError(
                    f"{job.name}: the process that read it, or one beside it, was killed; for memory? --workers 1"
                ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # who stops at one file waits for no other


def _begin() -> None:
    """A process that reads has one thread, as the processes are what runs at a time, and ends with the one that started
    it."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody waits for what it reads; without this it would wait for the next job for ever


def _read(job: Job, seed: int, volume: int | None, every: int) -> tuple[list[Scan], Skipped]:
    """The scans in a job's files, and what was left out with its reason: a bad file is never the end of the others."""
    scans: list[Scan] = []
    skipped: Skipped = []
    try:
        if job.kind == "archive":
            raise Unusable("an archive; unpack it first")
        if job.kind == "labels":
            raise Unusable(LABELS)
        if job.kind == "synthetic":
            brain, modality, covariates = synthetic_brain(job.index, seed)
            scans.append(_scan("synthetic", modality, brain, every))
            scans[0].covariates = covariates
        elif job.kind == "mni152":
            scans.append(_scan("mni152", "T1", mni152(), every))
        elif job.kind == "nifti":
            scans.append(_scan(job.name, _modality(job), load_nifti(job.files[0], volume), every))
        elif job.kind == "picture":
            scans.append(Scan(job.name, _modality(job) or "unknown", _picture(job.files[0])[None].astype(np.float16)))
        else:
            series, left_out = load_dicom(job.files)
            parent = job.name.rpartition("/")[0]
            for name, reason in left_out:
                skipped.append(
                    {"source": printable(f"{parent}/{name}" if parent else name), "reason": printable(reason)}
                )
            for number, one in enumerate(series):
                name = f"{parent or job.name}#{number}" if len(series) > 1 else parent or job.name
                try:
                    scans.append(_scan(name, modality_of(one.description) or _modality(job), one.volume, every))
                except Unusable as reason:
                    skipped.append({"source": name, "reason": str(reason)})
                    continue
                scans[-1].patient = one.patient
    except Unusable as reason:
        skipped.append({"source": job.name, "reason": str(reason)})
    except MissingExtra:
        raise
    except Exception as error:  # whatever a broken file sets off in a reader; its text may quote the header
        skipped.append({"source": job.name, "reason": f"not readable ({type(error).__name__})"})
    return scans, skipped


def _modality(job: Job) -> str | None:
    """What the file's name tells, else its folder's."""
    *_, folder, name = ["", *job.name.split("/")]
    return modality_of(name) or modality_of(folder)


def _scan(name: str, modality: str | None, volume: Volume, every: int) -> Scan:
    slices, positions = axial_slices(volume)
    if not len(slices):
        raise Unusable("no slice has 10 % of its pixels above the background")
    return Scan(name, modality or "unknown", slices[::every].astype(np.float16), list(positions[::every]), volume.tilt)


@silent()
def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if max(image.size) > MAX_SIDE:  # it becomes a square of its longer side
                raise Unusable(f"a picture of {image.width} x {image.height} pixels, allowed are {MAX_SIDE} a side")
            upright = ImageOps.exif_transpose(image)
            grey = upright.convert("F") if upright.mode.startswith(("I", "F")) else upright.convert("L").convert("F")
    except Unusable:
        raise
    except Exception as error:  # Pillow meets a broken picture with any; its text may quote it
        raise Unusable(f"not a readable picture, allowed are PNG and JPEG ({type(error).__name__})") from None
    side = max(grey.size)
    values = np.asarray(grey)
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise Unusable("every pixel has the same value")
    square = Image.new("F", (side, side), low)
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    array = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    scaled: np.ndarray = (2 * (array - low) / (high - low) - 1).clip(-1, 1)
    return scaled
