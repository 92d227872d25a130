"""Steps against error: more steps are nearer, and the front is the front."""

from __future__ import annotations

import pytest
from sbldm_fast.benchmarks import suite_solvers as module
from sbldm_fast.benchmarks.suite_solvers import bench_solvers
from sbldm_fast.benchmarks.table import pareto, solvers_table


def test_more_steps_are_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONVERGED", 30)
    rows = {r["provider"]: r for r in bench_solvers(batch=1, steps=(3, 10, 30), rounds=1)}
    assert len(rows) == 9
    assert rows["ddim 30"]["rms"] < 1e-6, "the converged images themselves"
    assert rows["ddim 10"]["rms"] < rows["ddim 3"]["rms"]
    assert all(r["median_s"] > 0 for r in rows.values())
    text = solvers_table(list(rows.values())).markdown()
    assert f"| ddim | 3 | {rows['ddim 3']['rms']:.4f} |" in text


def test_the_front_by_hand() -> None:
    points = {"a": (1, 3), "b": (2, 2), "c": (3, 2), "d": (2, 5), "e": (4, 1)}
    assert pareto([{"provider": k, "median_s": s, "rms": e} for k, (s, e) in points.items()]) == {"a", "b", "e"}


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="batch, steps, rounds: got 0"):
        next(bench_solvers(batch=0))
