"""Fresh processes: real ones, of the smallest size, and what becomes of one that dies."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from sbldm_fast.benchmarks import suite_process as module
from sbldm_fast.benchmarks.suite_process import bench_memory, bench_scaling, bench_startup, cost
from sbldm_fast.benchmarks.table import memory_table, scaling_table, startup_table

SMALL: dict[str, Any] = {"preset_name": "demo", "steps": 1, "compiled": False}


@pytest.fixture(autouse=True)
def one_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_names", lambda _: ({"FastSampler eager float32": "ours"}, "cpu"))


def test_startup_has_its_parts_and_who_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module,
        "_names",
        lambda _: (dict.fromkeys(("FastSampler eager float32", "FastSampler loop-graph float32"), "ours"), "cpu"),
    )
    row, absent = bench_startup(rounds=1, **SMALL)
    assert row["n"] == 1
    assert row["parts"]["import_s"] > 0.3
    assert absent["absent"] == "CUDA graphs need CUDA"
    text = startup_table([row, absent]).markdown()
    assert f"| FastSampler eager float32 | {row['median_s']:.1f} |" in text
    assert "Without a figure: FastSampler loop-graph float32 (CUDA graphs need CUDA)." in text


def test_memory_grows_with_the_batch() -> None:
    rows = [r for r in bench_memory(batches=(1, 64), **SMALL) if "absent" not in r]
    assert rows[0]["peak_bytes"] > 2**20
    assert rows[1]["peak_bytes"] > rows[0]["peak_bytes"] + 64 * 128 * 128 * 4
    assert "| batch 1: MiB | batch 64: MiB |" in memory_table(rows).markdown()


def test_two_processes_make_what_two_processes_make() -> None:
    rows = list(bench_scaling(batch=2, processes=(1, 2, 99), seconds=1, **SMALL))
    assert rows[0]["cost"][0]["images"] == 1
    one, two, many = rows[1:]
    assert many["absent"] == "more processes than devices"
    for r in (one, two):
        assert r["images"] % 2 == 0
        assert r["together_s"] >= 1
        assert r["images_per_s"] == pytest.approx(r["images"] / r["together_s"])
    assert "| torchrun FastSampler eager float32, 2 processes |" in scaling_table(rows).markdown()


def test_cost_by_hand() -> None:
    # batches of 4 that ended 5, 6, 7, 9 s after the start: 10 images are three batches, 100 are 25, of which 21 are to
    # come at 1 s each
    found = cost(3.0, [5.0, 6.0, 7.0, 9.0], 4)
    assert [(c["images"], c["seconds"], c["extrapolated"]) for c in found] == [
        (1, 3.0, False),
        (10, 7.0, False),
        (100, 30.0, True),
        (1000, 255.0, True),
        (10_000, 2505.0, True),
    ]
    assert found[1]["ms_per_image"] == pytest.approx(700)
    assert cost(3.0, [5.0], 4)[1]["seconds"] == 15.0, "of a single batch the rest is made of that one"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('cudaErrorIllegalAddress')", "the process ended with 1: cudaErrorIllegalAddress"),
        ("import os; os.kill(os.getpid(), 9)", "the process ended with -9: nothing on standard error"),
        ("print('no row')", "the process ended with 0: nothing on standard error"),
        ("import time; time.sleep(60)", "took more than 2 s"),
    ],
)
def test_a_process_that_dies_is_a_row(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", program] if command[0] == sys.executable else command, **options)

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "PATIENCE", 2)
    row = next(bench_memory(batches=(1,), **SMALL))
    assert row["failed"] == reason
    assert row["provider"] == "FastSampler eager float32"


def test_bad_input_is_named() -> None:
    for suite, wrong in (
        (bench_startup, {"rounds": 0}),
        (bench_memory, {"batches": (0,)}),
        (bench_scaling, {"seconds": 0.5}),
    ):
        with pytest.raises(ValueError, match="allowed is 1 or more"):
            next(suite(**wrong))  # type: ignore[operator]  # three functions of different arguments
