"""What a step does on CUDA, counted on meta tensors: nothing waits, nothing is sent, and no operator has crept in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sbldm_fast.benchmarks.counts import count, counted


@pytest.mark.parametrize("batch", [1, 16])
def test_a_step_waits_for_nothing(batch: int) -> None:
    step, decode = count(batch=batch)
    for counts in (step, decode):
        assert not counts.waits
        assert counts.transfers == 0
    assert step.launches["solver_step"] == 1
    assert step.launches["group_norm_silu"] == 41
    assert step.launches.total() <= 160
    assert step.bytes > 2 * 14.7e6, "at least every weight is read"


def test_what_ci_gates_is_what_is_committed() -> None:
    """Launches, graph nodes, bytes and operations: a change of one is a change of this file, and shows in its diff."""
    assert json.loads((Path(__file__).parents[2] / "benchmarks/counts.json").read_text()) == counted()


def test_operations_by_hand() -> None:
    # the first convolution, 8 to 64 channels, 3x3, of 16x16 pixels: 2 x 8 x 64 x 9 x 256
    step = count()[0]
    assert 2 * 8 * 64 * 9 * 256 in [flops for _, flops in step.work]
    assert count(batch=16)[0].flops == 16 * step.flops


def test_a_row_by_the_counter_is_one_launch_more() -> None:
    fixed, counted = count()[0], count(counter_rows=True)[0]
    assert counted.launches - fixed.launches == {"index_select": 1}
    assert not counted.waits


def test_a_wait_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import sbldm_fast.benchmarks.record as module

    real = module.predictor

    def waiting(model: object) -> object:
        predict = real(model)  # type: ignore[arg-type]  # only passed on
        return lambda x, row, cond: predict(x, row, cond) * float(torch.ones(1).sum())

    monkeypatch.setattr(module, "predictor", waiting)
    assert count()[0].waits == {"_local_scalar_dense": 1}
