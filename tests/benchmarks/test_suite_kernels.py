"""The kernel benchmark: every op has cases whose providers agree, what does not agree gets no speed-up, and the model
is rendered."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from sbldm_fast.benchmarks.harness import host, relative
from sbldm_fast.benchmarks.suite_kernels import OPS, RELATIVE, bench_kernels, problems
from sbldm_fast.benchmarks.table import kernels_table

module = importlib.import_module("sbldm_fast.benchmarks.suite_kernels")
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_agrees_with_its_baseline(op: str) -> None:
    """In the interpreter, on the smallest problem; torch.compile is left to the benchmark itself, which gates it."""
    problem = next(problems(op, CPU, False))
    others = [name for name in problem.providers if name not in ("torch.compile", "reference", *problem.own_stream)]
    assert "ours" in others
    expected = host(problem.providers["reference"]())
    for name in others:
        assert relative(host(problem.providers[name]()), expected) <= RELATIVE[problem.dtype], name


def test_rows_are_complete_and_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ceilings, rows = [], []
    for r in bench_kernels(["ceilings", "ddim_step"], rounds=2, large=False):
        (ceilings if r["op"] == "ceilings" else rows).append(r)
    assert {r["provider"] for r in ceilings} >= {"copy", "launch", "matmul float32"}
    assert all(r["rate"] > 0 for r in ceilings)
    assert {r["provider"] for r in rows} == {"reference", "eager", "torch.compile", "ours", "copy"}
    for r in rows:
        if "absent" in r:
            assert r["provider"] == "ours"
            assert "Triton has no cpu target" in r["absent"]
            continue
        assert r["n"] == 2
        assert r["gb_s"] == pytest.approx(r["moved"] / r["median_s"] / 1e9)
        assert r["cold"]["n"] == 2
        assert (r["parity"] is None) == (r["provider"] == "copy")
        assert r["speedup"] is None if r["provider"] == "copy" else r["parity"]["ok"]
    json.dumps(rows)
    assert "Without a figure: ours (Triton has no cpu target" in kernels_table(ceilings + rows).markdown()


def test_a_provider_that_is_wrong_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(problems("ddim_step", CPU, False))
    wrong = problem._replace(providers=problem.providers | {"wrong": lambda: problem.providers["eager"]() + 1})
    monkeypatch.setattr(module, "problems", lambda *_: iter([wrong]))
    row = next(r for r in bench_kernels(["ddim_step"], rounds=1, compiled=False) if r["provider"] == "wrong")
    assert not row["parity"]["ok"]
    assert row["speedup"] is None
    assert "no parity" in kernels_table([row]).markdown()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got conv, 10, allowed are ceilings, group_norm_silu, ddim_step"):
        next(bench_kernels(["conv"]))
    with pytest.raises(ValueError, match="got ddim_step, 0"):
        next(bench_kernels(["ddim_step"], rounds=0))
