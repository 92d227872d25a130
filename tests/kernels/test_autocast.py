"""Under autocast every op gives what it gives without, bit by bit, on either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import (
    backend,
    ddim_step,
    diffuse,
    frequency_loss,
    group_norm_silu,
    mix_slices,
    philox_normal,
    solver_step,
    spectral_mse,
)

OPS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "group_norm_silu": lambda x, m: group_norm_silu(x, 2, residual=m),
    "ddim_step": lambda x, m: ddim_step(x, m, 0.5, 0.6),
    "solver_step": lambda x, m: solver_step(
        x, m, torch.ones(1, 6, device=x.device), torch.zeros(2, dtype=torch.int32, device=x.device)
    ),
    "frequency_loss": lambda x, m: frequency_loss(x, m, high_weight=0.5),
    "spectral_mse": spectral_mse,
    "diffuse": lambda x, _: diffuse(
        x, torch.zeros(2, dtype=torch.int64, device=x.device), torch.tensor([0.5], device=x.device), 1
    ),
    "mix_slices": lambda x, m: mix_slices(
        x, torch.ones(1, 3, 4, device=x.device), torch.zeros(2, dtype=torch.int32, device=x.device), residual=m
    ),
    "philox_normal": lambda x, _: philox_normal(x.shape, 1, device=x.device),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, m = torch.randn(2, 2, 4, 8, 8).to(device, dtype)
    with backend(name):
        plain = OPS[op](x, m)
        with torch.autocast(device.type, torch.bfloat16):
            cast = OPS[op](x, m)
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (plain, cast)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
