"""The kernel benchmark: every op has cases whose providers agree, what does not agree gets no speed-up, and the model is rendered."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from sbldm_fast.benchmarks.kernels import OPS, bench_kernels, cases, kernels_table, roofline

ROOT = Path(__file__).parents[2]
module = importlib.import_module("sbldm_fast.benchmarks.kernels")


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_agrees_with_its_baseline(op: str) -> None:
    """In the interpreter, on the smallest case; torch.compile is left to the benchmark itself, which gates it."""
    case = next(cases(op, torch.device("cpu"), False))
    reference, *others = [name for name in case.providers if name not in ("torch.compile", *case.own_stream)]
    assert "ours" in others
    expected = module._tensors(case.providers[reference]())
    for name in others:
        for got, wanted in zip(module._tensors(case.providers[name]()), expected, strict=True):
            assert module._relative(got.float(), wanted.float()) <= module.RELATIVE[case.dtype], name


def test_rows_are_complete_and_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = bench_kernels(["ddim_step"], rounds=2, large=False)
    assert {r["provider"] for r in rows} == {"eager", "torch.compile", "ours", "copy"}
    for r in rows:
        if "absent" in r:
            assert r["provider"] == "ours"
            assert "Triton has no cpu target" in r["absent"]
            continue
        assert r["n"] == 2
        assert r["gb_s"] > 0
        assert (r["parity"] is None) == (r["provider"] == "copy")
        assert r["speedup_over_eager"] is None if r["provider"] == "copy" else r["parity"]["ok"]
    json.dumps(rows)
    assert kernels_table(rows).count("\n") == len(rows) + 1


def test_a_provider_that_is_wrong_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(cases("ddim_step", torch.device("cpu"), False))
    wrong = case._replace(providers=case.providers | {"wrong": lambda: case.providers["eager"]() + 1})
    del wrong.providers["ours"]
    monkeypatch.setattr(module, "cases", lambda *_: iter([wrong]))
    row = next(r for r in bench_kernels(["ddim_step"], rounds=1) if r["provider"] == "wrong")
    assert not row["parity"]["ok"]
    assert row["speedup_over_eager"] is None
    assert "no parity" in kernels_table([row])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got conv, 10, allowed are group_norm_silu, ddim_step"):
        bench_kernels(["conv"])
    with pytest.raises(ValueError, match="got ddim_step, 0"):
        bench_kernels(["ddim_step"], rounds=0)


def test_roofline_is_rendered_from_the_cases() -> None:
    assert (ROOT / "benchmarks/ROOFLINE.md").read_text() == roofline()


def test_roofline_by_hand() -> None:
    # 16x64x128x128 in float16: 33.5 MB read, written and, as its groups are cut, read again: 100.7 MB at 220 to 250 GB/s
    line = next(line for line in roofline().splitlines() if "16x64x128x128/32 nchw float16" in line)
    assert line.endswith("| 100.66 | 201.33 | 2 | 403 to 458 | memory |")
