"""The option --volume of sample: slices that are one brain, as a file that opens at the right place."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import count, say
from .errors import MissingExtra, UserError

Volume = Annotated[
    bool, typer.Option("--volume", help="One brain of many slices: -o brain.nii.gz, and brain.png, three views of it.")
]
Positions = Annotated[
    str | None,
    typer.Option(
        metavar="LOW:HIGH:STEP", help="Of --volume: heights of its slices, mm (default: what the model knows, each 2)."
    ),
]
FORMS = {"nifti": ".nii.gz", "dicom": ""}  # and what the names of several end in
MOST = 4096  # slices


def check_options(context: typer.Context, volume: bool, format: str | None) -> set[str]:
    """Refuse by name what means nothing with, or without, --volume; return which of some options were given."""
    told = [(name, context.get_parameter_source(name)) for name in ("eta", "batch_size", "positions")]
    given = {name for name, source in told if source is not None and source.name == "COMMANDLINE"}
    for name in given & ({"eta"} if volume else {"positions"}):
        with_or = "without" if volume else "with"
        raise typer.BadParameter(f"got a value, allowed {with_or} --volume", param_hint=f"--{name.replace('_', '-')}")
    if format is not None and volume and format not in FORMS:
        raise typer.BadParameter(
            f"got {format}, allowed with --volume are {' and '.join(FORMS)}", param_hint="--format"
        )
    if format == "dicom" and not volume:
        raise typer.BadParameter("got dicom, allowed with --volume", param_hint="--format")
    return given


def sample_volumes(
    pipeline: str, out: Path, n: int, settings: Any, form: str, positions: str | None, window: int | None, as_json: bool
) -> None:
    """Make volumes 0 to n - 1, each of a seed of its own, and three views beside each; those that are there stay."""
    from .files import write_json
    from .images import NOTICE
    from .machine import default_device, torchrun_number
    from .sampling.job import RECORD
    from .sampling.pipeline import Pipeline

    if (world := torchrun_number("WORLD_SIZE", 1, 1, 2**20)) > 1:
        raise UserError(f"WORLD_SIZE: got {world}, allowed with --volume is one process")
    if "position" in settings.asked:
        raise typer.BadParameter("got a value, allowed with --volume is --positions", param_hint="--position")
    if window is not None and window < 2:
        raise typer.BadParameter(f"got {window}, allowed with --volume is 2 or more", param_hint="--batch-size")
    places = _places(out, n, form)
    package = "pydicom" if form == "dicom" else "nibabel"
    if importlib.util.find_spec(package) is None:  # before it is made
        raise MissingExtra(f"format {form}", package, "data")
    pipe = Pipeline.from_pretrained(pipeline).to(default_device())
    heights = _heights(pipe, positions)
    sampler = pipe.sampler(settings.steps, settings.mode, scheduler=settings.scheduler, dtype=settings.dtype)
    record = _record_of(pipe, settings, form, heights) | {"dtype": str(sampler.dtype)[6:], "window": window}
    missing = _missing(out, places, record)
    spacing = pixel_spacing(pipe)
    start = time.monotonic()
    try:
        for k in missing:
            asked = {name: values[k] for name, values in settings.asked.items()}
            volume = pipe.sample_volume(
                positions=heights,
                seed=settings.seed + k,
                steps=settings.steps,
                mode=settings.mode,
                scheduler=settings.scheduler,
                dtype=settings.dtype,
                cond=asked,
                guidance_scale=settings.guidance_scale,
                guidance_interval=settings.guidance_interval,
                extrapolate=settings.extrapolate,
                window=window,
                progress=not as_json,
            )
            if n > 1:  # what is refused before leaves no folder
                write_json(out / RECORD, record)
            _write(volume, places[k], heights, spacing, _describe(record, settings.seed + k, asked))
    except KeyboardInterrupt:
        stays = "nothing was written" if n == 1 else f"what is finished stays in {out}, the same command makes the rest"
        say(f"sbldm-fast: interrupted; {stays}")
        raise typer.Exit(130) from None
    seconds = round(time.monotonic() - start, 2)
    done = {"out": str(out), "n": n, "made": len(missing), "kept": n - len(missing), "slices": len(heights)}
    done |= {"spacing_mm": [spacing, spacing, heights[1] - heights[0]], "seconds": seconds}
    done |= {"mode": sampler.mode, "reason": sampler.reason, "notice": NOTICE}
    say(f"mode {sampler.mode}: {sampler.reason}")
    kept = f", {done['kept']} were there" if n > 1 else ""
    text = f"{count(len(missing), 'volume')} of {len(heights)} slices in {seconds:.1f} s{kept}"
    print(json.dumps(done) if as_json else f"{text}: {out}, views {_views(places[0])}; {NOTICE}")


def _write(volume: Any, place: Path, heights: list[float], spacing: float, said: str) -> None:
    """A volume and its views, or neither."""
    from .volume_files import save_volume

    views = _views(place)
    try:
        for path in (views, place):  # the volume last: where it is, all of it is
            save_volume(volume, path, positions=heights, spacing=spacing, description=said)
    except BaseException:
        if not place.exists():
            views.unlink(missing_ok=True)
        raise


def pixel_spacing(pipe: Any) -> float:
    """mm of a pixel: the model's own, or of one that does not say it what prepare shows, 220 mm."""
    from .data.frame import FIELD_OF_VIEW

    config = pipe.vae.config
    return float(config.spacing or FIELD_OF_VIEW / min(config.size))


def _places(out: Path, n: int, form: str) -> list[Path]:
    """The file, or with --format dicom the folder, of each volume."""
    end = out.name.lower().endswith((".nii", ".nii.gz"))
    if form == "nifti" and n == 1 and not end:
        raise typer.BadParameter(
            f"got {out}, allowed is a name that ends in .nii.gz or .nii; with -n or --format dicom a folder",
            param_hint="--out",
        )
    if (out.suffix and form == "dicom") or (end and n > 1):
        raise typer.BadParameter(
            f"got {out}, allowed is a folder for {'a series' if form == 'dicom' else f'{n} volumes'}",
            param_hint="--out",
        )
    there = next(p for p in out.absolute().parents if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):  # now, and not when a volume is made
        raise UserError(f"{out} cannot be written: {there} is no folder that may be written to")
    return [out] if n == 1 else [out / f"{k:06d}{FORMS[form]}" for k in range(n)]


def _views(place: Path) -> Path:
    """The picture beside a volume."""
    stem = place.name
    for end in (".gz", ".nii"):
        stem = stem[: -len(end)] if stem.lower().endswith(end) else stem
    return place.with_name(f"{stem}.png")


def _heights(pipe: Any, text: str | None) -> list[float]:
    """The heights that are asked for, or those that the model knows, from the bottom up."""
    from .sampling.volume import POSITION, find_positions

    covariates = pipe.unet.config.covariates
    if text is None:
        if POSITION not in [c.name for c in covariates]:
            raise typer.BadParameter(
                "got none, allowed for a pipeline that knows no position is LOW:HIGH:STEP", param_hint="--positions"
            )
        return find_positions(covariates, None, None)
    try:
        low, high, step = map(float, text.split(":"))
    except ValueError:
        low = high = step = math.nan
    steps = (high - low) / step if step > 0 else math.nan
    if not 1 <= steps + 1e-6 < MOST:
        raise typer.BadParameter(
            f"got {text}, allowed is LOW:HIGH:STEP in mm, such as -50:72:2, of 2 to {MOST} slices",
            param_hint="--positions",
        )
    return find_positions(covariates, None, [low + step * k for k in range(math.floor(steps + 1e-6) + 1)])


def _record_of(pipe: Any, settings: Any, form: str, heights: list[float]) -> dict[str, Any]:
    """What the volumes are made with, as job's record of images."""
    from .images import NOTICE
    from .sampling.job import hash_values, identify

    told = {"guidance": settings.guidance_scale, "guidance_interval": settings.guidance_interval}
    return {
        "cond": {k: v[0] if len({*v}) == 1 else hash_values(v) for k, v in settings.asked.items()},
        **{k: v for k, v in told.items() if v is not None},
        "positions": heights,
        "pipeline": identify(pipe),
        "seed": settings.seed,
        "steps": settings.steps or pipe.default_steps(settings.scheduler),
        "scheduler": settings.scheduler or pipe.scheduler_name,
        "format": form,
        "notice": NOTICE,
    }


def _describe(record: dict[str, Any], seed: int, asked: dict[str, Any]) -> str:
    """Of one volume, what matters first: a NIfTI header has room for 50 letters."""
    wanted = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in asked.items()
        if value is not None
    )
    parts = [f"seed {seed}", wanted or "asked for nothing", f"{record['steps']} steps of {record['scheduler']}"]
    if "guidance" in record:
        parts.append(f"guidance {record['guidance']:g}")
    return "; ".join([*parts, record["dtype"], f"pipeline {record['pipeline']}"])


def _missing(out: Path, places: list[Path], record: dict[str, Any]) -> list[int]:
    """The numbers of the volumes to make; nothing of somebody else's is written over."""
    from .files import read_json
    from .sampling.job import RECORD, difference

    if len(places) == 1:
        if there := [path for path in (places[0], _views(places[0])) if path.exists()]:
            raise UserError(f"{there[0]} is there already; allowed is a new name")
        return [0]
    if (out / RECORD).exists():
        if other := difference(read_json(out / RECORD), record):
            raise UserError(f"{out} holds volumes of {other}; allowed is another folder")
    elif out.exists() and (found := sorted(p.name for p in out.glob("*"))):
        raise UserError(f"{out} holds {found[0]}, which no run of this command made; allowed is another folder")
    return [k for k, place in enumerate(places) if not place.exists()]
