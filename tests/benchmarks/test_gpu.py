"""`make gpu` without a GPU: what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import gpu
from sbldm_fast.benchmarks.rows import read_rows
from sbldm_fast.benchmarks.suites import SUITES

from sbldm_fast.cli_bench import Suite, _arguments, bench

LINE = "sampling --quick --preset demo --steps 1 --rounds 1"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert capsys.readouterr().err == "make gpu needs a CUDA device, and this PyTorch sees none\n"


def test_it_goes_on_where_it_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = (LINE, "sampling --steps 0")
    assert gpu.run_plan(plan, tmp_path, time.monotonic() - 1) == 1
    assert f"no time, the same command goes on: {LINE}" in capfd.readouterr().out
    assert gpu.run_plan(plan, tmp_path, math.inf) == 1
    out = capfd.readouterr().out
    assert "2 of 2 parts done" in out
    assert "failed, or without parity: sampling --steps 0" in out
    rows = read_rows(tmp_path / "sampling.jsonl")[0]
    assert {r["provider"] for r in rows} >= {"reference", "diffusers"}
    record = read_rows(tmp_path / "gpu.jsonl")[0]
    assert [(r["line"], r["code"]) for r in record] == [(LINE, 0), ("sampling --steps 0", 1)]
    assert gpu.run_plan((LINE,), tmp_path, math.inf) == 0
    assert gpu.run_plan(plan, tmp_path, math.inf) == 1, "what failed goes on failing"
    assert len(read_rows(tmp_path / "sampling.jsonl")[0]) == len(rows), "what is done is not done again"


def test_only_what_this_machine_did_with_these_sources_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    codes = iter([0, 0, -9, 0, 0])
    monkeypatch.setattr(gpu, "_run", lambda line, *_: ran.append(line) or next(codes))
    here = gpu.machine()
    for changed, times in (({}, 1), ({}, 1), ({"source": "b"}, 2), ({"cpu": "another"}, 3), ({"cpu": "another"}, 4)):
        monkeypatch.setattr(gpu, "machine", lambda changed=changed: here | changed)
        monkeypatch.setattr(
            gpu, "head", lambda target, changed=changed, **what: {"target": target, "run": "1", "env": here | changed} | what
        )
        gpu.run_plan((LINE,), tmp_path, math.inf)
        assert len(ran) == times, "one that was killed is run again"


def test_a_part_that_takes_too_long_is_left_for_the_next_time(tmp_path: Path) -> None:
    assert gpu.run_plan(("training --preset paper --batch 64 --no-compile",), tmp_path, time.monotonic() + 1) == 1
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.parametrize("line", gpu.PLAN)
def test_every_line_of_the_plan_is_a_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    taken: list[tuple[str, dict[str, Any]]] = []
    for name, suite in SUITES.items():

        def note(name: str = name, **given: Any) -> Any:
            taken.append((name, given))
            return iter(())

        monkeypatch.setattr(note, "__signature__", __import__("inspect").signature(suite.run), raising=False)
        monkeypatch.setitem(SUITES, name, suite._replace(run=note))
    monkeypatch.setattr(
        "sbldm_fast.benchmarks.table.TABLES", {name: lambda _: type("T", (), {"markdown": lambda _: ""})() for name in SUITES}
    )
    app = typer.Typer()
    app.command()(bench)
    app(line.split(), standalone_mode=False)
    assert taken[0][0] == line.split()[0]


def test_the_plan_has_every_suite() -> None:
    assert {line.split()[0] for line in gpu.PLAN} == set(SUITES) == set(Suite)
    assert _arguments(SUITES["training"].run, {"batch": [4]}, "training") == {"batch": 4}
    json.dumps({name: suite.quick for name, suite in SUITES.items()})
