"""Covariate recovery: ask for a value, measure it in what comes out, correlate.

Source: Pinaya et al. 2022, arXiv:2209.07162, section 3.2, who report r = .972 for ventricles and .692 for age. A brain
is asked for slice by slice, at heights 4 mm apart, all from one noise; its ventricles are the sum of what the slices
show.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.files import whole_folder, write_json
from sbldm_fast.images import NOTICE, save_grid, save_picture, to_uint8
from sbldm_fast.sampling.pipeline import Pipeline, even_batch

from ..errors import UserError
from .measure import MODALITIES, Measurer, correlation, measure_ceiling, train_measurer, volumes

LEVELS = tuple(range(-20, 49, 4))  # mm: beyond them no brain has lateral ventricles
NEEDED = ("age", "sex", "ventricle_volume", "modality", "position")
POSITIONS = 4  # slices of a brain that heights are judged by, drawn from all that it has
FEW = 24  # brains at the edge of the range, and as many outside it
SWEEP, SEEDS = 9, 4  # values of a sweep, and noises that it is made from
BATCH = 64
Z95 = 1.959963984540054  # of a normal distribution
Request = dict[str, Any]
Ask = Callable[[Sequence[Request], Sequence[int]], dict[str, Tensor]]


def covariate_recovery(
    pipeline: Pipeline,
    data: str | Path,
    out: str | Path,
    *,
    n: int = 300,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask for n brains as the training slices of the prepared folder `data` have them, and for some at the edge of the
    range, outside it, and with age or ventricles held; write `recovery.json`, `recovery.png` (asked against measured)
    and `ages.png` (one noise at five ages) to the folder `out`; return the report.

    Intervals are of 95 %: Fisher's for r, Wilson's for a share, each with the number of brains.

    Raises:
        ValueError: a pipeline that cannot be asked for all of `NEEDED`, or data without brains that have them.
    """
    known = {c.name: c for c in pipeline.unet.config.covariates}
    if lacking := [name for name in NEEDED if name not in known]:
        raise UserError(f"pipeline: it cannot be asked for {lacking[0]}; recovery needs {', '.join(NEEDED)}")
    if n < 4:
        raise UserError(f"n: got {n}, allowed is 4 or more")
    people = find_people(data)
    model = train_measurer(pipeline.vae, progress=progress)

    def ask(requests: Sequence[Request], seeds: Sequence[int]) -> dict[str, Tensor]:
        return measure_requests(pipeline, model, requests, seeds, steps, guidance_scale, progress)

    volume, age = known["ventricle_volume"], known["age"]
    asked = ask(draw_people(people, n, seed), range(seed, seed + n))
    figures = summarize(asked)
    tenth = 0.1 * (volume.high - volume.low)
    ends = [(volume.low, volume.low + tenth), (volume.high - tenth, volume.high)]
    beyond = [(volume.low - tenth, volume.low), (volume.high, volume.high + tenth)]
    middle: Request = {"sex": None, "modality": "T1", "age": (age.low + age.high) / 2}
    half = {"ventricle_volume": (volume.low + volume.high) / 2}
    report = {
        "brains": n,
        "slices_a_brain": len(LEVELS) + POSITIONS,
        "steps": pipeline.default_steps() if steps is None else steps,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "notice": NOTICE,
        "ceiling": measure_ceiling(model, None),
        "ceiling_after_autoencoder": measure_ceiling(model, pipeline.vae),
        "inside": figures,
        "edge": _errors(ask(_volumes_between(people, ends), range(seed + 10_000, seed + 10_000 + FEW))),
        "outside": _errors(ask(_volumes_between(people, beyond), range(seed + 20_000, seed + 20_000 + FEW))),
        "ventricles_swept": _slope(ask, middle, "ventricle_volume", volume.low, volume.high, seed + 30_000),
        "age_swept": _slope(ask, middle | half, "age", age.low, age.high, seed + 40_000),
    }
    with whole_folder(out) as folder:
        write_json(folder / "recovery.json", report)
        title = f"ventricles, ml: r = {figures['ventricle']['r']:.3f}"
        draw_scatter(asked["asked"], asked["found"], folder / "recovery.png", title)
        _draw_ages(pipeline, seed, steps, guidance_scale, folder / "ages.png")
    return report


def find_people(data: str | Path) -> list[Request]:
    """The brains of the training split whose ventricles are known, each with its covariates, its modality and the
    `positions` of its slices.

    Raises:
        ValueError: as `read_manifest`, or there are fewer than two.
    """
    people: dict[str, Request] = {}
    for row in read_manifest(data)["slices"]:
        found = row.get("covariates", {})
        wanted = {"modality": row.get("modality"), **{k: found.get(k) for k in NEEDED[:3]}}
        if row["split"] == "train" and None not in wanted.values() and row["modality"] in MODALITIES:
            people.setdefault(row["subject"], {**wanted, "positions": []})["positions"].append(found["position"])
    if len(people) < 2:
        raise UserError(f"{data} has {len(people)} brains with {', '.join(NEEDED[:4])}; synthetic ones have them")
    return list(people.values())


def draw_people(people: Sequence[Request], n: int, seed: int) -> list[Request]:
    """n brains as they come: each time all covariates of one, and some of its positions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for i in torch.randint(len(people), (n,), generator=generator).tolist():
        there = people[i]["positions"]
        some = torch.randint(len(there), (POSITIONS,), generator=generator).tolist()
        drawn.append({**people[i], "positions": [there[k] for k in some]})
    return drawn


def _volumes_between(people: Sequence[Request], ranges: Sequence[tuple[float, float]]) -> list[Request]:
    """`FEW` volumes spread over the ranges, each with the other covariates of the brain that is nearest to it."""
    each = FEW // len(ranges)
    asked = [low + (high - low) * (i + 0.5) / each for low, high in ranges for i in range(each)]
    nearest = [min(people, key=lambda p, v=v: abs(p["ventricle_volume"] - v)) for v in asked]  # type: ignore[misc]
    return [{**p, "ventricle_volume": v, "positions": []} for p, v in zip(nearest, asked, strict=True)]


def measure_requests(
    pipeline: Pipeline,
    model: Measurer,
    requests: Sequence[Request],
    seeds: Sequence[int],
    steps: int | None,
    guidance_scale: float | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Of each brain the volume that was asked for and what was found, `[n]` ml; of the slices at its `positions` the
    height that was asked for and what was found; of every slice whether the modality is right."""
    levels = [(*LEVELS, *request.get("positions", ())) for request in requests]
    brain = torch.arange(len(requests)).repeat_interleave(torch.tensor([len(one) for one in levels]))
    position = torch.tensor([z for one in levels for z in one])
    within = torch.tensor([i < len(LEVELS) for one in levels for i in range(len(one))])
    names = [name for name in requests[0] if name != "positions"]
    cond: dict[str, Any] = {name: [requests[b][name] for b in brain.tolist()] for name in names}
    size = even_batch(len(brain), BATCH)
    sampler = pipeline.sampler(steps)
    batches = sampler.stream(
        seed=[seeds[b] for b in brain.tolist()],  # a brain's slices are of one noise
        indices=[0] * len(brain),
        cond=cond | {"position": position},
        guidance_scale=guidance_scale,
        extrapolate=True,
        batch_size=size,
    )
    total = math.ceil(len(brain) / size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lies outside the range is asked for on purpose
        images = torch.cat([b.cpu() for b in tqdm(batches, "ask", total, unit="batch", disable=not progress)])
    read = model.read(images)
    wanted = torch.tensor([MODALITIES.index(m) for m in cond["modality"]])
    return {
        "asked": torch.tensor(
            [float(r["ventricle_volume"]) if r.get("ventricle_volume") else math.nan for r in requests]
        ),
        "found": volumes(read.area[within], brain[within], len(requests), LEVELS[1] - LEVELS[0]),
        "position": position[~within],
        "position_found": read.position[~within],
        "modality_right": (read.modality == wanted).float(),
    }


def summarize(of: Mapping[str, Tensor]) -> dict[str, Any]:
    """The three figures of some brains with their intervals."""
    n = len(of["asked"])
    r, r_position = correlation(of["asked"], of["found"]), correlation(of["position"], of["position_found"])
    right = float(of["modality_right"].mean())
    error = of["found"] - of["asked"]
    return {
        "ventricle": {
            "r": r,
            "interval": fisher_interval(r, n),
            "bias_ml": float(error.mean()),
            "error_ml": float(error.abs().mean()),
        },
        "position": {
            "r": r_position,
            "interval": fisher_interval(r_position, n),
            "error_mm": float((of["position_found"] - of["position"]).abs().mean()),
        },
        "modality": {"right": right, "interval": wilson_interval(right, n)},
    }


def _errors(of: Mapping[str, Tensor]) -> dict[str, Any]:
    error = of["found"] - of["asked"]
    r = correlation(of["asked"], of["found"])
    return {
        "brains": len(error),
        "r": r,
        "interval": fisher_interval(r, len(error)),
        "bias_ml": float(error.mean()),
        "error_ml": float(error.abs().mean()),
    }


def _slope(ask: Ask, held: Request, swept: str, low: float, high: float, seed: int) -> dict[str, Any]:
    """How much of ventricle comes with a unit of what is swept, everything else held: of `SEEDS` noises the mean, and
    the least and the most of one."""
    values = torch.linspace(low, high, SWEEP)
    requests = [held | {swept: float(v)} for _ in range(SEEDS) for v in values]
    found = ask(requests, [seed + i // SWEEP for i in range(len(requests))])["found"]
    x = values.repeat(SEEDS) - values.mean()
    slopes = (found * x).reshape(SEEDS, -1).sum(1) / x[:SWEEP].square().sum()
    return {
        "low": low,
        "high": high,
        "noises": SEEDS,
        "ml_a_unit": float(slopes.mean()),
        "of_one_noise": (float(slopes.min()), float(slopes.max())),
        "r": correlation(x, found),
    }


def fisher_interval(r: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a correlation of n pairs: `tanh(atanh r -+ 1.96 / sqrt(n - 3))`. Source: Fisher 1921."""
    middle, half = math.atanh(max(-1 + 1e-12, min(r, 1 - 1e-12))), Z95 / math.sqrt(n - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    z2 = Z95**2 / n
    middle, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def draw_scatter(asked: Tensor, found: Tensor, path: Path, title: str, side: int = 360) -> None:
    """A point for each brain, what was asked for to the right, what was found upwards, and the line of equality."""
    low, high = float(torch.cat([asked, found]).min()), float(torch.cat([asked, found]).max())
    sheet = Image.new("L", (side, side + 28))
    draw = ImageDraw.Draw(sheet)
    scale = (side - 40) / max(high - low, 1e-6)

    def at(x: float, y: float) -> tuple[float, float]:
        return 20 + (x - low) * scale, side - 20 - (y - low) * scale

    draw.rectangle([*at(low, high), *at(high, low)], outline=90)
    draw.line([*at(low, low), *at(high, high)], fill=140)
    for x, y in zip(asked.tolist(), found.tolist(), strict=True):
        u, v = at(x, y)
        draw.ellipse([u - 2, v - 2, u + 2, v + 2], fill=230)
    draw.text((20, 4), f"{title}; {len(asked)} brains, {low:.0f} to {high:.0f}", fill=255)
    draw.text((20, side - 14), "to the right: asked for; upwards: measured", fill=255)
    draw.text((20, side + 10), NOTICE, fill=200)
    save_picture(sheet, path)


def _draw_ages(pipeline: Pipeline, seed: int, steps: int | None, guidance_scale: float | None, path: Path) -> None:
    """One noise at five ages, a row for each modality."""
    age = next(c for c in pipeline.unet.config.covariates if c.name == "age")
    ages = torch.linspace(age.low, age.high, 5).tolist() * len(MODALITIES)
    modality = [m for m in MODALITIES for _ in range(5)]
    images = pipeline.sampler(steps)(
        seed=[seed] * len(ages),
        indices=[0] * len(ages),
        cond={"age": ages, "modality": modality, "position": 14.0},
        guidance_scale=guidance_scale,
    )
    labels = [f"{m} {a:.0f} {age.unit}" for m, a in zip(modality, ages, strict=True)]
    save_grid(to_uint8(images.cpu()), path, columns=5, labels=labels)
