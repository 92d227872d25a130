"""A volume as one batch of slices through one loop: one field of noise, layers that mix neighbours, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sbldm_fast.models.slices import SLICE

from ..errors import TooLarge, UserError
from .field import draw_field
from .request import whole_number
from .sampler import FastSampler

POSITION = "position"  # the covariate: mm above z = 0 of ICBM 152
DISTANCE = 2.0  # mm between slices where none is asked for
OVERLAP = 16  # slices that two windows share at least, or half of a short one
EVEN = 0.01  # of a distance: how much distances may differ
FARTHEST = 10_000.0  # mm


def find_positions(
    covariates: Sequence[Any], slices: int | None, positions: Sequence[float] | Tensor | None
) -> list[float]:
    """Where the slices of a volume lie, mm from the bottom up: as asked for; else all over the range that the model
    knows, `slices` of them or one every 2 mm.

    Raises:
        ValueError: fewer than two, not rising, at different distances, or a model that knows no range and no number.
    """
    if positions is not None:
        try:
            given = torch.as_tensor(positions, dtype=torch.float64)
            found = [float(z) for z in (given if given.dim() == 1 else given.new_tensor(())).tolist()]
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"positions: got {positions!r:.100}, allowed are numbers, mm") from None
        if slices is not None and slices != len(found):
            raise UserError(f"slices: got {slices} and {len(found)} positions, allowed is one of them")
        return _checked(found)
    known = next((c for c in covariates if c.name == POSITION and c.low < c.high and not c.values), None)
    if slices is None and known is None:
        raise UserError("slices: got None, allowed for a model that knows no position is a number of slices")
    if known is None:
        count = whole_number("slices", slices, 2)
        return [DISTANCE * (i - (count - 1) / 2) for i in range(count)]
    if slices is None:
        slices = math.floor((known.high - known.low) / DISTANCE + 1e-6) + 1
    count = whole_number("slices", slices, 2)
    return [min(known.high, known.low + (known.high - known.low) * i / (count - 1)) for i in range(count)]


def _checked(positions: list[float]) -> list[float]:
    if len(positions) < 2:
        raise UserError(f"positions: got {len(positions)}, allowed are 2 or more: a volume of one slice is an image")
    if not all(abs(z) <= FARTHEST for z in positions):  # nor NaN
        raise UserError(f"positions: got {positions!r:.100}, allowed are -{FARTHEST:g} to {FARTHEST:g} mm")
    steps = [b - a for a, b in pairwise(positions)]
    if min(steps) <= 0:
        at = next(i for i, step in enumerate(steps) if step <= 0)
        raise UserError(
            f"positions: got {positions[at]:g} mm, then {positions[at + 1]:g} mm, allowed is from the bottom up, each"
            " once"
        )
    if max(steps) - min(steps) > EVEN * min(steps):
        raise UserError(
            f"positions: got distances of {min(steps):g} to {max(steps):g} mm, allowed is one distance without gaps"
        )
    return positions


def windows_of(count: int, window: int) -> list[int]:
    """Where windows of `window` slices begin that cover `count` slices and share at least OVERLAP with the next, or
    half of a short one."""
    if window >= count:
        return [0]
    shared = min(OVERLAP, window // 2)
    several = math.ceil((count - shared) / (window - shared))
    return [round(i * (count - window) / (several - 1)) for i in range(several)]


def sample_volume(
    sampler: FastSampler,
    positions: Sequence[float],
    seed: int,
    window: int | None,
    arguments: Mapping[str, Any],
    progress: Any = iter,
) -> Tensor:
    """The slices `[D, ...]` of a volume at `positions`, all at a time or in windows that go over into one another;
    `arguments` are those of the sampler's call, their `cond` a value for the volume or one for each slice."""
    model, count = sampler.source.network.model, len(positions)
    window = count if window is None else min(whole_number("window", window, 2), count)
    with sampler.at_work():
        if sampler.table.stochastic:
            raise UserError(
                "scheduler: got one with noise in its steps, which would be of each slice for itself; allowed for a"
                " volume is a deterministic one, such as UniPC, or DDIM with eta 0"
            )
    noise = draw_field(positions, seed, sampler.shape, sampler.device)
    config = getattr(model, "config", None)
    names = [c.name for c in getattr(config, "covariates", ())]
    if not isinstance(told := arguments.get("cond") or {}, Mapping):
        raise UserError(f"cond: got {type(told).__name__}, allowed is a mapping of {', '.join(names) or 'nothing'}")
    cond: dict[str, Any] = dict(told)
    for name, value, known in (
        (POSITION, list(positions), POSITION in names),
        (SLICE, range(count), getattr(config, "slice_mixing", False)),
    ):
        if name in cond:
            raise UserError(f"cond: got {name!r}, allowed for a volume are positions, which say it")
        if known:
            cond[name] = list(value)
    out: Tensor | None = None
    total = torch.zeros(count)
    for start in progress(windows_of(count, window)):
        part = slice(start, start + window)
        mine = {k: v[part] if _of_slices(v, count) else v for k, v in cond.items()}
        try:
            made = sampler(noise=noise[part], **{**arguments, "cond": mine or None}).cpu()
        except TooLarge as failure:
            told = str(failure).replace("give a batch size of", "give a window of")
            raise TooLarge(f"window: {told.removeprefix('n: ')}") from failure
        share = _shares(start, window, count)
        out = torch.zeros(count, *made.shape[1:]) if out is None else out
        out[part] += made * share.view(-1, *[1] * (made.dim() - 1))
        total[part] += share
    assert out is not None
    return out / total.view(-1, *[1] * (out.dim() - 1))


def _of_slices(value: Any, count: int) -> bool:
    several = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
    return several and len(value) == count


def _shares(start: int, window: int, count: int) -> Tensor:
    """How much each slice of a window counts beside another window: 1 in one that is alone there, less towards an end
    that is not the volume's."""
    at, all_of_it = torch.arange(1.0, window + 1), torch.full((window,), float(window))
    rise, fall = at if start else all_of_it, at.flip(0) if start + window < count else all_of_it
    return torch.minimum(rise, fall) / window
