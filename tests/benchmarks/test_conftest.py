"""pytest-benchmark over the suites' cases, as a user runs it: stored, then compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_runs_are_stored_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="the cases are timed by pytest-benchmark")

    def run(*arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "benchmarks/bench_ddim_step.py",
            "-k",
            "16x8 and not compile",
        ]
        quick = ["--benchmark-max-time=0.05", "--benchmark-min-rounds=2", f"--benchmark-storage={tmp_path}", *arguments]
        # pytest-benchmark times nothing where it sees xdist's variables
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
        done = subprocess.run([*command, *quick], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
        assert done.returncode == 0, done.stdout
        return done.stdout

    out = run("--benchmark-save=before")
    assert "3 passed, 1 skipped" in out
    assert "ours: Triton has no cpu target" in out
    out = run("--benchmark-compare")
    assert "test_ddim_step[16x8x16x16 nchw float32 eager] (0001_before)" in out
    assert "test_ddim_step[16x8x16x16 nchw float32 reference] (NOW)" in out


def test_a_case_without_parity_is_not_timed(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="the cases are timed by pytest-benchmark")
    wrong = tmp_path / "bench_wrong.py"
    wrong.write_text("""
import torch
from sbldm_fast.benchmarks.harness import Case

pytest_plugins = ["sbldm_fast.benchmarks.conftest"]


def pytest_cases(device):
    right = Case(lambda: lambda: torch.ones(2), "right", 0.0)
    return {"x": {"right": right, "wrong": Case(lambda: lambda: torch.zeros(2), "right", 0.1)}}


def test_x(timed):
    timed()
""")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "sbldm_fast.benchmarks.conftest",
        str(wrong),
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--benchmark-max-time=0.05"], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "wrong: differs from right by 1.0e+00, allowed is 1.0e-01" in done.stdout
