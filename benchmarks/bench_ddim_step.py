"""ddim_step against the same formula in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from sbldm_fast.kernels import ddim_step
from torch import Tensor

from .suite_kernels import OpCase, Providers, on_device, ours


def eager(x: Tensor, m: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x0 = (x - (1 - a).sqrt() * m) / a.sqrt()
    return b.sqrt() * x0 + (1 - b).sqrt() * m


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for dtype in on_device(device):
        for N in (1, 16, *([8192] if large else [])):
            x, m = torch.randn(2, N, 8, 16, 16, device=device, dtype=dtype)
            a, b = torch.full((2,), 0.5, device=device)
            arguments = (x, m, a, b)
            compiled = torch.compile(eager, dynamic=False)
            providers: Providers = {"eager": partial(eager, *arguments), "torch.compile": partial(compiled, *arguments)}
            providers |= ours(partial(ddim_step, *arguments))
            yield OpCase(f"{N}x8x16x16", dtype, "nchw", 3 * x.numel() * x.element_size(), 6 * x.numel(), 1, providers)


def test_ddim_step(timed: Callable[[], None]) -> None:
    timed()
