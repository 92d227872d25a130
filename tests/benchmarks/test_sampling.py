"""The sampling benchmark: what it measures agrees, what does not agree gets no speed-up."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks.sampling import bench_sampling
from sbldm_fast.benchmarks.table import latest, read_rows, render, sampling_table
from sbldm_fast.benchmarks.timing import append, interleaved, machine, machine_name, summary

ROOT = Path(__file__).parents[2]
module = importlib.import_module("sbldm_fast.benchmarks.sampling")


def test_rows_are_complete_and_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="diffusers is the peer that this benchmark times")
    rows = bench_sampling(preset_name="demo", steps=3, batches=(2,), rounds=2, modes=("eager",))
    names = [r["provider"] for r in rows]
    assert names[0] == "reference"
    assert len(names) == len(set(names))
    assert {"FastSampler eager float32", "diffusers", "diffusers under FastSampler eager"} <= set(names)
    for r in rows:
        assert r["parity"]["ok"], r["provider"]
        assert r["n"] == len(r["raw_s"]) == 2
        assert r["speedup"]["over"] == "diffusers"
        assert r["env"]["packages"]["torch"]
    assert next(r for r in rows if r["provider"] == "diffusers")["speedup"]["factor"] == 1
    json.dumps(rows)


def test_a_provider_that_is_wrong_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    rows = bench_sampling(preset_name="demo", steps=1, batches=(1,), rounds=1, modes=("eager",))
    wrong = [r for r in rows if r["provider"] in ("reference", "diffusers")]
    assert len(wrong) == 2
    assert not any(r["parity"]["ok"] or r["speedup"] for r in wrong)
    assert "no parity" in sampling_table(rows)


def test_a_provider_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(module.FastSampler):  # type: ignore[name-defined,misc]  # the module is looked up by name
        def __call__(self, *a: Any, **k: Any) -> torch.Tensor:
            raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(module, "FastSampler", Failing)
    rows = bench_sampling(preset_name="demo", steps=1, batches=(1,), rounds=1, modes=("eager",), half=False)
    failed = [r for r in rows if "absent" in r]
    assert [r["absent"] for r in failed] == ["failed: RuntimeError: out of memory"] * 2
    assert [r["provider"] for r in rows if "absent" not in r] == ["reference", "diffusers"]


def test_an_absent_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = bench_sampling(preset_name="demo", steps=1, batches=(1,), rounds=1, modes=("eager",))
    assert "diffusers is not installed" in rows[-1]["absent"]
    assert all(r["speedup"] is None for r in rows[:-1])
    assert "diffusers is not installed" in sampling_table(rows)


def test_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)  # type: ignore[misc]  # mypy cannot type a default in a lambda
    assert "".join(order) == "abccbaabc"
    assert [len(v) for v in seconds.values()] == [3, 3, 3]


def test_summary_by_hand() -> None:
    s = summary([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (s["median_s"], s["p10_s"], s["p90_s"], s["iqr_s"], s["n"]) == (3.0, pytest.approx(1.4), pytest.approx(4.6), 2.0, 5)


def test_results_are_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "m" / "r.jsonl"
    append(path, [{"run": "1", "preset": "p", "batch": 1, "steps": 2, "provider": p, "x": 1} for p in "ab"])
    append(path, [{"run": "2", "preset": "p", "batch": 1, "steps": 2, "provider": "a", "x": 2}])
    rows = read_rows(path)
    assert [r["x"] for r in rows] == [1, 1, 2]
    assert [r["x"] for r in latest(rows)] == [2]


def test_machine_names_are_folder_names() -> None:
    info = machine()
    assert machine_name(info).replace("-", "").isalnum()
    assert machine_name({"gpu": "NVIDIA H200", "cpu": "", "cores": 1}) == "nvidia-h200"
    assert machine_name({"gpu": None, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2}) == "intel-xeon-processor-2-cores"


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"batches": (0,)}, {"rounds": 0}])
def test_bad_input_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps, batch, rounds: got"):
        bench_sampling(**arguments)


def test_gpu_benchmark_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sbldm_fast.benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert capsys.readouterr().err == "make gpu needs a CUDA device, and this PyTorch sees none\n"


def test_the_readmes_table_is_the_rows() -> None:
    text = (ROOT / "README.md").read_text()
    assert "<!-- latency: benchmarks/results/" in text
    assert render(ROOT / "README.md") == text


def test_a_changed_figure_in_the_readme_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text.replace("| reference |", "| reference | 0.01 |", 1))
    assert render(tmp_path / "README.md") == text
