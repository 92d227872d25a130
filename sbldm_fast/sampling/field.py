"""The noise of a volume: one field along z, of which every slice reads its height, and neighbours much the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import draw

SHARED = 0.2  # of a slice's variance, what it has in common with all of its volume
LENGTH = 5.0  # mm: the rest of two slices correlates by exp(-(distance / LENGTH)^2 / 2)
NODE = 2.0  # mm between the independent noises that the rest is made of
REACH = 4 * LENGTH / math.sqrt(2)
FIRST = 2**20  # the sample number of the node at 0 mm; that of what is shared is 0


def draw_field(positions: Sequence[float], seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise `[D, *shape]` of slices at `positions`, mm: standard normal each, a function of seed and position
    alone."""
    weights, nodes = field_weights(positions)
    indices = torch.tensor([0, *(FIRST + node for node in nodes)])
    normals = draw(torch.stack([torch.full_like(indices, seed), indices], 1), shape, device)
    noise: Tensor = torch.tensordot(weights.to(device), normals, 1)
    return noise


def field_weights(positions: Sequence[float]) -> tuple[Tensor, range]:
    """How slices at `positions`, mm, mix independent normals: float32 `[D, 1 + J]` with rows of unit length, of the
    shared one and of the J nodes that are returned, which lie at multiples of NODE.

    Source: the mixed noise prior of Ge et al. 2023, arXiv:2305.10474, section 4.1, its shared part a Gaussian process.
    """
    z = torch.tensor(positions, dtype=torch.float64)
    nodes = range(math.floor((float(z.min()) - REACH) / NODE), math.ceil((float(z.max()) + REACH) / NODE) + 1)
    distance = z[:, None] - NODE * torch.tensor(list(nodes), dtype=torch.float64)
    w = torch.exp(-((distance / LENGTH) ** 2))  # whose product over the nodes falls by exp(-d^2 / (2 LENGTH^2))
    w = torch.where(distance.abs() <= REACH, w, 0.0)
    w = w / w.square().sum(1, keepdim=True).sqrt()
    shared = torch.full((len(z), 1), math.sqrt(SHARED), dtype=torch.float64)
    return torch.cat([shared, math.sqrt(1 - SHARED) * w], 1).float(), nodes
