"""The noise of a volume: one field along z, in which neighbouring slices begin from much the same.

A slice's noise is white, as its network expects it. Along z each of its cosine modes, of m half-cycles across the
slice, is made of a part that all slices of the volume share, the more the coarser the mode, and of a smooth process:

    x_m(z) = sqrt(s) shared + sqrt(1 - s) g(z),   s = 0.95 exp(-m / 8),   cov(g(y), g(z)) = exp(-(y - z)^2 / (2 L^2))

as the latents of made brains are alike along z once what all brains have in common at a height is taken out
(benchmarks/LOG.md 42). Source: the mixed noise prior of Ge et al. 2023, arXiv:2305.10474, section 4.1, where s is one
number and g is white.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import draw

SHARED, COARSE = 0.95, 8.0
LENGTH = 4.0  # mm: L
NODE = 2.0  # mm between the independent noises that g is made of
REACH = 4 * LENGTH / math.sqrt(2)
FIRST = 2**20  # the sample number of the node at 0 mm; that of what is shared is 0


def draw_field(positions: Sequence[float], seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise `[D, C, h, w]` of slices at `positions`, mm: standard normal each, a function of seed and position
    alone."""
    weights, nodes = node_weights(positions)
    indices = torch.tensor([0, *(FIRST + node for node in nodes)])
    normals = draw(torch.stack([torch.full_like(indices, seed), indices], 1), shape, device)
    return to_slices(normals[:1], torch.tensordot(weights.to(device), normals[1:], 1))


def node_weights(positions: Sequence[float]) -> tuple[Tensor, range]:
    """How g at `positions`, mm, is made of independent normals at multiples of NODE: float32 `[D, J]`, rows of unit
    length, and the J multiples."""
    z = torch.tensor(positions, dtype=torch.float64)
    nodes = range(math.floor((float(z.min()) - REACH) / NODE), math.ceil((float(z.max()) + REACH) / NODE) + 1)
    distance = z[:, None] - NODE * torch.tensor(list(nodes), dtype=torch.float64)
    # two such bells, multiplied and added up over the nodes, fall by exp(-d^2 / (2 LENGTH^2))
    w = torch.where(distance.abs() <= REACH, torch.exp(-((distance / LENGTH) ** 2)), 0.0)
    return (w / w.square().sum(1, keepdim=True).sqrt()).float(), nodes


def to_slices(shared: Tensor, own: Tensor) -> Tensor:
    """Noise `[..., h, w]` from modes: those that a volume's slices share and those of each, of any shapes that
    broadcast."""
    h, w = own.shape[-2:]
    side = max(h, w)
    down, across = (torch.arange(n, device=own.device) * (side / n) for n in (h, w))
    s = SHARED * torch.exp(-torch.hypot(down[:, None], across) / COARSE)
    modes = s.sqrt() * shared + (1 - s).sqrt() * own
    noise: Tensor = _cosines(h).to(own).mT @ modes @ _cosines(w).to(own)
    return noise


def _cosines(n: int) -> Tensor:
    """The orthonormal discrete cosine transform, `[n, n]` in float64: row m is a mode of m half-cycles."""
    m, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi * m * (i + 0.5) / n) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c
