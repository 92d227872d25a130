"""Verdicts by interval, on the same machine, with parity, and what the exit code is made of."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sbldm_fast.benchmarks.timing import summary
from sbldm_fast.benchmarks.verdicts import Verdict, bad, compare, interval, verdict_table

ENV = {"gpu": None, "cpu": "c", "cores": 2, "threads": 2, "cpu_capability": "AVX2"}


def row(raw: list[float], **what: Any) -> dict[str, Any]:
    base = {"target": "sampling", "run": "1", "preset": "p", "batch": 1, "steps": 2, "provider": "a", "env": ENV}
    base |= {"parity": {"against": "a", "error": 0.0, "ok": True}, "speedup": {"over": "base", "factor": 1.0}}
    return base | summary(raw) | what


def beside(r: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
    """The base of a row's run: a machine that was slower by `factor`."""
    return r | summary([factor] * len(r.get("raw_s", [1.0]))) | {"provider": "base", "parity": {"ok": True}}


def judge(a: dict[str, Any], b: dict[str, Any]) -> Verdict:
    found = compare([a, beside(a)], [b, beside(b)])
    return next(v for v in found if v.provider == "a")


def around(centre: float, width: float, n: int = 11) -> list[float]:
    return [centre + width * (i / (n - 1) - 0.5) for i in range(n)]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (around(1, 0.02), around(0.9, 0.02), "FAST"),
        (around(1, 0.02), around(1.1, 0.02), "SLOW"),
        (around(1, 0.02), around(1.001, 0.02), "SAME"),
        (around(1, 0.3), around(1.05, 0.3), "AMBIGUOUS"),
        (around(1, 1e-4), around(1.01, 1e-4), "SAME"),  # disjoint, but by less than what is notable
        (around(1, 0.5), around(0.5, 0.2), "FAST"),
    ],
)
def test_verdicts(before: list[float], after: list[float], verdict: str) -> None:
    found = judge(row(before), row(after))
    assert found.verdict == verdict
    assert found.factor == pytest.approx(sorted(after)[5] / sorted(before)[5])
    assert bad([found]) == (verdict == "SLOW")


def test_intervals_by_hand() -> None:
    # n = 6: P(all on one side of the median) = 2/64, so 96.9 %; the next pair, 2 (1 + 6)/64 off, would be 78 %
    assert interval([5, 3, 1, 2, 4, 6]) == (1, 6)
    # n = 11: 2 (1 + 11 + 55)/2048 off is 93.5 %, 2 (1 + 11)/2048 is 98.8 %: the second from either end
    assert interval([float(i) for i in range(11)]) == (1, 9)
    assert interval([2.0, 1.0, 3.0]) == (1.0, 3.0)


@given(st.integers(6, 40))
def test_intervals_hold_the_median_as_often_as_they_say(n: int) -> None:
    draw = random.Random(n)
    inside = 0
    for _ in range(400):
        low, high = interval([draw.random() for _ in range(n)])
        inside += low <= 0.5 <= high
    assert inside / 400 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 400)


def test_another_machine_is_never_faster() -> None:
    found = judge(row(around(1, 0.02)), row(around(0.5, 0.02), env=ENV | {"cpu_capability": "AVX512"}))
    assert found.verdict == "AMBIGUOUS"
    assert found.reason == "another machine: c, 2 cores, 2 threads, AVX2 before, c, 2 cores, 2 threads, AVX512 now"
    assert bad([found])


def test_a_gap_must_hold_in_cycles() -> None:
    before, after = row(around(1, 0.01), clock_mhz={"median": 1500}), row(around(0.8, 0.01), clock_mhz={"median": 1900})
    assert judge(before, after).verdict == "AMBIGUOUS"
    assert "not in cycles" in judge(before, after).reason
    assert judge(before, after | {"clock_mhz": {"median": 1490}}).verdict == "FAST"


def test_what_is_wrong_failed_gone_or_new() -> None:
    good = row(around(1, 0.02))
    wrong = good | {"parity": {"against": "r", "error": 0.5, "allowed": 1e-4, "ok": False}}
    assert judge(good, wrong)[:2] == ("WRONG", "differs from r by 5.0e-01, allowed is 1.0e-04")
    assert judge(good, wrong | {"approximate": True}).verdict == "SAME"
    plain = {k: good[k] for k in ("target", "run", "preset", "batch", "steps", "provider", "env")}
    assert judge(good, plain | {"failed": "RuntimeError: boom"})[:2] == ("WRONG", "RuntimeError: boom")
    assert judge(good, plain | {"absent": "needs CUDA"})[:2] == ("GONE", "needs CUDA")
    assert compare([good], [])[0].verdict == "GONE"
    assert compare([], [good])[0].verdict == "NEW"
    assert not compare([plain | {"absent": "x"}], [plain | {"absent": "x"}])
    assert [bad([Verdict(v, "", "", "", None)]) for v in ("WRONG", "GONE", "NEW", "SAME", "AMBIGUOUS")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_last_run_counts() -> None:
    before, after = row(around(1, 0.01), run="2"), row(around(2, 0.01))
    found = compare([row(around(9, 0.1)), before, beside(before)], [after, beside(after)])[0]
    assert found[:2] == ("SLOW", "")
    assert "| SLOW | sampling p 1 2 | a | 2.000 |  |" in verdict_table([found])


def test_few_or_disturbed_samples_decide_nothing() -> None:
    assert judge(row([1.0] * 5), row([2.0] * 11))[:2] == ("AMBIGUOUS", "n below 6")
    throttled = row(around(2, 0.01), remarks=["spread 12%", "throttled: the clock fell to 60% of its start"])
    assert judge(row(around(1, 0.01)), throttled)[:2] == (
        "AMBIGUOUS",
        "now: throttled: the clock fell to 60% of its start",
    )
    assert judge(row(around(1, 0.01)), row(around(2, 0.01), remarks=["spread 12%"])).verdict == "SLOW"


def test_a_machine_that_was_slower_is_not_a_program_that_is() -> None:
    before, after = row(around(1, 0.01)), row(around(2, 0.01))
    verdicts = compare([before, beside(before)], [after, beside(after, 2.0)])
    assert [v.verdict for v in verdicts] == ["AMBIGUOUS", "AMBIGUOUS"]
    assert verdicts[0].reason == "in seconds, but not beside base of the same run"
    assert verdicts[1].reason == "in seconds; nothing beside it tells the machine from the program"
    assert not bad(verdicts)
    assert compare([before], [after])[0].verdict == "AMBIGUOUS", "nor can it be told without a base"
    assert compare([before, beside(before)], [after, beside(after, 1.2)])[0].verdict == "SLOW"


def test_the_same_samples_are_the_same() -> None:
    """However few they are and however far apart: a file beside itself differs in nothing."""
    for raw in ([1.0, 2.0], around(1, 1.5), around(1, 0.3)):
        assert judge(row(raw), row(raw))[:2] == ("SAME", "the same samples")
    assert judge(row([1.0]), row([1.0], env=ENV | {"cpu": "d"})).verdict == "AMBIGUOUS"


def test_rows_without_a_provider_are_passed_over() -> None:
    checked = {"target": "checks", "run": "1", "check": "a", "env": ENV}
    assert [v.provider for v in compare([checked, row([1.0])], [checked])] == ["a"]
