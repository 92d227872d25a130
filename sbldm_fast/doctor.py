"""What this machine can do: versions, devices, the backend of each op and why, and a parity check of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbldm_fast.kernels import (
    ddim_step,
    diffuse,
    frequency_loss,
    group_norm_silu,
    mix_slices,
    philox_normal,
    solver_step,
    spectral_mse,
)
from sbldm_fast.kernels._backend import obstacle, resolve
from sbldm_fast.machine import default_device, environment, native_half
from sbldm_fast.sampling.modes import choose
from sbldm_fast.sampling.pipeline import FEW

TOLERANCE = 1e-5


def doctor() -> dict[str, Any]:
    """The environment, the backend of each op with its reason and parity error, and which mode `auto` takes here and
    why, before a sampler on CUDA times it beside `eager`."""
    device = default_device()
    checks = parity(device)
    return {
        **environment(),
        "device": str(device),
        "native_bf16": native_half(device) is torch.bfloat16,
        "backend": dict(zip(("name", "reason"), resolve(device), strict=True)),
        "triton": obstacle(device) or "runs here",
        "parity": checks,
        "auto": [
            dict(zip(("images", "steps", "mode", "reason"), (n, FEW, *choose(device, n, FEW)), strict=True))
            for n in (16, 1000)
        ],
        "ok": all(check["ok"] for check in checks.values()),
    }


def parity(device: torch.device) -> dict[str, dict[str, Any]]:
    """The largest error of each op's chosen backend on a small problem, against float64 or a known answer."""
    return {
        name: {"error": error, "ok": error <= TOLERANCE}
        for name, error in ((n, call()) for n, call in op_errors(device).items())
    }


def op_errors(device: torch.device) -> dict[str, Callable[[], float]]:
    """A function for each op that runs it on a small problem and gives its largest error, against float64 or a known
    answer."""
    x, m = torch.randn(2, 2, 64, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    w, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device)
    a, before = 0.5, 0.6
    z0 = (x.double() - (1 - a) ** 0.5 * m.double()) / a**0.5
    step: Tensor = before**0.5 * z0 + (1 - before) ** 0.5 * m.double()
    mse = (x.double() - m.double()).square().mean()

    def norm() -> Tensor:
        exact: Tensor = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 32, w.double(), b.double()))
        return group_norm_silu(x, 32, w, b).double() - exact

    def solver() -> Tensor:
        row = torch.tensor(
            [[a**-0.5, -((1 - a) ** 0.5) / a**0.5, before**0.5, 0, 0, (1 - before) ** 0.5]], device=device
        )
        out: Tensor = solver_step(x, m, row, torch.zeros(2, dtype=torch.int32, device=device)).double() - step
        return out

    def noised() -> Tensor:
        z_t, e = diffuse(x, torch.tensor([0, 0], device=device), torch.tensor([a], device=device), 0)
        out: Tensor = z_t.double() - a**0.5 * x.double() - (1 - a) ** 0.5 * e.double()
        return out

    def normals() -> Tensor:
        # Random123's known answer for counter 0, key 0, as uniforms
        u0, u1, u2, u3 = (((w >> 9) + 0.5) / 2**23 for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
        pairs = [(math.sqrt(-2 * math.log(a)), 2 * math.pi * (b - 0.5)) for a, b in ((u0, u1), (u2, u3))]
        known = torch.tensor([r * f(angle) for r, angle in pairs for f in (math.cos, math.sin)])
        return philox_normal((1, 4), 0, device=device)[0].cpu() - known

    def mixed() -> Tensor:
        weight = torch.stack([w, b, w - b])[None]
        below, own, above = weight.double()[0, ..., None, None]
        low, high = x.double()
        exact = torch.stack([low + own * low + above * high, high + own * high + below * low])
        difference: Tensor = mix_slices(x, weight, torch.zeros(2, dtype=torch.int32, device=device)).double() - exact
        return difference

    differences: dict[str, Callable[[], Tensor]] = {
        "group_norm_silu": norm,
        "ddim_step": lambda: ddim_step(x, m, a, before).double() - step,
        "solver_step": solver,
        "frequency_loss": lambda: frequency_loss(x, m).double() - mse,
        "spectral_mse": lambda: spectral_mse(x, m).double() / 256 - mse,
        "diffuse": noised,
        "philox_normal": normals,
        "mix_slices": mixed,
    }
    return {name: lambda call=call: float(call().abs().max()) for name, call in differences.items()}  # type: ignore[misc]
