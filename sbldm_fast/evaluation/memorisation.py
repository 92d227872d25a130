"""Are samples copies? The nearest training slice of each, by pixels and by the autoencoder's latents.

    d(a, b) = sqrt(mean (a - b)^2)

What near means is told by slices that the model has not seen: a copy is much nearer to a training slice than those are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.images import save_grid, to_uint8
from sbldm_fast.models import AutoencoderKL
from sbldm_fast.sampling.pipeline import Pipeline
from sbldm_fast.training.conditions import values_of

from ..errors import UserError

CHUNK = 256  # slices at a time
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9}
REPORT, PICTURE = "memorisation.json", "neighbours.png"
NOTICE_BESIDE = "first rows synthetic, below training slices; not for diagnosis"
COLUMNS, TILE = 16, 64  # images beside one another, pixels of an image in the picture


@dataclass(frozen=True)
class Neighbours:
    """Of each image the number of the nearest slice, int64 `[N]`, and its distance, float32 `[N]`."""

    index: Tensor
    distance: Tensor


@torch.no_grad()
def nearest(images: Tensor, slices: Slices, vae: AutoencoderKL | None = None, progress: bool = False) -> Neighbours:
    """The nearest of `slices` to each of `images` `[N, 1, S, S]`: by pixels, or with `vae` by posterior means, in units
    of their std."""

    def features(x: Tensor) -> Tensor:
        if vae is None:
            return x.flatten(1)
        device = next(vae.parameters()).device
        return vae.encode(x.to(device)).mean.flatten(1).cpu() * vae.config.scaling_factor

    wanted = torch.cat([features(x) for x in images.cpu().float().split(CHUNK)])
    best = torch.full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64)
    for chunk in tqdm(torch.arange(len(slices)).split(CHUNK), "neighbours", unit="chunk", disable=not progress):
        other = features(slices[chunk])
        distance, at = (torch.cdist(wanted, other) / wanted.shape[1] ** 0.5).min(1)
        index = torch.where(distance < best, chunk[at], index)
        best = torch.minimum(distance, best)
    return Neighbours(index, best)


def memorisation(
    pipeline: Pipeline,
    data: str | Path,
    out: str | Path,
    *,
    n: int = 64,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare `n` samples with the training split; write `neighbours.png` and `memorisation.json` to the folder `out`;
    return its content.

    The picture has three rows for each row of samples: samples, nearest by pixels, nearest by latents. The numbers are
    quantiles of the distance to the nearest training slice: of the samples, and of validation and test slices, which no
    training has seen. Of a conditional pipeline also of `asked`, samples under the conditions of n training slices: who
    knows all that the manifest says of a slice comes nearest to it.

    Raises:
        ValueError: as `Slices`; a prepared folder without validation and test slices; a folder `out` with other files.
    """
    there = sorted(p.name for p in Path(out).glob("*"))
    lost = next((name for name in there if name not in (REPORT, PICTURE)), None)
    if there and (lost or REPORT not in there or "samples" not in read_json(Path(out) / REPORT)):
        raise UserError(
            f"{out} holds {lost or there[0]}, which would be lost; allowed is a new folder or one that evaluate wrote"
        )
    train = Slices(data, "train")
    unseen = []
    for split in ("val", "test"):
        try:
            held_out = Slices(data, split)
        except ValueError:
            continue
        unseen.append(held_out[torch.linspace(0, len(held_out) - 1, min(n, len(held_out))).long()])
    if not unseen:
        raise UserError(f"{data} has neither validation nor test slices: nothing tells how near is near")
    steps = pipeline.default_steps() if steps is None else steps
    images = pipeline.sample(n, seed=seed, steps=steps).cpu()
    report: dict[str, Any] = {"samples": n, "seed": seed, "steps": steps, "training_slices": len(train)}
    asked = _ask_for_slices(pipeline, train, n, seed, steps)
    rows = [images]
    held = torch.cat(unseen)
    sets = {"samples": images, "unseen": held} | ({} if asked is None else {"asked": asked})
    for name, vae in (("pixels", None), ("latents", pipeline.vae)):
        # all at once: the training slices are encoded for all of them
        found = nearest(torch.cat(list(sets.values())), train, vae, progress)
        distance = dict(zip(sets, found.distance.split([len(of) for of in sets.values()]), strict=True))
        # a sample nearer than all but one in a hundred of the unseen slices is worth a look
        limit = float(distance["unseen"].quantile(0.01))
        report[name] = {who: _quantiles(distance[who]) for who in sets}
        for who in (w for w in sets if w != "unseen"):
            report[name][f"{who}_nearer_than_unseen_p1"] = int((distance[who] < limit).sum())
        rows.append(train[found.index[:n]])
    with whole_folder(out) as folder:
        write_json(folder / REPORT, report)
        _draw_rows(rows, folder / PICTURE)
    return report


def _draw_rows(rows: list[Tensor], path: Path) -> None:
    """A row of samples, below it the nearest slices by pixels and by latents, then the next samples."""
    small = [torch.nn.functional.interpolate(r.float(), size=(TILE, TILE), mode="area") for r in rows]
    # whole rows, so that the last samples too have their slices below them
    small = [torch.nn.functional.pad(r, (0, 0, 0, 0, 0, 0, 0, -len(r) % COLUMNS), value=-1.0) for r in small]
    tiles = [part for group in zip(*(r.split(COLUMNS) for r in small), strict=True) for part in group]
    save_grid(to_uint8(torch.cat(tiles)), path, NOTICE_BESIDE, COLUMNS)


def _ask_for_slices(pipeline: Pipeline, train: Slices, n: int, seed: int, steps: int | None) -> Tensor | None:
    """Samples under the conditions of n training slices; None of a pipeline that cannot be asked."""
    covariates = pipeline.unet.config.covariates
    if not covariates:
        return None
    some = torch.linspace(0, len(train) - 1, n).long().tolist()
    told = values_of([train.rows[i] for i in some], covariates)
    cond = {c.name: [None if v.isnan() else v for v in told[:, k]] for k, c in enumerate(covariates)}
    return pipeline.sample(n, seed=seed, steps=steps, cond=cond, extrapolate=True).cpu()


def _quantiles(distance: Tensor) -> dict[str, float]:
    return {name: round(float(distance.quantile(q)), 4) for name, q in QUANTILES.items()}
