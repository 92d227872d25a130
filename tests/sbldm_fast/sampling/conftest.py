"""A small UNet, and CUDA graphs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling import loop, modes, source

from ..small import SHAPE, UNET, scheduler


@pytest.fixture(scope="module")
def unet() -> UNet2D:
    torch.manual_seed(1)
    model = UNet2D(UNET).eval()
    torch.nn.init.normal_(model.row_offsets, std=0.1)
    return model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FastSampler]:
    """Samplers with CUDA graphs on a CPU. A recording is the work itself, run again: like a replay it goes on with the
    tensors that were there when it was made, whatever the modules hold later."""

    def record(work: Any, reset: Any, device: Any, pool: Any) -> Any:
        work()  # a warm-up, as the real one does
        reset()
        return work

    def parse_any(mode: str, device: torch.device) -> modes.Mode:
        return modes.Mode(mode, None) if mode in modes.GRAPHS else modes.parse_mode(mode, device)

    monkeypatch.setattr(loop, "capture", record)
    monkeypatch.setattr(source, "parse_mode", parse_any)

    def graphed(model: Any, sched: Any = None, mode: str = "loop-graph", **arguments: Any) -> FastSampler:
        return FastSampler(model, sched or scheduler(), **({"shape": SHAPE, "steps": 3, "mode": mode} | arguments))

    return graphed
