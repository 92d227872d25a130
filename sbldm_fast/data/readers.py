"""The files of a job to scans: a reader for each kind of file, and the processes that read."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from sbldm_fast.errors import MissingExtra, UserError
from sbldm_fast.files import printable

from .dicom import load_dicom
from .frame import FRAME, Frame
from .sources import Job, modality_of
from .synthetic import mni152, synthetic_brain
from .volumes import Unusable, Volume, axial_slices, load_nifti, silent, whole_volume

LABELS = "a label map, by its name"
MAX_SIDE = 8192  # pixels of a picture
TOP = 71.0  # mm, the height of the highest axial slice of the ICBM 152 template that holds enough head


@dataclass(frozen=True)
class ReadOptions:
    """What `prepare` asks of every reader: the seed of synthetic brains, the volume of 4-D files, every n-th slice, the
    frame of slices, and whether volumes are kept whole."""

    seed: int
    volume: int | None
    every: int
    frame: Frame = FRAME
    whole: bool = False


@dataclass(frozen=True)
class Scan:
    """The slices of one volume or picture, float16 `[N, H, W]`, and what the manifest says of them."""

    source: str
    modality: str
    slices: np.ndarray
    positions: Sequence[float | None] = (None,)
    levels: Sequence[float | None] = (None,)  # mm, positions with the highest slice at TOP: comparable between scans
    tilt: float = 0.0
    covariates: dict[str, float | str] = field(default_factory=dict)
    patient: str = ""  # DICOM's PatientID, to tell people apart; in memory only
    distance: float | None = None  # mm between the slices of a volume that is kept whole


Skipped = list[dict[str, str]]
Reader = Callable[[Job, ReadOptions, Skipped], Iterator[Scan]]


def read_all(jobs: list[Job], options: ReadOptions, workers: int) -> Iterable[tuple[list[Scan], Skipped]]:
    """What each job gives, in the order of the jobs, read by `workers` processes at a time."""
    read_one = partial(read, options=options)
    if workers == 1 or len(jobs) == 1:
        yield from map(read_one, jobs)
        return
    # a fork would share torch's threads
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _begin)
    try:
        for job, future in [(job, pool.submit(read_one, job)) for job in jobs]:
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


def read(job: Job, options: ReadOptions) -> tuple[list[Scan], Skipped]:
    """The scans in a job's files, and what was left out with its reason: a bad file is never the end of the others."""
    scans: list[Scan] = []
    skipped: Skipped = []
    try:
        for scan in READERS[job.kind](job, options, skipped):
            scans.append(scan)  # one by one: those before an error are kept
    except Unusable as reason:
        skipped.append({"source": job.name, "reason": str(reason)})
    except MissingExtra:
        raise
    except Exception as error:  # whatever a broken file sets off in a reader; its text may quote the header
        skipped.append({"source": job.name, "reason": f"not readable ({type(error).__name__})"})
    return scans, skipped


def _refuse_archive(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    raise Unusable("an archive; unpack it first")


def _refuse_labels(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    raise Unusable(LABELS)


def _make_synthetic(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    brain, modality, covariates = synthetic_brain(job.index, options.seed)
    yield _slice("synthetic", modality, brain, options, covariates=covariates)


def _read_mni152(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    yield _slice("mni152", "T1", mni152(), options)


def _read_nifti(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    yield _slice(job.name, _modality(job), load_nifti(job.files[0], options.volume), options)


def _read_dicom(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    series, left_out = load_dicom(job.files)
    parent = job.name.rpartition("/")[0]
    for name, reason in left_out:
        skipped.append({"source": printable(f"{parent}/{name}" if parent else name), "reason": printable(reason)})
    for number, one in enumerate(series):
        name = f"{parent or job.name}#{number}" if len(series) > 1 else parent or job.name
        modality = modality_of(one.description) or _modality(job)
        try:
            yield _slice(name, modality, one.volume, options, patient=one.patient)
        except Unusable as reason:
            skipped.append({"source": name, "reason": str(reason)})


def _read_picture(job: Job, options: ReadOptions, skipped: Skipped) -> Iterator[Scan]:
    if options.whole:
        raise Unusable("a picture, which is no slice of a volume")
    picture = load_picture(job.files[0], options.frame.size)
    yield Scan(job.name, _modality(job) or "unknown", picture[None].astype(np.float16))


READERS: dict[str, Reader] = {
    "archive": _refuse_archive,
    "labels": _refuse_labels,
    "synthetic": _make_synthetic,
    "mni152": _read_mni152,
    "nifti": _read_nifti,
    "dicom": _read_dicom,
    "picture": _read_picture,
}


def _modality(job: Job) -> str | None:
    """What the file's name tells, else its folder's."""
    *_, folder, name = ["", *job.name.split("/")]
    return modality_of(name) or modality_of(folder)


def _slice(
    name: str,
    modality: str | None,
    volume: Volume,
    options: ReadOptions,
    covariates: dict[str, float | str] | None = None,
    patient: str = "",
) -> Scan:
    slices, positions = (whole_volume if options.whole else axial_slices)(volume, options.frame)
    if not len(slices):
        raise Unusable(f"no slice has {100 * options.frame.enough:.0f} % of its pixels above the background")
    kept, heights = slices[:: options.every].astype(np.float16), positions[:: options.every]
    if options.whole and len(kept) < 2:
        raise Unusable("a volume of one slice, allowed are two or more")
    levels = list(heights - positions.max() + TOP)
    distance = volume.rise * options.every if options.whole else None
    return Scan(
        name, modality or "unknown", kept, list(heights), levels, volume.tilt, covariates or {}, patient, distance
    )


@silent()
def load_picture(path: Path, size: tuple[int, int] = FRAME.size) -> np.ndarray:
    """A PNG or JPEG file as grey, whole and in the middle of `size` `(H, W)`: `[H, W]` float32 in [-1, 1].

    Raises:
        Unusable: another file, a damaged one, one that is too large, or one of a single value.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if max(image.size) > MAX_SIDE:
                raise Unusable(f"a picture of {image.width} x {image.height} pixels, allowed are {MAX_SIDE} a side")
            upright = ImageOps.exif_transpose(image)
            grey = upright.convert("F") if upright.mode.startswith(("I", "F")) else upright.convert("L").convert("F")
    except Unusable:
        raise
    except Exception as error:  # Pillow meets a broken picture with any; its text may quote it
        raise Unusable(f"not a readable picture, allowed are PNG and JPEG ({type(error).__name__})") from None
    height, width = size
    across, down = (
        max(grey.width, -(-grey.height * width // height)),
        max(grey.height, -(-grey.width * height // width)),
    )
    values = np.asarray(grey)
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise Unusable("every pixel has the same value")
    canvas = Image.new("F", (across, down), low)
    canvas.paste(grey, ((across - grey.width) // 2, (down - grey.height) // 2))
    array = np.asarray(canvas.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    scaled: np.ndarray = (2 * (array - low) / (high - low) - 1).clip(-1, 1)
    return scaled
