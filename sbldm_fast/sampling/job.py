"""Sampling as a job that may be interrupted, split over processes and run again: a finished image is never made
twice."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from tqdm import tqdm

from sbldm_fast.files import read_json, whole_file, write_json
from sbldm_fast.images import NOTICE, save_grid, save_nifti, save_png, to_uint8
from sbldm_fast.machine import torchrun_number
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.weights import digest_weights

from ..errors import MissingExtra, UserError
from .modes import choose
from .pipeline import Pipeline, even_batch
from .population import bids_path, write_participants
from .request import Arguments, SampleRequest

GRID = 64  # images in the grid
RECORD = "sample.json"  # what the images in a folder were made with
# what is made of all images, by format
WHOLE = {"png": "grid.png", "npy": "images.npy", "nifti": "images.nii.gz", "bids": "participants.tsv"}


@dataclass(frozen=True)
class Settings:
    """What the images of a job are made with.

    Args:
        seed, steps, scheduler, mode, eta, dtype: as of `Pipeline.sample`.
        batch_size: images at a time, at most.
        format: `png`, a file per image and a grid; `npy` or `nifti`, one array, float32; `bids`, a subject per image.
        asked: covariates by name, a value for each image.
        guidance_scale, guidance_interval, extrapolate: as of `Pipeline.sample`.

    Raises:
        UserError: an unknown format.
        MissingExtra: `nifti` without nibabel.
    """

    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    mode: str = "auto"
    eta: float = 0.0
    dtype: torch.dtype | None = None
    batch_size: int = 16
    format: str = "png"
    asked: dict[str, list[Any]] = field(default_factory=dict)
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    extrapolate: bool = False

    def __post_init__(self) -> None:
        if self.format not in WHOLE:
            raise UserError(f"format: got {self.format!r}, allowed are {', '.join(WHOLE)}")
        if self.format in ("nifti", "bids") and importlib.util.find_spec("nibabel") is None:
            raise MissingExtra(f"format {self.format}", "nibabel", "data")

    def arguments(self, indices: Sequence[int], batch_size: int) -> Arguments:
        """What a sampler is given to make some of the images."""
        return Arguments(
            indices=indices,
            seed=self.seed,
            batch_size=batch_size,
            cond={name: [values[i] for i in indices] for name, values in self.asked.items()} or None,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            extrapolate=self.extrapolate,
        )


def sample_to_folder(pipeline: str, out: Path, n: int, settings: Settings, *, progress: bool) -> dict[str, Any]:
    """Make images 0 to n - 1 of a seed that are not in `out` yet, this process its share of them; the last step puts
    them together.

    Under torchrun whole batches go round the ranks, so that a job of at least `batch_size` images a rank, if nothing
    interrupts it, makes each image in the same batch as one process does: byte for byte the same. Smaller jobs take
    smaller batches. After an interruption what is missing fills batches of the same size in another order: the same to
    rounding.

    Returns:
        What was done by all processes: images made, images there before; the mode, and this process' rank.

    Raises:
        ValueError: as `FastSampler`, or `out` holds images of other settings.
        KeyboardInterrupt: what is finished stays.
    """
    world = torchrun_number("WORLD_SIZE", 1, 1, 2**20)
    rank, local = (torchrun_number(name, 0, 0, world - 1) for name in ("RANK", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    pipe = Pipeline.from_pretrained(pipeline).to(device)
    steps = pipe.default_steps(settings.scheduler) if settings.steps is None else settings.steps
    settings = replace(settings, steps=steps)
    size = even_batch(n, min(settings.batch_size, math.ceil(n / world)))  # no rank without work
    mode, reason = settings.mode, ""
    if mode == "auto":  # settled by the whole job: a rank must not choose otherwise than one process would
        mode, reason = choose(device, n, steps)
    sampler = pipe.sampler(steps, mode, scheduler=settings.scheduler, eta=settings.eta, dtype=settings.dtype)
    with warnings.catch_warnings():  # what is refused leaves no folder; what is warned of is when it is made
        warnings.simplefilter("ignore")
        request = SampleRequest(pipe.latent_shape, device, model=pipe.unet, **settings.arguments(range(n), size))
        request.refuse_interval_without(sampler.timesteps)
    if settings.format == "bids":  # its table has a row for each
        there = [int(p.name[4:]) for p in out.glob("sub-*") if p.name[4:].isdecimal()]
        if there and max(there) >= n:
            raise UserError(f"n: got {n}, but {out} holds sub-{max(there):06d}; allowed is {max(there) + 1} or more")
    claim = _claim(out, settings.format, _record_of(pipe, settings, sampler.dtype))
    missing = _missing_for_all(out, n, settings, world)
    batches = [[i for i in missing if i // size == b] for b in sorted({i // size for i in missing})]
    mine = [i for batch in batches[rank::world] for i in batch]
    made = 0
    with tqdm(total=len(mine), desc="sample", unit="image", disable=not progress or rank > 0) as bar:
        for images in sampler.stream(**settings.arguments(mine, size)) if mine else ():
            for image in images.cpu():
                _write_part(image, _part(out, mine[made], settings), settings.format)
                made += 1
                bar.update()
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        _assemble(out, n, settings, pipe.unet.config.covariates)
    os.close(claim)
    total = len(missing)
    done = {"out": str(out), "n": n, "made": total, "kept": n - total}
    return done | {"mode": sampler.mode, "reason": reason or sampler.reason, "rank": rank}


def _record_of(pipe: Pipeline, settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """What the folder's record says of the images in it."""
    told = {"guidance": settings.guidance_scale, "guidance_interval": settings.guidance_interval}
    cond = {k: v[0] if len({*v}) == 1 else hash_values(v) for k, v in settings.asked.items()}
    return {
        **({"cond": cond, **{k: v for k, v in told.items() if v is not None}} if cond else {}),
        "pipeline": identify(pipe),
        "seed": settings.seed,
        "steps": settings.steps,
        "scheduler": settings.scheduler or pipe.scheduler_name,
        "eta": settings.eta,
        "dtype": str(dtype)[6:],
        "batch": settings.batch_size,
        "format": settings.format,
        "notice": NOTICE,
    }


def hash_values(values: Sequence[Any]) -> str:
    """Stands for the values of all images in a record."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:16]


def _missing_for_all(out: Path, n: int, settings: Settings, world: int) -> list[int]:
    """The images that are not there yet: one list for all ranks, made before any of them writes."""
    shared = [[i for i in range(n) if not _part(out, i, settings).exists()]]
    if world > 1:
        # a rank with much to do may keep the others waiting; one that dies is torchrun's to notice
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def identify(pipe: Pipeline) -> str:
    """The digest of a pipeline's weights and configurations."""
    configs = [part.config.to_dict() for part in (pipe.vae, pipe.unet, pipe.scheduler)]
    return digest_weights(pipe.vae, pipe.unet, beside=json.dumps(configs, sort_keys=True).encode())


def _claim(out: Path, format: str, settings: dict[str, Any]) -> int:
    """Hold `out` for images of these settings, as long as what is returned is open, beside others who make the same
    ones.

    Raises:
        ValueError: another run is at work there, or there are images of something else, or files that are not a run's.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # others are at work: with these settings, or this run is refused
            fcntl.flock(lock, fcntl.LOCK_SH)
            if (out / RECORD).exists() and (there := read_json(out / RECORD)) != settings:
                raise UserError(f"{out} is where images of {difference(there, settings)} are being made") from None
            return lock
        except OSError:  # a file system without locks
            pass
        _record(out, format, settings)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
    except BaseException:
        os.close(lock)
        if new:
            with suppress(OSError):
                out.rmdir()  # what is refused leaves no folder
        raise
    return lock


def _record(out: Path, format: str, settings: dict[str, Any]) -> None:
    """Write down what the images are made with, unless there are images of something else, or files that are not a
    run's."""
    ours = (out / RECORD).exists()
    there = read_json(out / RECORD) if ours else {}
    used = there.get("format") if there.get("format") in WHOLE else format
    found = [p.name for p in out.iterdir()] if out.is_dir() else []
    images = [name for name in found if name in WHOLE.values() or re.fullmatch(r"\d{6}\.png|sub-\d{6}", name)]
    images += [f"parts/{p.name}" for p in (out / "parts").glob("[0-9]" * 6 + ".npy")]
    if images and not ours:
        raise UserError(f"{out} holds {min(images)}, which no run of this command made; allowed is another folder")
    if images and (other := difference(there, settings)):
        raise UserError(f"{out} holds images of {other}; allowed is another folder")
    if stray := [name for name in images if name in WHOLE.values() and name != WHOLE[str(used)]]:
        raise UserError(f"{out} holds {stray[0]}, which no run of format {used} makes; allowed is another folder")
    write_json(out / RECORD, settings)


def difference(there: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The first setting in which two records differ, in words; nothing where they do not. What one says and the other
    does not is a difference, too."""
    for k in (*settings, *there):
        old, new = there.get(k), settings.get(k)
        if k == "cond" and old != new and isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
            return f"another {', '.join(names)}, or another number of them, than this run asks for"
        if old != new:
            return f"{k} {old}, this run's is {new}"
    return ""


def _part(out: Path, i: int, settings: Settings) -> Path:
    if settings.format == "bids":
        return bids_path(out, i, settings.asked)
    return out / f"{i:06d}.png" if settings.format == "png" else out / "parts" / f"{i:06d}.npy"


def _write_part(image: torch.Tensor, path: Path, format: str) -> None:
    if format == "png":
        save_png(to_uint8(image[None])[0], path)
        return
    if format == "bids":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_nifti(image.float().numpy(), path)
        return
    _save(image[0].float().numpy(), path)


def _assemble(out: Path, n: int, settings: Settings, covariates: Sequence[Covariate]) -> None:
    format = settings.format
    if format == "bids":
        write_participants(out, n, settings.asked, covariates)
        return
    if format == "png":
        shown = []
        for i in range(min(n, GRID)):
            with Image.open(_part(out, i, settings)) as image:
                shown.append(np.asarray(image))
        save_grid(np.stack(shown), out / WHOLE[format])
        return
    images = np.stack([_load(_part(out, i, settings)) for i in range(n)])
    if format == "nifti":
        save_nifti(images, out / WHOLE[format])
    else:
        _save(images, out / WHOLE[format])


def _load(path: Path) -> np.ndarray:
    try:
        return npy.read_array(BytesIO(path.read_bytes()), allow_pickle=False)
    except Exception:  # numpy meets a damaged file with any
        raise UserError(f"{path} is damaged; without it the same command makes it again") from None


def _save(array: np.ndarray, path: Path) -> None:
    """Write an array as np.save does, except that a full disk is called so."""
    with whole_file(path) as aside, aside.open("wb") as file:
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
