"""philox_normal against torch.randn, whose numbers depend on the batch and the device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import torch
from sbldm_fast.kernels import philox_normal

from .kernels import Case, Providers, ours


def cases(device: torch.device, large: bool) -> Iterator[Case]:
    reference = importlib.import_module("sbldm_fast.kernels.philox_normal").philox_normal_reference
    for N in (1, 16, *([8192] if large else [])):
        shape = (N, 8, 16, 16)
        providers: Providers = {
            "reference": partial(reference, shape, 0, device=device),
            "eager": partial(torch.randn, shape, device=device),
        }
        providers["ours"] = ours(partial(philox_normal, shape, 0, device=device))
        numel = N * 2048
        yield Case("x".join(map(str, shape)), torch.float32, "nchw", 4 * numel, 60 * numel, 2, providers, own_stream=("eager",))
