"""Scans to a training set: one array of slices and a manifest that says where each came from."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from tqdm import tqdm

from sbldm_fast.files import whole_folder, write_json

from .covariates import Covariates, read_covariates
from .dicom import load_dicom
from .sources import Job, expand, modality_of, subject_of
from .synthetic import mni152, synthetic_brain
from .volumes import SIZE, Unusable, Volume, axial_slices, load_nifti

FORMAT = 2
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
SHEET_EVERY = 10  # slices to a tile of the contact sheet
SHEET_TILES = 400  # at most


@dataclass
class Scan:
    """The slices of one volume or picture, float16 `[N, 128, 128]`, and what the manifest says of them."""

    source: str
    subject: str
    modality: str
    slices: np.ndarray
    positions: Sequence[float | None] = (None,)
    tilt: float = 0.0
    covariates: Covariates = field(default_factory=dict)


Skipped = list[dict[str, str]]


def prepare(
    sources: Sequence[str], out: str | Path, *, split: str = "subject", seed: int = 42, volume: int | None = None, every: int = 1,
    covariates: str | Path | None = None, strict: bool = False, workers: int = 1, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write `slices.npy` (`[N, 128, 128]` float16 in [-1, 1]), `manifest.json` and `contact_sheet.png` to the folder `out`.

    Args:
        sources: NIfTI files, folders of NIfTI, DICOM or PNG/JPG files, `mni152`, `synthetic` or `synthetic:COUNT`.
        split: `"subject"` keeps all slices of a subject in one of train/val/test (70/15/15); `"slice"` is the leaking split of
            paper 001.
        seed: of the split and of the synthetic population.
        volume: which volume of 4-D files.
        every: keep every n-th slice.
        covariates: a CSV file, see `read_covariates`.
        strict: raise at the first unusable file, or subject without covariates, instead of naming and skipping it.
        workers: processes that read at a time; more than one needs a `__main__` that can be imported.

    Returns:
        The manifest.

    Raises:
        ValueError: a source that does not exist or has nothing to read, an ambiguous table, or (`strict`) a broken file.
    """
    if split not in ("subject", "slice"):
        raise ValueError(f"split: got {split!r}, allowed are subject, slice")
    for name, value in (("every", every), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, allowed is 1 or more")
    jobs = [job for source in sources for job in expand(source)]
    rows: list[dict[str, Any]] = []
    skipped: Skipped = []
    with whole_folder(out) as folder:
        with (folder / "slices.npy").open("wb") as f:
            _header(f, 0)
            for scans, left_out in tqdm(
                _results(jobs, seed, volume, every, workers), "prepare", len(jobs), unit="file", disable=not progress
            ):
                if left_out and strict:
                    raise ValueError(f"{left_out[0]['source']}: {left_out[0]['reason']}")
                skipped += left_out
                for scan in scans:
                    f.write(scan.slices.tobytes())
                    rows += _rows(scan)
            if not rows:
                reasons = "; ".join(f"{s['source']}: {s['reason']}" for s in skipped[:3])
                raise ValueError(f"no usable slice in {', '.join(sources)}" + (f" ({reasons})" if reasons else ""))
            f.seek(0)
            _header(f, len(rows))
        subjects = sorted({row["subject"] for row in rows})
        if covariates is not None:
            without = sorted({row["subject"] for row in rows if not row["covariates"]})  # synthetic brains have their own
            table = read_covariates(covariates, without)
            missing = [s for s in without if s not in table]
            if missing and strict:
                raise ValueError(f"{covariates} has no row for {missing[0]}")
            reason = f"no covariates: {Path(covariates).name} has no row for it; its slices are kept"
            skipped += [{"source": s, "reason": reason} for s in missing]
            for row in rows:
                row["covariates"] = table.get(row["subject"], row["covariates"])
        units = [row["subject"] for row in rows] if split == "subject" else [str(i) for i in range(len(rows))]
        where = assign_splits(units, seed)
        for row, unit in zip(rows, units, strict=True):
            row["split"] = where[unit]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "convention": "row 0 anterior, column 0 patient's left, square pixels, intensity -1 to 1 per volume; pictures as they are",
            "split": {"by": split, "seed": seed, "slices": dict(Counter(row["split"] for row in rows))},
            "subjects": len(subjects),
            "skipped": skipped,
            "slices": rows,
        }
        write_json(folder / "manifest.json", manifest)
        _contact_sheet(folder)
    return manifest


def _header(file: Any, count: int) -> None:
    # numpy leaves room for the first axis to grow in place
    npy.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (count, SIZE, SIZE)})


def _rows(scan: Scan) -> Iterator[dict[str, Any]]:
    for image, position in zip(scan.slices, scan.positions, strict=True):
        yield {
            "source": scan.source, "subject": scan.subject, "modality": scan.modality,
            "position_mm": None if position is None else round(float(position), 3), "tilt_deg": round(scan.tilt, 1),
            "covariates": scan.covariates, "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        }  # fmt: skip


def _contact_sheet(folder: Path) -> None:
    """Every tenth slice, or of very many evenly spread ones, as one picture."""
    from sbldm_fast.sampling.images import save_grid, to_uint8

    array = np.load(folder / "slices.npy", mmap_mode="r", allow_pickle=False)
    tiles = array[:: max(SHEET_EVERY, -(-len(array) // SHEET_TILES))]
    save_grid(to_uint8(torch.from_numpy(tiles.astype(np.float32))[:, None]), folder / "contact_sheet.png", "not for diagnosis")


def assign_splits(units: Sequence[str], seed: int) -> dict[str, str]:
    """Train, val or test for each distinct unit: 70/15/15, and at least one each where there are three units."""
    distinct = sorted(set(units))
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    held_out = max(1, round(SPLITS["val"] * len(order))) if len(order) >= 3 else 0
    names = ["val"] * held_out + ["test"] * held_out
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))


def _results(jobs: list[Job], seed: int, volume: int | None, every: int, workers: int) -> Iterable[tuple[list[Scan], Skipped]]:
    """What each job gives, in the order of the jobs."""
    read = partial(_read, seed=seed, volume=volume, every=every)
    if workers == 1 or len(jobs) == 1:
        yield from map(read, jobs)
        return
    # spawned: a fork would share torch's threads. One thread each: the processes are what runs at a time
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(read, jobs)


def _read(job: Job, seed: int, volume: int | None, every: int) -> tuple[list[Scan], Skipped]:
    """The scans in a job's files, and what was left out with its reason."""
    scans: list[Scan] = []
    skipped: Skipped = []
    if job.kind == "dicom":
        series, left_out = load_dicom(job.files)
        parent = job.name.rpartition("/")[0]
        skipped = [{"source": f"{parent}/{name}" if parent else name, "reason": reason} for name, reason in left_out]
        several = len({one.patient for one in series}) > 1
        for number, one in enumerate(series):
            name = f"{parent or job.name}#{number}" if len(series) > 1 else parent or job.name
            subject = f"{subject_of(job)}-{one.patient}" if several else subject_of(job)
            _add(name, subject, modality_of(parent) or modality_of(one.description), one.volume, every, scans, skipped)
        return scans, skipped
    try:
        if job.kind == "archive":
            raise Unusable("an archive; unpack it first")
        if job.kind == "synthetic":
            brain, modality, covariates = synthetic_brain(job.index, seed)
            _add("synthetic", job.name, modality, brain, every, scans, skipped)
            scans[0].covariates = covariates
        elif job.kind == "mni152":
            _add("mni152", "mni152", "T1", mni152(), every, scans, skipped)
        elif job.kind == "nifti":
            _add(job.name, subject_of(job), modality_of(job.name), load_nifti(job.files[0], volume), every, scans, skipped)
        else:
            picture = _picture(job.files[0])[None].astype(np.float16)
            scans.append(Scan(job.name, subject_of(job), modality_of(job.name) or "unknown", picture))
    except Unusable as reason:
        skipped.append({"source": job.name, "reason": str(reason)})
    return scans, skipped


def _add(name: str, subject: str, modality: str | None, volume: Volume, every: int, scans: list[Scan], skipped: Skipped) -> None:
    try:
        slices, positions = axial_slices(volume)
        if not len(slices):
            raise Unusable("no slice has 10 % of its pixels above the background")
    except Unusable as reason:
        skipped.append({"source": name, "reason": str(reason)})
        return
    kept = slices[::every].astype(np.float16)
    scans.append(Scan(name, subject, modality or "unknown", kept, list(positions[::every]), volume.tilt))


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            grey = image.convert("F") if image.mode.startswith(("I", "F")) else image.convert("L").convert("F")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable(f"not a readable picture ({error})") from None
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
