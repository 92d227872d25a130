"""What the parts of an evaluation look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbldm_fast.data import Slices
from sbldm_fast.files import whole_file
from sbldm_fast.models.weights import read_tensors, write_tensors
from sbldm_fast.sampling.pipeline import Pipeline
from sbldm_fast.training.autoencoder import refuse_misfits
from sbldm_fast.training.conditions import values_of

from ..errors import UserError
from .features import DEFAULT

LEAST = 8


@dataclass(frozen=True)
class Settings:
    """What the figures are of: `n` samples of `seed` in `steps` (None: the pipeline's own), told apart by the features
    of `extractor` (from a file `weights`, if it needs one); `log` is the training's, for its curves."""

    n: int = 200
    seed: int = 0
    steps: int | None = None
    extractor: str = DEFAULT
    weights: str | None = None
    log: str | None = None


class Material:
    """What the parts look at, each made when the first asks for it.

    Raises:
        ValueError: no unseen slices, or fewer than samples; slices of another size than the pipeline's.
    """

    def __init__(self, pipeline: Pipeline, data: str | Path, out: Path, settings: Settings) -> None:
        if settings.n < LEAST:
            raise UserError(f"n: got {settings.n}, allowed is {LEAST} or more: fewer have no distribution")
        self.pipeline, self.data, self.out, self.settings = pipeline, Path(data), out, settings
        self.train = Slices(data, "train")
        self.held: list[Slices] = []  # the splits that no training has seen
        self.unseen_rows, self.unseen = self._draw_unseen()
        if len(self.train) < settings.n:
            raise UserError(f"n: got {settings.n}, allowed are as many as training slices in {data}, {len(self.train)}")
        refuse_misfits(pipeline.vae.config, self.train)

    def _draw_unseen(self) -> tuple[list[dict[str, Any]], Tensor]:
        """As many validation and test slices as samples, drawn without replacement."""
        rows: list[dict[str, Any]] = []
        found = []
        for split in ("val", "test"):
            try:
                held = Slices(self.data, split)
            except UserError as error:
                if "is empty" not in str(error):
                    raise
                continue
            rows += held.rows
            self.held.append(held)
            found.append((held, len(rows) - len(held)))
        if not found:
            raise UserError(f"{self.data} has neither validation nor test slices: nothing to compare with")
        n = self.settings.n
        if len(rows) < n:
            raise UserError(f"n: got {n}, allowed are as many as unseen slices in {self.data}, {len(rows)}")
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.settings.seed))[:n].sort().values
        images = [held[some[(some >= at) & (some < at + len(held))] - at] for held, at in found]
        return [rows[i] for i in some.tolist()], torch.cat(images)

    @cached_property
    def values(self) -> Tensor | None:
        """What is known of the unseen slices, `[n, K]`, NaN where unknown; None of a pipeline that cannot be asked."""
        covariates = self.pipeline.unet.config.covariates
        return values_of(self.unseen_rows, covariates) if covariates else None

    @cached_property
    def cond(self) -> dict[str, Any] | None:
        """The same by name, as a sampler takes it; held-out people may lie outside the trained range by a little."""
        if self.values is None:
            return None
        names = [c.name for c in self.pipeline.unet.config.covariates]
        return {k: [None if v.isnan() else v for v in self.values[:, i]] for i, k in enumerate(names)}

    @cached_property
    def samples(self) -> Tensor:
        """n images, kept in the folder."""
        path = self.out / "samples.safetensors"
        if not path.exists():
            s = self.settings
            made = self.pipeline.sample(
                s.n,
                seed=s.seed,
                steps=s.steps,
                mode="eager",
                cond=self.cond,
                extrapolate=self.cond is not None,
                batch_size=25,
            )
            with whole_file(path) as aside:
                write_tensors({"images": made.contiguous()}, aside)
        return read_tensors(path)["images"]

    @cached_property
    def places(self) -> Tensor:
        """The numbers of n training slices, which are as near to unseen ones as samples could be: any, or beside a
        pipeline that is asked for what the unseen ones are, for each one of its contrast and about its height."""
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        if self.cond is None:
            return torch.tensor(order[: self.settings.n])
        left, found = dict.fromkeys(order), []
        for wanted in self.unseen_rows:
            alike = [i for i in left if self.train.rows[i].get("modality") == wanted.get("modality")] or list(left)
            found.append(min(alike, key=lambda i: abs(height_of(self.train.rows[i]) - height_of(wanted))))
            del left[found[-1]]
        return torch.tensor(found)

    @cached_property
    def real_train(self) -> Tensor:
        """The training slices of `places`."""
        return self.train[self.places]

    def groups(self, who: str) -> Tensor | None:
        """By subject, of the images that are of subjects or were asked for as these are."""
        if who == "samples" and self.cond is None:
            return None
        rows = [self.train.rows[i] for i in self.places.tolist()] if who == "training" else self.unseen_rows
        subjects = [row["subject"] for row in rows]
        return torch.tensor([subjects.index(s) for s in subjects])

    @cached_property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and logvar of the unseen slices, unscaled."""
        device = next(self.pipeline.vae.parameters()).device
        with torch.no_grad():
            found = [self.pipeline.vae.encode(x.to(device)) for x in self.unseen.split(50)]
        return torch.cat([q.mean.cpu() for q in found]), torch.cat([q.logvar.cpu() for q in found])

    @cached_property
    def reconstructions(self) -> Tensor:
        """What the autoencoder makes of the unseen slices."""
        device = next(self.pipeline.vae.parameters()).device
        with torch.no_grad():
            return torch.cat([self.pipeline.vae.decode(z.to(device)).cpu() for z in self.posterior[0].split(50)])

    def note(self, what: str) -> str:
        """What stands below a figure."""
        return f"{what}; seed {self.settings.seed}"


def height_of(row: dict[str, Any]) -> float:
    """Of a slice in mm; 0 where it is unknown."""
    found = row.get("covariates", {}).get("position", 0.0)
    return float(found) if isinstance(found, (int, float)) else 0.0


def read_stages(log: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a training log by stage.

    Raises:
        ValueError: no file of such rows, or a stage without a loss.
    """
    try:
        rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
        # of a value that was not finite the log has null
        rows = [{k: v for k, v in row.items() if v is not None} for row in rows if row["step"] is not None]
        stages = {name: [r for r in rows if r["stage"] == name] for name in dict.fromkeys(r["stage"] for r in rows)}
        lacking = [name for name, of in stages.items() if not any("loss" in r for r in of)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{log} is no training log: {error}") from None
    if lacking or not stages:
        raise UserError(f"{log} is no training log: it has no loss{f' of {lacking[0]}' if lacking else ''}")
    return stages


Part = Callable[[Material], dict[str, Any]]
