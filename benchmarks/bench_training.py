"""pytest-benchmark over the training loops: preset demo, batch 4, one step, nothing that compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .harness import Case
from .suite_training import training_cases


def pytest_cases(device: torch.device) -> dict[str, dict[str, Case]]:
    return {"demo batch 4": training_cases("demo", 4, 1, device, compiled=False)}


def test_training(timed: Callable[[], None]) -> None:
    timed()
