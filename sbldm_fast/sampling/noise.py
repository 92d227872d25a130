"""Which samples a call asks for, and the noise that each of them has."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from sbldm_fast.kernels import philox_normal


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
    if noise is not None and tuple(noise.shape[1:]) != shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is [n, {', '.join(map(str, shape))}]")
    counts = [c for c in (n, None if noise is None else len(noise), None if indices is None else len(indices)) if c is not None]
    if not counts or min(counts) != max(counts):
        raise ValueError(f"n, noise, indices: got {counts or 'none of them'}, allowed is one of them, or the same number of samples")
    count = operator.index(counts[0])
    if count < 1:
        raise ValueError(f"n: got {count}, allowed is 1 or more")
    one = isinstance(seed, SupportsIndex) and not isinstance(seed, Tensor)
    listed = [operator.index(v) for v in (itertools.repeat(seed, count) if one else seed)]  # type: ignore[arg-type,union-attr]  # a number is one
    if len(listed) != count:
        raise ValueError(f"seed: got {len(listed)} seeds for {count} samples, allowed is one seed or one for each sample")
    numbers = [operator.index(v) for v in indices] if indices is not None else list(range(count)) if one else [0] * count
    for name, values, top in (("seed", listed, 2**63), ("indices", numbers, 2**31)):
        if bad := [v for v in values if not 0 <= v < top]:
            raise ValueError(f"{name}: got {bad[0]}, allowed is 0 to 2^{top.bit_length() - 1} - 1")
    given = None if noise is None else noise.to(device, torch.float32).contiguous()
    return given, torch.tensor([listed, numbers], dtype=torch.int64).T.contiguous()


def draw(seeds: Tensor, shape: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    """Noise of each sample, stream 0 to start with and i + 1 for step i. Neighbours of one seed are drawn in one launch."""
    parts, pairs, first = [], seeds.tolist(), 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != [pairs[i - 1][0], pairs[i - 1][1] + 1]:
            seed, number = pairs[first]
            parts.append(philox_normal((i - first, *shape), seed, first_index=number, stream=stream, device=device))
            first = i
    return torch.cat(parts)
