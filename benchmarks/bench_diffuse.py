"""diffuse, with CutMix, against noise, gather, mixing and target in PyTorch, with PyTorch's own random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from sbldm_fast.kernels import diffuse
from torch import Tensor

from .suite_kernels import OpCase, Providers, on_device, ours


def eager(z0: Tensor, t: Tensor, bars: Tensor) -> tuple[Tensor, Tensor]:
    N, _, H, W = z0.shape
    e = torch.randn_like(z0)
    u = torch.rand(4, N, device=z0.device)
    side = u[1].sqrt()
    inside = (u[0] < 0.25)[:, None, None]
    for length, centre, shape in ((H, u[2], (1, H, 1)), (W, u[3], (1, 1, W))):
        size = (length * side).floor()
        start = (length * centre).floor() - (size / 2).floor()
        at = torch.arange(length, device=z0.device).reshape(shape)
        inside = inside & (at >= start[:, None, None]) & (at < (start + size)[:, None, None])
    e, z = (torch.where(inside[:, None], v.roll(-1, 0), v) for v in (e, z0))
    a = bars[t][:, None, None, None]
    return (a.sqrt() * z + (1 - a).sqrt() * e).to(z0.dtype), e


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    key = torch.zeros(2, dtype=torch.int64, device=device)
    bars = torch.linspace(0.999, 0.01, 1000, device=device)
    for dtype in on_device(device):
        for N in (16, *([8192] if large else [])):
            z0, t = (
                torch.randn(N, 8, 16, 16, device=device, dtype=dtype),
                torch.zeros(N, dtype=torch.int64, device=device),
            )
            providers: Providers = {"eager": partial(eager, z0, t, bars)}
            providers["torch.compile"] = partial(torch.compile(eager, dynamic=False), z0, t, bars)
            providers |= ours(partial(diffuse, z0, t, bars, key[:1], stream=key[1:], cutmix_prob=0.25))
            yield OpCase(
                f"{N}x8x16x16",
                dtype,
                "nchw",
                3 * z0.numel() * z0.element_size(),
                80 * z0.numel(),
                2,
                providers,
                own_stream=("eager", "torch.compile"),
            )


def test_diffuse(timed: Callable[[], None]) -> None:
    timed()
