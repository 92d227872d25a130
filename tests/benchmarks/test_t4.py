"""The model of a T4: rendered from the problems, right by hand, and held against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks.t4 import T4, Ceilings, errors, measured_ceilings, predict, roofline, step

ROOT = Path(__file__).parents[2]
ENV: dict[str, Any] = {"gpu": "a GPU"}


def test_roofline_is_rendered_from_the_problems() -> None:
    assert (ROOT / "benchmarks/ROOFLINE.md").read_text() == roofline()


def test_roofline_by_hand() -> None:
    # 16x64x128x128 in float16: 33.5 MB read, written and, as its groups are cut, read again: 100.7 MB at 220 to 250
    # GB/s
    line = next(line for line in roofline().splitlines() if "16x64x128x128/32 nchw float16" in line)
    assert line.endswith("| 100.66 | 201.33 | 2 | 403 to 458 | memory |")


def test_predictions_by_hand() -> None:
    on = Ceilings((100.0, 200.0), {"float32": 10.0, "float16": 40.0}, 0.5)
    assert predict(300, 4, 2, "float32", on) == (3.0, 1.5, "memory")
    assert predict(300, 40, 2, "float32", on) == (4.0, 4.0, "arithmetic")
    assert predict(300, 40, 2, "float16", on) == (3.0, 1.5, "memory")
    assert predict(0, 0, 2, "bfloat16", on) == (1.0, 1.0, "launches")


def test_a_step_is_bound_by_its_launches_and_later_by_arithmetic() -> None:
    small, work = step(1, torch.float16)
    assert small.slow >= work["launches"] * T4.launch
    assert small.bound == "launches"
    assert step(64, torch.float32)[0].bound == "arithmetic"
    assert step(64, torch.float32)[0].slow >= work["flops"] * 64 / 5e12


def test_the_models_error_is_of_the_machine_that_was_measured() -> None:
    ceiling = {"target": "kernels", "op": "ceilings", "env": ENV}
    rows: list[dict[str, Any]] = [
        ceiling | {"provider": p, "rate": r} for p, r in (("copy", 1e9), ("launch", 1e6), ("matmul float32", 1e12))
    ]
    assert measured_ceilings(rows[:2]) is None
    assert measured_ceilings(rows) == Ceilings((1e9, 1e9), {"float32": 1e12}, 1e-6)
    faster = [
        *rows,
        ceiling | {"provider": "convolution float32", "rate": 2e12},
        ceiling | {"provider": "matmul float16", "rate": 3e12},
    ]
    assert measured_ceilings(faster) == Ceilings((1e9, 1e9), {"float32": 2e12, "float16": 3e12}, 1e-6)
    op = {
        "target": "kernels",
        "op": "x",
        "shape": "1",
        "layout": "nchw",
        "dtype": "float32",
        "moved": 9e5,
        "again": 1e5,
        "flops": 1,
        "launches": 1,
        "provider": "ours",
        "median_s": 2e-3,
        "env": ENV,
    }
    (found,) = errors([*rows, op, op | {"provider": "eager"}])
    assert found.what == "x 1 nchw float32"
    assert (found.predicted_s, found.factor) == (pytest.approx(1e-3), pytest.approx(2.0))
    assert errors([op]) == []
    sampled = {
        "target": "sampling",
        "provider": "FastSampler eager float32",
        "preset": "paper",
        "batch": 1,
        "steps": 10,
        "dtype": "float32",
        "work": {},
        "median_s": 1.0,
        "env": ENV,
    }
    (found,) = errors([*rows, sampled])
    assert found.measured_s == pytest.approx(0.1)
    assert found.predicted_s >= 58e6 / 1e9, "at least every weight is read: 58 MB without those of time"
