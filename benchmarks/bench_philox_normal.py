"""philox_normal against torch.randn, whose numbers depend on the batch and the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from sbldm_fast.kernels import philox_normal

from .suite_kernels import OpCase, Providers, ours


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for N in (1, 16, *([8192] if large else [])):
        shape = (N, 8, 16, 16)
        providers: Providers = {"eager": partial(torch.randn, shape, device=device)}
        providers |= ours(partial(philox_normal, shape, 0, device=device))
        numel = N * 2048
        yield OpCase(
            "x".join(map(str, shape)), torch.float32, "nchw", 4 * numel, 60 * numel, 2, providers, own_stream=("eager",)
        )


def test_philox_normal(timed: Callable[[], None]) -> None:
    timed()
