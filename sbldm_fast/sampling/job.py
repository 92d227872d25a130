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
from contextlib import suppress
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

from ..errors import MissingExtra, UserError
from .modes import choose
from .pipeline import Pipeline, even_batch
from .request import seeds_and_noise

FORMATS = ("png", "npy", "nifti")
GRID = 64  # images in the grid
RECORD = "sample.json"  # what the images in a folder were made with
WHOLE = {"png": "grid.png", "npy": "images.npy", "nifti": "images.nii.gz"}  # what is made of all images


def sample_to_folder(
    pipeline: str,
    out: Path,
    n: int,
    *,
    seed: int,
    steps: int,
    scheduler: str,
    mode: str,
    eta: float,
    dtype: torch.dtype | None,
    batch_size: int,
    form: str,
    progress: bool,
) -> dict[str, Any]:
    """Make images 0 to n - 1 of `seed` that are not in `out` yet, this process its share of them; the last step puts
    them together.

    Under torchrun whole batches go round the ranks, so that a job of at least `batch_size` images a rank, if nothing
    interrupts it, makes each image in the same batch as one process does: byte for byte the same. Smaller jobs take
    smaller batches. After an interruption what is missing fills batches of the same size in another order: the same to
    rounding.

    `png` is a file per image and a grid; `npy` and `nifti` one array, float32.

    Returns:
        What was done by all processes: images made, images there before; the mode, and this process' rank.

    Raises:
        ValueError: as `FastSampler`, an unknown format, or `out` holds images of other settings.
        KeyboardInterrupt: what is finished stays.
    """
    if form not in FORMATS:
        raise UserError(f"format: got {form!r}, allowed are {', '.join(FORMATS)}")
    if form == "nifti" and importlib.util.find_spec("nibabel") is None:
        raise MissingExtra("format nifti", "nibabel", "data")
    world = _of_torchrun("WORLD_SIZE", 1, 1, 2**20)
    rank, local = (_of_torchrun(name, 0, 0, world - 1) for name in ("RANK", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    pipe = Pipeline.from_pretrained(pipeline).to(device)
    size, reason = even_batch(n, min(batch_size, math.ceil(n / world))), ""  # no rank without work
    if mode == "auto":  # settled by the whole job: a rank must not choose otherwise than one process would
        mode, reason = choose(device, n, steps)
    sampler = pipe.sampler(steps, mode, scheduler=scheduler, eta=eta, dtype=dtype)
    seeds_and_noise(pipe.latent_shape, device, 1, seed, None, None)  # a seed that is refused leaves no folder
    claim = _claim(
        out,
        form,
        {
            "pipeline": _identity(pipe),
            "seed": seed,
            "steps": steps,
            "scheduler": scheduler,
            "eta": eta,
            "dtype": str(sampler.dtype)[6:],
            "batch": batch_size,
            "format": form,
            "notice": NOTICE,
        },
    )
    # one list for all ranks, made before any of them writes
    shared = [[i for i in range(n) if not _part(out, i, form).exists()]]
    if world > 1:
        # a rank with much to do may keep the others waiting; one that dies is torchrun's to notice
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.broadcast_object_list(shared, src=0)
    batches = [[i for i in shared[0] if i // size == b] for b in sorted({i // size for i in shared[0]})]
    missing = [i for batch in batches[rank::world] for i in batch]
    made = 0
    with tqdm(total=len(missing), desc="sample", unit="image", disable=not progress or rank > 0) as bar:
        for images in sampler.stream(indices=missing, seed=seed, batch_size=size) if missing else ():
            for image in images.cpu():
                _write_part(image, _part(out, missing[made], form), form)
                made += 1
                bar.update()
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        _assemble(out, n, form)
    os.close(claim)
    total = len(shared[0])
    return {
        "out": str(out),
        "n": n,
        "made": total,
        "kept": n - total,
        "mode": sampler.mode,
        "reason": reason or sampler.reason,
        "rank": rank,
    }


def _identity(pipe: Pipeline) -> str:
    configs = [part.config.to_dict() for part in (pipe.vae, pipe.unet, pipe.scheduler)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    for model in (pipe.vae, pipe.unet):
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_torchrun(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"{name}: got {text!r} in the environment, allowed is {least} to {most}: torchrun sets it with the others"
        )
    return int(text)


def _claim(out: Path, form: str, settings: dict[str, Any]) -> int:
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
                k = next((k for k in settings if there.get(k) != settings[k]), "settings")
                raise UserError(
                    f"{out} is where images of {k} {there.get(k)} are being made, this run's is {settings.get(k)}"
                ) from None
            return lock
        except OSError:  # a file system without locks
            pass
        _record(out, form, settings)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
    except BaseException:
        os.close(lock)
        if new:
            with suppress(OSError):
                out.rmdir()  # what is refused leaves no folder
        raise
    return lock


def _record(out: Path, form: str, settings: dict[str, Any]) -> None:
    """Write down what the images are made with, unless there are images of something else, or files that are not a
    run's."""
    ours = (out / RECORD).exists()
    there = read_json(out / RECORD) if ours else {}
    used = there.get("format") if there.get("format") in FORMATS else form
    found = [p.name for p in out.iterdir()] if out.is_dir() else []
    images = [name for name in found if name in WHOLE.values() or re.fullmatch(r"\d{6}\.png", name)]
    images += [f"parts/{p.name}" for p in (out / "parts").glob("[0-9]" * 6 + ".npy")]
    if images and not ours:
        raise UserError(f"{out} holds {min(images)}, which no run of this command made; allowed is another folder")
    other = [k for k in settings if there.get(k) != settings[k]]
    if other and images:
        k = other[0]
        raise UserError(
            f"{out} holds images of {k} {there.get(k)}, this run's is {settings[k]}; allowed is another folder"
        )
    if stray := [name for name in images if name in WHOLE.values() and name != WHOLE[str(used)]]:
        raise UserError(f"{out} holds {stray[0]}, which no run of format {used} makes; allowed is another folder")
    write_json(out / RECORD, settings)


def _part(out: Path, i: int, form: str) -> Path:
    return out / f"{i:06d}.png" if form == "png" else out / "parts" / f"{i:06d}.npy"


def _write_part(image: torch.Tensor, path: Path, form: str) -> None:
    if form == "png":
        save_png(to_uint8(image[None])[0], path)
        return
    _save(image[0].float().numpy(), path)


def _assemble(out: Path, n: int, form: str) -> None:
    if form == "png":
        shown = []
        for i in range(min(n, GRID)):
            with Image.open(_part(out, i, form)) as image:
                shown.append(np.asarray(image))
        save_grid(np.stack(shown), out / WHOLE[form])
        return
    images = np.stack([_load(_part(out, i, form)) for i in range(n)])
    if form == "nifti":
        save_nifti(images, out / WHOLE[form])
    else:
        _save(images, out / WHOLE[form])


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
