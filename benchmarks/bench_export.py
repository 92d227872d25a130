"""pytest-benchmark over the exported graphs: preset demo, one image of ten steps, nothing that compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .harness import Case
from .providers import export_providers
from .setup import SamplingSetup


def pytest_cases(device: torch.device) -> dict[str, dict[str, Case]]:
    problem = SamplingSetup("demo", 10, 1, device)
    return {"demo 10 steps": {p.name: p.case(problem) for p in export_providers(device, compiled=False)}}


def test_export(timed: Callable[[], None]) -> None:
    timed()
