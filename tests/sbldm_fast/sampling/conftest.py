"""A small UNet, and CUDA graphs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps without the minute of compiling: a package holds the place of its exported program in a list, and
    PyTorch runs that. Tracing, names, files and buffers are the real ones."""
    programs: list[Any] = []

    def compile_and_package(program: Any, package_path: str, inductor_configs: Any) -> str:
        Path(package_path).write_text(str(len(programs)))
        programs.append(program)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path: programs[int(Path(path).read_text())].module()
    )


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
