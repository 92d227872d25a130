"""The sampling benchmark: every provider agrees with its library's plain loop, what does not gets no speed-up."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import providers as module
from sbldm_fast.benchmarks.harness import failures
from sbldm_fast.benchmarks.providers import FLOAT, Diffusers, Monai, Ours, Reference, Runtime, providers
from sbldm_fast.benchmarks.setup import SamplingSetup
from sbldm_fast.benchmarks.suite_sampling import bench_sampling
from sbldm_fast.benchmarks.table import sampling_table

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"preset_name": "demo", "batches": (1,), "rounds": 1, "compiled": False}


def test_rows_are_complete_and_gated() -> None:
    pytest.importorskip("diffusers", reason="diffusers is the peer that this benchmark times")
    rows = list(bench_sampling(preset_name="demo", steps=(2, 3), batches=(2,), rounds=2, compiled=False))
    assert [r["steps"] for r in rows] == sorted(r["steps"] for r in rows)
    rows = [r for r in rows if r["steps"] == 3]
    assert {k: round(v / 1e6) for k, v in rows[0]["parameters"].items()} == {"ours": 4, "diffusers": 4, "monai": 4}
    names = [r["provider"] for r in rows]
    assert names[0] == "reference"
    assert len(names) == len(set(names))
    assert {
        "reference channels_last",
        "FastSampler eager float32",
        "diffusers",
        "diffusers under FastSampler eager",
        "MONAI",
    } <= set(names)
    for r in rows:
        if "absent" in r:
            assert r["absent"] == "CUDA graphs need CUDA"
            continue
        assert r["parity"]["ok"], r["provider"]
        assert r["n"] == len(r["raw_s"]) == 2
        assert r["speedup"]["over"] == "diffusers"
        assert r["images_per_s"] == pytest.approx(2 / r["median_s"])
        assert r["ms_per_step"] == pytest.approx(1e3 * r["median_s"] / 3)
    assert next(r for r in rows if r["provider"] == "diffusers")["speedup"]["factor"] == 1
    own = next(r for r in rows if r["provider"] == "FastSampler eager float32")
    assert own["work"]["launches"] > 100
    assert own["work"]["flops"] > 1e8
    assert (
        "Without a figure: FastSampler step-graph float32, FastSampler loop-graph float32"
        in sampling_table(rows).markdown()
    )


def test_other_weights_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that computes something else has no parity, no speed-up, and fails the command."""
    pytest.importorskip("diffusers", reason="diffusers is the peer that this benchmark times")
    monkeypatch.setattr(Ours, "sampler", lambda self, p, *_: lambda: p.noise)
    rows = list(bench_sampling(steps=(1,), **QUICK))
    wrong = [r for r in rows if "FastSampler" in r["provider"]]
    assert wrong
    assert not any(r["parity"]["ok"] or r["speedup"] for r in wrong)
    assert "no parity" in sampling_table(rows).markdown()
    assert [line.split(":")[0] for line in failures(rows)] == [r["provider"] for r in wrong]


def test_a_provider_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="diffusers is the peer that this benchmark times")
    pytest.importorskip("monai", reason="MONAI is the peer that this benchmark times")

    class Failing(module.FastSampler):
        def __call__(self, *a: Any, **k: Any) -> torch.Tensor:
            raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(module, "FastSampler", Failing)
    rows = list(bench_sampling(steps=(1,), dtypes=("float32",), **QUICK))
    failed = [r for r in rows if "failed" in r]
    assert [r["failed"] for r in failed] == ["RuntimeError: out of memory"] * 2
    assert [r["provider"] for r in rows if "median_s" in r] == [
        "reference",
        "reference channels_last",
        "diffusers",
        "MONAI",
    ]
    assert len(failures(rows)) == 2


def test_an_absent_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = list(bench_sampling(steps=(1,), dtypes=("float32",), **QUICK))
    absent = {r["provider"]: r["absent"] for r in rows if "absent" in r}
    assert absent["diffusers"].startswith("not installed (import of diffusers halted")
    assert {r["speedup"]["over"] for r in rows if "median_s" in r} == {"reference"}, (
        "our textbook loop is the base then"
    )
    assert "diffusers, diffusers under FastSampler eager (not installed" in sampling_table(rows).markdown()
    assert not failures(rows)


def test_runtimes_agree_or_are_absent() -> None:
    pytest.importorskip("diffusers", reason="diffusers is the peer that this benchmark times")
    pytest.importorskip("onnxscript", reason="diffusers' UNet is exported to ONNX for the runtimes")
    problem = SamplingSetup("demo", 2, 2, CPU)
    wanted = Diffusers().build(problem)()
    for runtime in ("ONNX Runtime", "OpenVINO"):
        try:
            got = Runtime(runtime=runtime).build(problem)()
        except ImportError:
            assert runtime == "OpenVINO", "onnxruntime comes with the extras that tests need"
            continue
        assert torch.allclose(got, wanted, atol=1e-4)


def test_monai_steps_the_betas_of_the_preset() -> None:
    pytest.importorskip("monai", reason="MONAI is the peer that this benchmark times")
    problem = SamplingSetup("paper", 5, 1, CPU)
    ours, monai = problem.ours[1], problem.monai[1]
    assert torch.equal(monai.alphas_cumprod, ours.alphas_cumprod)
    first, second = (problem.monai[0](torch.randn_like(problem.noise), torch.tensor([1])) for _ in range(2))
    assert (first - second).abs().max() > 1e-3, (
        "its prediction depends on what it is given, or nothing would be compared"
    )
    x, m = torch.randn(2, *problem.noise.shape)
    for s in (ours, monai):
        s.set_timesteps(5)
    t = int(ours.timesteps[2])
    assert torch.allclose(monai.step(m, t, x)[0], ours.step(m, t, x).prev_sample, atol=1e-5)


def test_everybody_has_a_name_and_someone_to_be_held_against() -> None:
    for device in (CPU, torch.device("cuda")):
        found = list(providers(device, [FLOAT, torch.bfloat16]))
        names = [p.name for p in found]
        assert len(names) == len(set(names))
        for p in found:
            assert p.reference in names
            assert p.baseline in names
    assert (
        Reference(torch.bfloat16, "default", channels_last=True).name
        == "reference channels_last bfloat16 torch.compile"
    )
    assert Monai(compiled="max-autotune").name == "MONAI torch.compile max-autotune"


@pytest.mark.parametrize("arguments", [{"steps": (0,)}, {"batches": (0,)}, {"rounds": 0}])
def test_bad_input_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps, batch, rounds: got"):
        next(bench_sampling(**arguments))
