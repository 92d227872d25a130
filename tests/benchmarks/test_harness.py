"""The harness: order, warm-up, parity, failures, and what is remarked on a figure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks.harness import Absent, Case, Timing, failures, host, interrupted, measure, relative
from sbldm_fast.benchmarks.timing import CAPTURED, bundle_calls, cache_bytes, summary, time_in_turns, turns

CPU = torch.device("cpu")


def case(value: float = 1.0, reference: str | None = "a", tolerance: float = 1e-3, baseline: str | None = None) -> Case:
    return Case(lambda: lambda: torch.tensor([value]), reference, tolerance, baseline)


def run(cases: dict[str, Case], **options: Any) -> dict[str, dict[str, Any]]:
    timing = Timing(**({"rounds": 2} | options))
    return {row["provider"]: row for row in measure(cases, timing, base="a", device=CPU)}


def test_every_other_round_runs_backwards() -> None:
    assert "".join(turns("abc", 3)) == "abccbaabc"
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    assert [len(v) for v in time_in_turns(calls, 3, CPU).values()] == [3, 3]
    assert "".join(order) == "abbaab"


def test_summary_by_hand() -> None:
    s = summary([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (s["median_s"], s["p10_s"], s["p90_s"], s["iqr_s"], s["n"]) == (
        3.0,
        pytest.approx(1.4),
        pytest.approx(4.6),
        2.0,
        5,
    )
    assert s["raw_s"] == [3.0, 1.0, 2.0, 5.0, 4.0]


def test_a_row_is_complete() -> None:
    row = run({"a": case()}, rounds=3)["a"]
    assert row["n"] == len(row["raw_s"]) == 3
    assert row["parity"] == {
        "against": "a",
        "error": 0.0,
        "allowed": 1e-3,
        "ok": True,
        "sha256": row["parity"]["sha256"],
    }
    assert len(row["parity"]["sha256"]) == 16
    assert row["speedup"] == {"over": "a", "factor": 1.0}
    assert row["first_call_s"] >= row["compile_s"] >= 0
    assert row["peak_bytes"] is None, "this process is everybody's"
    json.dumps(row)


def test_no_parity_no_speedup() -> None:
    rows = run(
        {"a": case(), "near": case(1.0005), "far": case(1.002), "nan": case(math.nan), "alone": case(reference=None)}
    )
    assert rows["near"]["speedup"]["over"] == "a"
    for name in ("far", "nan"):
        assert not rows[name]["parity"]["ok"]
        assert rows[name]["speedup"] is None
    assert rows["alone"]["parity"] is None
    assert rows["alone"]["speedup"] is None
    assert failures(list(rows.values())) == [
        "far: differs from a by 2.0e-03, allowed is 1.0e-03",
        "nan: differs from a beyond measure, allowed is 1.0e-03",
    ]
    assert failures([rows["far"] | {"approximate": True}]) == []


def test_twice_what_the_plain_one_loses_is_allowed() -> None:
    values = {"a": 1.0, "plain": 1.005, "ours": 1.01, "worse": 1.015}
    rows = run({name: case(value, baseline="plain") for name, value in values.items()})
    assert rows["ours"]["parity"]["allowed"] == pytest.approx(0.011, rel=1e-3)
    assert [rows[name]["parity"]["ok"] for name in ("plain", "ours", "worse")] == [True, True, False]


def test_nobody_is_right_beside_a_reference_that_failed() -> None:
    def fails() -> Any:
        raise RuntimeError("boom")

    rows = run({"a": Case(fails, "a", 1.0), "ours": case(baseline="a")})
    assert rows["a"]["failed"] == "RuntimeError: boom"
    assert not rows["ours"]["parity"]["ok"]
    assert rows["ours"]["speedup"] is None


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory\nTried to"),
            {"failed": "OutOfMemoryError: CUDA out of memory"},
        ),
        (Absent("needs CUDA"), {"absent": "needs CUDA"}),
        (ModuleNotFoundError("No module named 'x'"), {"absent": "not installed (No module named 'x')"}),
        (RuntimeError(), {"failed": "RuntimeError: RuntimeError"}),
    ],
)
@pytest.mark.parametrize("when", ["building", "first", "later"])
def test_one_that_raises_is_a_row_and_the_others_go_on(error: Exception, says: dict[str, str], when: str) -> None:
    calls = []

    def call() -> torch.Tensor:
        calls.append(1)
        if when == "first" or len(calls) > 3:
            raise error
        return torch.ones(1)

    def build() -> Callable[[], torch.Tensor]:
        if when == "building":
            raise error
        return call

    rows = run({"a": case(), "b": Case(build, "a", 0.0), "c": case()}, rounds=4)
    assert {k: v for k, v in rows["b"].items() if k not in ("provider", "dtype")} == says
    assert list(rows) == ["a", "b", "c"]
    assert [rows[name]["n"] for name in "ac"] == [4, 4]
    assert len(failures(list(rows.values()))) == ("failed" in says)


def test_spread_is_remarked() -> None:
    times = iter([0.0, 0.0, 0.02, 0.0, 0.02, 0.0, 0.02, 0.0])

    def call() -> torch.Tensor:
        time.sleep(0.01 + next(times))
        return torch.ones(1)

    rows = run({"a": Case(lambda: call, "a", 0.0)}, rounds=6)
    assert rows["a"]["remarks"][0].startswith("spread ")


def test_short_calls_are_bundled_and_timed_cold() -> None:
    count = []

    def call() -> torch.Tensor:
        count.append(1)
        return torch.ones(1)

    row = run({"a": Case(lambda: call, "a", 0.0)}, bundle=True, cold=True, rounds=3)["a"]
    assert len(count) > 3 * 100
    assert row["median_s"] < 1e-3
    assert row["cold"]["n"] == 3
    assert cache_bytes(CPU) >= 2**20


def test_relative_by_hand() -> None:
    def of(a: list[float], b: list[float]) -> float:
        return relative([torch.tensor(a)], [torch.tensor(b)])

    assert of([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert of([], []) == 0.0
    assert of([math.inf], [1.0]) == of([math.nan], [1.0]) == math.inf
    assert of([], [1.0]) == of([1.0], [1.0, 1.0]) == math.inf, "another shape is wrong, not broadcast"
    one = torch.ones(1)
    assert relative([one], [one, one]) == math.inf


def test_results_are_copied_to_the_host() -> None:
    t = torch.ones(2, dtype=torch.float16, requires_grad=True)
    (copy,) = host(t)
    assert copy.dtype == torch.float32
    with torch.no_grad():
        t.zero_()
    assert copy.tolist() == [1.0, 1.0]


def test_what_drifts_after_the_first_call_has_no_parity() -> None:
    calls: list[int] = []

    def call() -> torch.Tensor:
        calls.append(1)
        return torch.full((1,), 1.0 if len(calls) < 4 else 1.5)

    row = run({"a": case(), "b": Case(lambda: call, "a", 1e-3)}, rounds=3)["b"]
    assert row["parity"]["error"] == pytest.approx(0.5)
    assert row["speedup"] is None


def test_no_precision_may_lose_more_than_a_fiftieth() -> None:
    rows = run({"a": case(), "plain": case(1.5, baseline="plain"), "ours": case(1.019, baseline="plain")})
    assert not rows["plain"]["parity"]["ok"], "a plain loop that is this wrong is wrong"
    assert rows["ours"]["parity"]["allowed"] == pytest.approx(0.021)
    assert rows["ours"]["parity"]["ok"]


def test_rounds_end_with_the_time_but_not_before_three() -> None:
    calls: list[str] = []
    cases = {name: Case(lambda name=name: lambda: calls.append(name) or torch.ones(1), "a", 0.0) for name in "ab"}  # type: ignore[misc]
    rows = run(cases, rounds=50, seconds=0.0)
    assert rows["a"]["n"] == rows["b"]["n"] == 3
    assert not interrupted(list(rows.values()))


@pytest.mark.parametrize("when", ["warming up", "timing"])
def test_after_an_interrupt_there_are_rows(when: str) -> None:
    """Ctrl-C, or the clock of whoever started it: what was warmed up has three rounds, what was not says so."""
    calls = {"a": 0, "b": 0}

    def case(name: str) -> Case:
        def call() -> torch.Tensor:
            calls[name] += 1
            if name == "b" and calls[name] == (1 if when == "warming up" else 4):  # two calls of warming up, one round
                raise KeyboardInterrupt
            return torch.ones(1)

        return Case(lambda: call, "a", 0.0)

    rows = run({name: case(name) for name in "ab"}, rounds=50)
    assert interrupted(list(rows.values()))
    assert rows["a"]["n"] == 3
    assert rows["a"]["interrupted"]
    if when == "warming up":
        assert rows["b"]["absent"] == "interrupted before its turn"
        assert rows["b"]["interrupted"]
    else:
        assert rows["b"]["n"] == 2
    assert failures(list(rows.values())) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_small_calls_are_captured_and_what_cannot_be_says_so() -> None:
    device = torch.device("cuda")
    x = torch.ones(8, device=device)
    call, times, how = bundle_calls(lambda: x * 2, device)
    assert torch.equal(call(), x * 2)
    assert times % CAPTURED == 0
    assert how == f"captured, {CAPTURED} calls a graph"
    call, times, how = bundle_calls(lambda: x * float(x.sum()), device)  # it asks the device
    assert torch.equal(call(), x * 8)
    assert how.startswith("from Python: ")
    assert torch.equal(bundle_calls(lambda: x + 1, device)[0](), x + 1), "a capture that failed does not spoil the next"
