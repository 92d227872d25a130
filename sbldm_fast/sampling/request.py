"""Which samples a call asks for, checked and cut into batches."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypedDict

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.models.slices import SLICE

from ..errors import UserError
from .model import Cond, TensorDict, read_cond, reads_condition
from .noise import draw


class Arguments(TypedDict, total=False):
    """The keyword arguments of a call of `FastSampler`, which says what they are."""

    seed: int | Sequence[int]
    noise: Tensor | None
    indices: Sequence[int] | None
    cond: Cond
    uncond: Cond
    guidance_scale: float | Tensor | None
    guidance_interval: tuple[float, float] | None
    extrapolate: bool
    batch_size: int | None


@dataclass(frozen=True)
class Batch:
    """What one batch is made of.

    Attributes:
        places: which of the call's samples these are; rows beyond them are padding.
        x: `[N, *shape]`.
        seeds: int64 `[N, 2]`, seed and index of each sample's noise.
        cond: tensors by name, `[N, ...]`; under guidance `[2 N, ...]`, the unconditional half first.
        guidance: float32 `[N]`, or None.
        interval: the timesteps, lowest and highest, between which there is guidance; None: at all.
    """

    places: range
    x: Tensor
    seeds: Tensor
    cond: TensorDict
    guidance: Tensor | None
    interval: tuple[float, float] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a loop is made for: the number of samples, whether they are guided, and what they are conditioned on."""
        cond = [(name, tuple(v.shape), v.dtype) for name, v in self.cond.items()]
        return len(self.x), self.guidance is not None, self.interval is not None, *cond

    def guides(self, t: float) -> bool:
        """Whether the guidance is another than 1 at a timestep."""
        return self.interval is None or self.interval[0] <= t <= self.interval[1]

    def first(self, n: int) -> Batch:
        """The batch of the first n samples."""
        rows = n if self.guidance is None else 2 * n
        cond = {name: value[:rows] for name, value in self.cond.items()}
        guidance = None if self.guidance is None else self.guidance[:n]
        return Batch(self.places[:n], self.x[:n], self.seeds[:n], cond, guidance, self.interval)


class SampleRequest:
    """The samples that a call asks for, checked, to be made in batches.

    Raises:
        ValueError: a wrong shape, count or index, conditionings that do not fit together, or guidance without them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        n: int | None = None,
        *,
        model: object = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        indices: Sequence[int] | None = None,
        cond: Cond = None,
        uncond: Cond = None,
        guidance_scale: float | Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        extrapolate: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.shape, self.device, self.guidance = shape, device, None
        self.x, self.seeds = seeds_and_noise(shape, device, n, seed, noise, indices)
        count = self.count = len(self.seeds)
        self.size = count if batch_size is None else whole_number("batch_size", batch_size, 1)
        conds = self.cond = read_cond(model, cond, count, extrapolate=extrapolate)
        if uncond is not None and guidance_scale is None:
            raise UserError("uncond: got a value, allowed without guidance_scale is None: there is no second pass")
        # of covariates everything is unknown, elsewhere it is all zeros
        known = uncond is not None or reads_condition(model)
        others = read_cond(model, uncond, count, extrapolate=extrapolate, argument="uncond") if known else {}
        if uncond is None:
            others = {k: others.get(k, torch.zeros_like(v)) for k, v in conds.items()}
        if SLICE in conds and reads_condition(model):
            others[SLICE] = self._numbers_apart(conds[SLICE])
        self.uncond = others
        unlike = sorted(conds.keys() ^ others.keys())
        unlike = unlike or [k for k, v in conds.items() if others[k].shape != v.shape or len(v) != count]
        if unlike:
            raise UserError(
                f"cond, uncond: got {unlike[0] or 'tensors'} of another shape, allowed is one row for each of {count}"
                " samples, in both alike"
            )
        if guidance_scale is not None:
            if (folded := getattr(getattr(model, "config", None), "distilled_guidance", 1.0)) != 1:
                raise UserError(
                    f"guidance_scale: got {guidance_scale}, allowed is None: this network was distilled with guidance"
                    f" {folded:g} folded in"
                )
            if cond is None:
                raise UserError("guidance_scale: got a value without cond, allowed is None")
            self.guidance = self._guidance(guidance_scale)
        self.interval = _interval(guidance_interval, self.guidance)

    def _numbers_apart(self, numbers: Tensor) -> Tensor:
        """The numbers of the same slices for the unconditional pass, which no number of the conditional one follows on.

        Raises:
            ValueError: a batch would end within a volume.
        """
        follows = (numbers[1:] == numbers[:-1] + 1).tolist()
        if any(follows[self.size - 1 :: self.size]):
            raise UserError(
                f"batch_size: got {self.size}, allowed with cond[{SLICE!r}] are batches that end with a volume, such as"
                f" all {self.count} at a time; Pipeline.sample_volume has windows"
            )
        known = numbers[numbers.isfinite()]
        return numbers - (float(known.max() - known.min()) + 2 if len(known) else 0.0)

    def _guidance(self, guidance_scale: float | Tensor) -> Tensor:
        try:
            guidance = torch.as_tensor(guidance_scale, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"guidance_scale: got {guidance_scale!r:.100}, allowed are numbers") from None
        if not guidance.isfinite().all():
            raise UserError(f"guidance_scale: got {guidance_scale}, allowed are finite numbers")
        if len(guidance) not in (1, self.count):
            raise UserError(
                f"guidance_scale: got {len(guidance)} values, allowed is one, or one for each of {self.count} samples"
            )
        return guidance.expand(self.count)

    def refuse_interval_without(self, timesteps: Sequence[float]) -> None:
        """Refuse, as `UserError`, an interval of guidance in which none of the run's timesteps lies: nothing would be
        guided."""
        if self.interval is not None and not any(self.interval[0] <= t <= self.interval[1] for t in timesteps):
            low, high = self.interval
            raise UserError(
                f"guidance_interval: got {low:g} to {high:g}, allowed is one with timesteps of this run, which are"
                f" {min(timesteps):g} to {max(timesteps):g}"
            )

    def batches(self) -> Iterator[Batch]:
        """Each batch, its x of unit variance; the last is padded to the size of the others."""
        for first in range(0, self.count, self.size):
            at = torch.arange(first, first + self.size).clamp(max=self.count - 1)  # padding is the last sample again

            def rows(v: Tensor, at: Tensor = at) -> Tensor:
                return v[at.to(v.device)].to(self.device)

            cond = {k: rows(v) for k, v in self.cond.items()}
            if self.guidance is not None:
                cond = {k: torch.cat([rows(self.uncond[k]), v]) for k, v in cond.items()}
            yield Batch(
                places=range(first, min(first + self.size, self.count)),
                x=draw(self.seeds[at], self.shape, self.device) if self.x is None else rows(self.x),
                seeds=self.seeds[at].to(self.device),
                cond=cond,
                guidance=None if self.guidance is None else self.guidance[at],
                interval=self.interval,
            )


def _interval(interval: tuple[float, float] | None, guidance: Tensor | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    try:
        low, high = (math.nan,) * 2 if isinstance(interval, str) else (float(t) for t in interval)
    except (TypeError, ValueError):
        raise UserError(f"guidance_interval: got {interval!r:.100}, allowed are two timesteps") from None
    if guidance is None:
        raise UserError("guidance_interval: got a value, allowed without guidance_scale is None")
    if not low <= high:
        raise UserError(f"guidance_interval: got {low:g} to {high:g}, allowed is a lower timestep, then a higher one")
    return low, high


def seeds_and_noise(
    shape: tuple[int, ...],
    device: torch.device,
    n: int | None,
    seed: int | Sequence[int],
    noise: Tensor | None,
    indices: Sequence[int] | None,
) -> tuple[Tensor | None, Tensor]:
    """The noise that was given, and seed and index of each sample, int64 `[n, 2]`, from the arguments of a call.

    Raises:
        ValueError: none of n, noise and indices, counts that differ, a wrong shape, or a seed or an index out of range.
    """
    given = None if noise is None else torch.as_tensor(noise)
    if given is not None and (not given.dim() or tuple(given.shape[1:]) != shape):
        raise UserError(f"noise: got shape {tuple(given.shape)}, allowed is [n, {', '.join(map(str, shape))}]")
    try:
        many = None if indices is None else list(indices)
    except TypeError:
        raise UserError(f"indices: got {indices!r}, allowed are whole numbers, one for each sample") from None
    asked = None if n is None else whole_number("n", n, 1)
    counts = [
        c for c in (asked, None if given is None else len(given), None if many is None else len(many)) if c is not None
    ]
    if not counts or min(counts) != max(counts):
        raise UserError(
            f"n, noise, indices: got {counts or 'none of them'}, allowed is one of them, or the same number of samples"
        )
    count = counts[0]
    if count < 1:
        raise UserError(f"n: got {count}, allowed is 1 or more")
    one = isinstance(seed, SupportsIndex) and not isinstance(seed, (Tensor, np.ndarray))
    try:
        given_seeds: list[Any] = [seed] * count if one else list(seed)  # type: ignore[arg-type]  # a number is one
    except TypeError:
        raise UserError(f"seed: got {seed!r}, allowed is a whole number, or one for each sample") from None
    if len(given_seeds) != count:
        raise UserError(
            f"seed: got {len(given_seeds)} seeds for {count} samples, allowed is one seed or one for each sample"
        )
    listed = [whole_number("seed", v) for v in given_seeds]
    drawn = (
        [whole_number("indices", v) for v in many] if many is not None else list(range(count)) if one else [0] * count
    )
    for name, values, top in (("seed", listed, 2**63), ("indices", drawn, 2**31)):
        if bad := [v for v in values if not 0 <= v < top]:
            raise UserError(f"{name}: got {bad[0]}, allowed is 0 to 2^{top.bit_length() - 1} - 1")
    if given is not None:
        given = given.to(device, torch.float32).contiguous()
    return given, torch.tensor([listed, drawn], dtype=torch.int64).T.contiguous()


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any kind, NumPy's and PyTorch's among them, as Python's.

    Raises:
        ValueError: it is none, or below `least`.
    """
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name}: got {value!r}, allowed is a whole number")
    if least is not None and number < least:
        raise UserError(f"{name}: got {number}, allowed is {least} or more")
    return number
