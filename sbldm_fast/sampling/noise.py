"""Which samples a call asks for, and the noise that each of them has."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.kernels import philox_normal

from ..errors import UserError
from .model import Cond, Named, named

# of a batch: x, seeds, conditioning (unconditional first), guidance
Parts = tuple[Tensor, Tensor, Named, Tensor | None]


class Request:
    """The samples that a call asks for, checked, to be made in batches; the arguments are those of `FastSampler`.

    Raises:
        ValueError: a wrong shape, count or number, conditionings that do not fit together, or guidance without them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        n: int | None,
        seed: int | Sequence[int],
        noise: Tensor | None,
        indices: Sequence[int] | None,
        cond: Cond,
        uncond: Cond,
        guidance_scale: float | Tensor | None,
        batch_size: int | None,
    ) -> None:
        self.shape, self.device, self.guidance = shape, device, None
        self.x, self.seeds = numbered(shape, device, n, seed, noise, indices)
        count = self.count = len(self.seeds)
        self.size = count if batch_size is None else whole("batch_size", batch_size, 1)
        conds = self.conds = named(cond)
        if uncond is not None and guidance_scale is None:
            raise UserError("uncond: got a value, allowed without guidance_scale is None: there is no second pass")
        others = self.others = named(uncond, "uncond") or {k: torch.zeros_like(v) for k, v in conds.items()}
        if bad := sorted(conds.keys() ^ others.keys()) or [
            k for k, v in conds.items() if others[k].shape != v.shape or len(v) != count
        ]:
            raise UserError(
                f"cond, uncond: got {bad[0] or 'tensors'} of another shape, allowed is one row for each of {count}"
                " samples, in both alike"
            )
        if guidance_scale is not None:
            if cond is None:
                raise UserError("guidance_scale: got a value without cond, allowed is None")
            guidance = torch.as_tensor(guidance_scale, dtype=torch.float32).reshape(-1)
            if not guidance.isfinite().all():
                raise UserError(f"guidance_scale: got {guidance_scale}, allowed are finite numbers")
            if len(guidance) not in (1, count):
                raise UserError(
                    f"guidance_scale: got {len(guidance)} values, allowed is one, or one for each of {count} samples"
                )
            self.guidance = guidance.expand(count)

    def batches(self, sigma: float) -> Iterator[tuple[range, Parts]]:
        """The numbers of each batch's samples and what they are made of; the last is padded to the size of the
        others."""
        for first in range(0, self.count, self.size):
            at = torch.arange(first, first + self.size).clamp(max=self.count - 1)  # padding is the last sample again

            def rows(v: Tensor, at: Tensor = at) -> Tensor:
                return v[at.to(v.device)].to(self.device)

            given = {k: rows(v) for k, v in self.conds.items()}
            if self.guidance is not None:
                given = {k: torch.cat([rows(self.others[k]), v]) for k, v in given.items()}
            x = draw(self.seeds[at], self.shape, self.device) if self.x is None else rows(self.x)
            guidance = None if self.guidance is None else self.guidance[at]
            yield (
                range(first, min(first + self.size, self.count)),
                (x * sigma, self.seeds[at].to(self.device), given, guidance),
            )


def numbered(
    shape: tuple[int, ...],
    device: torch.device,
    n: int | None,
    seed: int | Sequence[int],
    noise: Tensor | None,
    indices: Sequence[int] | None,
) -> tuple[Tensor | None, Tensor]:
    """The noise that was given, and seed and number of each sample, int64 `[n, 2]`, from the arguments of a call.

    Raises:
        ValueError: none of n, noise and indices, counts that differ, a wrong shape, or a number out of range.
    """
    given = None if noise is None else torch.as_tensor(noise)
    if given is not None and (not given.dim() or tuple(given.shape[1:]) != shape):
        raise UserError(f"noise: got shape {tuple(given.shape)}, allowed is [n, {', '.join(map(str, shape))}]")
    try:
        many = None if indices is None else list(indices)
    except TypeError:
        raise UserError(f"indices: got {indices!r}, allowed are whole numbers, one for each sample") from None
    asked = None if n is None else whole("n", n, 1)
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
    listed = [whole("seed", v) for v in given_seeds]
    numbers = [whole("indices", v) for v in many] if many is not None else list(range(count)) if one else [0] * count
    for name, values, top in (("seed", listed, 2**63), ("indices", numbers, 2**31)):
        if bad := [v for v in values if not 0 <= v < top]:
            raise UserError(f"{name}: got {bad[0]}, allowed is 0 to 2^{top.bit_length() - 1} - 1")
    if given is not None:
        given = given.to(device, torch.float32).contiguous()
    return given, torch.tensor([listed, numbers], dtype=torch.int64).T.contiguous()


def whole(name: str, value: Any, least: int | None = None) -> int:
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


def draw(seeds: Tensor, shape: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    """Noise of each sample, stream 0 to start with and i + 1 for step i. Neighbours of one seed are drawn in one
    launch."""
    parts, pairs, first = [], seeds.tolist(), 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != [pairs[i - 1][0], pairs[i - 1][1] + 1]:
            seed, number = pairs[first]
            parts.append(philox_normal((i - first, *shape), seed, first_index=number, stream=stream, device=device))
            first = i
    return torch.cat(parts)
