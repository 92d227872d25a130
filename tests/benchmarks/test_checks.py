"""The first minute on a GPU, on a CPU: what is right passes, what is wrong fails, and nothing stops the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import checks
from sbldm_fast.benchmarks.rows import read_rows
from sbldm_fast.kernels import group_norm_silu
from sbldm_fast.kernels._backend import resolve

CPU = torch.device("cpu")


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = checks.main([*arguments, "-o", str(tmp_path / "rows.jsonl")])
    return code, {r["check"]: r for r in read_rows(tmp_path / "rows.jsonl")[0]}


def test_loops_pass_or_say_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "graphs", "--preset", "demo")
    assert code == 0
    assert rows["FastSampler eager"]["ok"]
    assert (
        rows["FastSampler loop-graph"]["absent"] == rows["FastSampler step-graph"]["absent"] == "CUDA graphs need CUDA"
    )
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["PASS", "SKIP", "SKIP"]


def test_one_that_raises_and_one_that_is_wrong_fail_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> checks.Errors:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    found = {
        "broken": broken,
        "wrong": lambda: (2.0, 1.0),
        "not a number": lambda: (float("nan"), 1.0),
        "right": lambda: (0.5, 1.0),
    }
    monkeypatch.setattr(checks, "op_checks", lambda _: iter(found.items()))
    code, rows = run(tmp_path, "ops")
    assert code == 1
    assert rows["broken"]["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [rows[name]["ok"] for name in ("wrong", "not a number", "right")] == [False, False, True]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["FAIL", "FAIL", "FAIL", "PASS"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mixing_is_right_in_every_dtype(dtype: str) -> None:
    error, allowed = dict(checks.op_checks(CPU))[f"mix_slices, gradients, {dtype} channels_last"]()
    assert 0 < error <= allowed


def test_a_kernel_that_is_a_little_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = dict(checks.op_checks(CPU))
    name = "group_norm_silu, gradients, 2x64x16x16/32 float32 channels_last"
    error, allowed = calls[name]()
    assert 0 < error <= allowed

    def off(x: torch.Tensor, *arguments: Any, **given: Any) -> Any:
        y, h = group_norm_silu(x, *arguments, **given)
        return (y * (1 + 1e-4) if resolve(CPU)[0] == "triton" else y), h

    monkeypatch.setattr(checks, "group_norm_silu", off)
    error, allowed = dict(checks.op_checks(CPU))[name]()
    assert error > allowed
