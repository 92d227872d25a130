"""pytest-benchmark over the exported graphs: preset demo, one image of ten steps, nothing that compiles."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .export import export_cases
from .harness import Case
from .providers import Problem

folder = tempfile.TemporaryDirectory()  # as long as the session: sessions of ONNX Runtime read from it


def pytest_cases(device: torch.device) -> dict[str, dict[str, Case]]:
    return {"demo 10 steps": export_cases(Problem("demo", 10, 1, device), Path(folder.name), compiled=False)}


def test_export(timed: Callable[[], None]) -> None:
    timed()
