"""Kernels of a step by name: what two runs of other lengths have in common is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import launches
from sbldm_fast.benchmarks.setup import SamplingSetup


def test_a_step_is_the_difference_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up profiler: a kernel that runs twice a step, one that runs once a run, and a range that is no kernel."""
    steps: list[int] = []

    def event(name: str, us: float, kind: str = "CUDA", annotation: bool = False) -> Any:
        time = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=kind), is_user_annotation=annotation, time_range=time
        )

    class Sampler:
        def __init__(self, *_: Any, steps: int, **__: Any) -> None:
            self.steps = steps

        def __call__(self, noise: torch.Tensor) -> None:
            steps.append(self.steps)

    class Profile:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def events(self) -> list[Any]:
            long = "x" * launches.NAME
            of_steps = [event("norm", 2.0), event("norm", 4.0), event(long + "a", 1.0), event(long + "b", 1.0)] * steps[
                -1
            ]
            return [
                *of_steps,
                event("copy of the noise", 9.0),
                event("norm", 1.0, "CPU"),
                event("range", 1.0, annotation=True),
            ]

    monkeypatch.setattr(launches, "FastSampler", Sampler)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = launches.kernels_of_a_step(SamplingSetup("demo", 1, 1, torch.device("cpu")), torch.float32)
    alike = {"launches": 2.0, "us": 2.0}  # names that differ where they are cut are counted together, none is lost
    kernels = {"norm": {"launches": 2.0, "us": 6.0}, "x" * launches.NAME: alike}
    assert found == {"launches": 4.0, "us": 8.0, "kernels": kernels}


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launches.main(["-o", str(tmp_path / "rows.jsonl")]) == 2
    assert "this PyTorch sees none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
