"""What a UNet is told in training: the covariates of prepared slices, each dropped now and then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sbldm_fast.data.covariates import category
from sbldm_fast.errors import UserError
from sbldm_fast.models.covariates import Covariate

DROP_ALL, DROP_EACH = 0.1, 0.15  # how often a sample is told nothing, and otherwise how often one thing is left out
VOLUME_UNITS = ("ml", "l", "mm3", "cm3")  # of what a scaling of the image scales, too


def known_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The covariates of a row of the manifest, its modality among them where it is known."""
    modality = {} if row.get("modality") in (None, "unknown") else {"modality": row["modality"]}
    found = row.get("covariates")
    return {**modality, **(found if isinstance(found, dict) else {})}


def find_covariates(manifest: Mapping[str, Any], names: Sequence[str]) -> tuple[Covariate, ...]:
    """The covariates of those names as the training slices have them: their range or their values; unit and definition
    are the manifest's.

    Raises:
        ValueError: a name that the manifest does not have or that comes twice, or one of which the training slices have
            a single value or none.
    """
    described = manifest.get("covariates", {})
    rows = [known_of(row) for row in manifest["slices"] if row["split"] == "train"]
    found = []
    for name in names:
        if name not in described or names.count(name) > 1:
            allowed = ", ".join(sorted(described)) or "none: run prepare again"
            raise UserError(f"condition: got {name!r:.100}, allowed are different ones of {allowed}")
        seen: dict[str, Any] = {k: str(described[name][k]) for k in ("unit", "definition") if k in described[name]}
        values = [row[name] for row in rows if name in row]
        if "values" in described[name] or any(isinstance(v, str) for v in values):
            categories = sorted({category(v) for v in values})
            seen |= {"values": tuple(categories)}
            several = len(categories) > 1
        else:
            seen |= {"low": float(min(values, default=0.0)), "high": float(max(values, default=0.0))}
            several = seen["low"] < seen["high"]
        if not several:
            raise UserError(f"condition: got {name!r}, of which the training slices have {len(set(values))} values")
        found.append(Covariate(name, **seen))
    return tuple(found)


def refuse_mixtures(cutmix_prob: float) -> None:
    """Refuse CutMix, as `UserError`: a mixture of two slices has the covariates of neither."""
    if cutmix_prob:
        raise UserError(
            f"cutmix_prob: got {cutmix_prob}, allowed with a condition is 0: a mixture of two slices has the covariates"
            " of neither"
        )


def refuse_unknown(covariates: Sequence[Covariate], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse, as `UserError`, a covariate that none of the slices has."""
    nowhere = values_of(rows, covariates).isnan().all(0).tolist()
    if lacking := [c.name for c, none in zip(covariates, nowhere, strict=True) if none]:
        raise UserError(f"condition: {lacking[0]} is known of no training slice")


def values_of(rows: Sequence[Mapping[str, Any]], covariates: Sequence[Covariate]) -> Tensor:
    """The covariates of slices, float32 `[N, K]`, categories by their place, NaN where one is unknown."""

    def number(covariate: Covariate, value: Any) -> float:
        if covariate.values:
            return float(covariate.values.index(value)) if value in covariate.values else math.nan
        return float(value) if isinstance(value, (int, float)) else math.nan

    table = []
    for row in map(known_of, rows):
        found = [(c, row.get(c.name)) for c in covariates]
        table.append([number(c, category(v) if c.values and v is not None else v) for c, v in found])
    return torch.tensor(table, dtype=torch.float32).reshape(len(rows), len(covariates))


def scale_volumes(values: Tensor, areas: Tensor, covariates: Sequence[Covariate]) -> Tensor:
    """The covariates of augmented views `[N, K]`: a volume grows with the area of the slice, by the factors `areas`
    `[N]`; a flip, a turn and a shift change none."""
    volume = torch.tensor([c.unit in VOLUME_UNITS for c in covariates], device=values.device)
    return torch.where(volume, values * areas[:, None].to(values), values)


def drop(values: Tensor, draws: Tensor) -> Tensor:
    """Values `[N, K]` with some unknown, by uniform `draws` `[N, K + 1]`: all of a sample, or each for itself."""
    gone = (draws[:, :1] < DROP_ALL) | (draws[:, 1:] < DROP_EACH)
    return values.masked_fill(gone, math.nan)
