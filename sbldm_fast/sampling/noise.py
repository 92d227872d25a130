"""The noise that each sample has, whatever batch it is in."""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.kernels import philox_normal


def draw(seeds: Tensor, shape: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    """Noise `[n, *shape]` of the samples whose seed and index are a row of `seeds` `[n, 2]`.

    Stream 0 is what a run starts with, i + 1 is of step i. Neighbours of one seed are drawn in one launch.
    """
    parts, pairs, first = [], seeds.tolist(), 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i] != [pairs[i - 1][0], pairs[i - 1][1] + 1]:
            seed, index = pairs[first]
            parts.append(philox_normal((i - first, *shape), seed, first_index=index, stream=stream, device=device))
            first = i
    return torch.cat(parts)
