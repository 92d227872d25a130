"""What `auto` is, when and why."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling import loop, modes, sampler, source

from ..small import SHAPE, relative, scheduler

GRAPH, EAGER = modes.Mode("loop-graph", None), modes.Mode(None, None)


@pytest.fixture
def watch(recorded: Callable[..., FastSampler], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The seconds that runs take, to be set. In place of a GPU: `auto` chooses a graph, which is recorded as by
    `recorded`, and all that is timed runs once."""
    seconds = {"loop-graph": 0.0031, "eager": 0.008}

    def time_in_turns(runs: dict[modes.Mode, Any], device: torch.device) -> dict[modes.Mode, float]:
        for run in runs.values():
            run()
        return {mode: seconds[str(mode)] for mode in runs}

    monkeypatch.setattr(sampler, "choose", lambda *_: ("loop-graph", "one launch a run"))
    monkeypatch.setattr(sampler, "parse_mode", source.parse_mode)
    monkeypatch.setattr(loop, "time_in_turns", time_in_turns)
    return seconds


def auto(model: Any, steps: int = 4, **arguments: Any) -> FastSampler:
    return FastSampler(model, scheduler(), shape=SHAPE, steps=steps, **arguments)


def test_auto_says_what_it_took_and_why(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE)
    assert sampler.mode == "eager"
    assert "cpu has no CUDA graphs" in sampler.reason
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [modes.choose(*c)[0] for c in ((cuda, 1, 50), (cuda, 1, 1000), (cpu, 16, 50), (cpu, 1000, 50))] == [
        "loop-graph",
        "step-graph",
        "eager",
        "compile",
    ]


def test_auto_compiles_for_a_call_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "COMPILE_PAYS", 12)
    monkeypatch.setattr(loop, "compile_ahead", lambda function, *_: (function, False))
    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3, 2, 2), steps=4)
    eager = sampler(2)
    assert sampler.mode == "eager"
    assert relative(sampler(3)[:2], eager) < 1e-5
    assert sampler.mode == "compile"
    assert "3 samples of 4 steps" in sampler.reason
    sampler(2)
    assert sampler.mode == "compile", "what is compiled stays"


@pytest.mark.parametrize(("seconds", "kept"), [(0.008, "loop-graph"), (0.002, "eager")])
def test_auto_keeps_the_faster_and_says_so(
    unet: UNet2D, watch: dict[str, float], seconds: float, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, graphs, freed = loop.capture, list[Any](), list[bool]()

    def capture(*given: Any) -> Any:
        graphs.append(weakref.ref(replay := record(*given)))
        return replay

    monkeypatch.setattr(loop, "capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(graphs[-1]() is None))
    watch["eager"] = seconds
    fast, eager = auto(unet, eta=1.0, decode=torch.tanh), auto(unet, eta=1.0, decode=torch.tanh, mode="eager")
    assert (fast.mode, fast.reason) == ("loop-graph", "one launch a run")
    for seed in (1, 2):
        assert relative(fast(2, seed=seed), eager(2, seed=seed)) < 1e-5
        assert fast.mode == kept
        assert fast.reason == f"loop-graph 3.1 ms, eager {1e3 * seconds:.1f} ms for batches of 2"
    assert freed == [True] * (kept == "eager"), "the memory of a graph that is not there any more"
    stats = fast.stats()
    assert (stats["timed"], stats["captures"], stats["replays"]) == (1, 1, 1 + (kept == "loop-graph"))
    assert stats["samples"] == 4, "what is timed is no sample"


def test_auto_times_each_kind_of_batch_once(unet: UNet2D, watch: dict[str, float]) -> None:
    fast = auto(unet)
    fast(2)
    watch["eager"] = 0.001
    fast(3)
    assert fast.mode == "eager"
    fast(2)
    assert (fast.mode, fast.reason) == ("loop-graph", "loop-graph 3.1 ms, eager 8.0 ms for batches of 2")
    for n in (4, 5, 6, 7):
        fast(n)
    watch["eager"] = 0.1
    fast(3)
    stats = fast.stats()
    assert (fast.mode, stats["timed"], stats["captures"]) == ("eager", 6, 6), "found before its loop was evicted"
    assert stats["evictions"] == 3
    fast.scheduler = scheduler(prediction_type="v_prediction")
    fast(3)
    assert (fast.mode, fast.stats()["timed"]) == ("loop-graph", 7), "another plan"
    fast.decode = torch.tanh
    fast(3)
    assert fast.stats()["timed"] == 8


def test_what_auto_does_not_time(unet: UNet2D, recorded: Any, watch: dict[str, float]) -> None:
    asked = recorded(unet, mode="loop-graph")
    asked(2)
    assert (asked.mode, asked.reason, asked.stats().get("timed")) == ("loop-graph", "asked for", None)
    fast = auto(unet)
    fast.trajectory(2)
    assert "timed" not in fast.stats(), "a callback is the caller's own work"
    fast(2)
    assert fast.stats()["timed"] == 1


def test_auto_counts_only_what_was_asked_for(unet: UNet2D, watch: dict[str, float]) -> None:
    stops: dict[str, Any] = {"stop": "eps_norm", "threshold": 100.0, "check_every": 1}
    fast, eager = auto(unet, **stops), auto(unet, mode="eager", **stops)
    assert relative(fast(2), eager(2)) < 1e-5
    assert {k: fast.stats()[k] for k in ("stopped", "steps_saved")} == {"stopped": 2, "steps_saved": 3}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error")])
def test_auto_keeps_the_graph_where_eager_does_not_run_beside_it(
    unet: UNet2D, watch: dict[str, float], monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(runs: dict[modes.Mode, Any], device: torch.device) -> None:
        runs[GRAPH]()
        raise error

    monkeypatch.setattr(loop, "time_in_turns", full)
    fast = auto(unet)
    for _ in range(2):
        assert relative(fast(2), auto(unet, mode="eager")(2)) < 1e-5
    assert fast.mode == "loop-graph"
    assert fast.reason == "loop-graph, beside which eager does not run, for batches of 2"
    assert (fast.stats()["timed"], fast.stats()["replays"]) == (1, 2)


def test_auto_is_eager_untimed_where_nothing_can_be_captured(
    unet: UNet2D, watch: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "capture", refuse)
    fast = auto(unet)
    assert relative(fast(2), auto(unet, mode="eager")(2)) < 1e-5
    assert fast.mode == "eager"
    assert "operation not permitted" in fast.reason
    assert "timed" not in fast.stats()


def test_a_model_that_counts_its_calls_is_timed_once(watch: dict[str, float]) -> None:
    """A counter that the eager loop moves is no other model."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.weight = 0, nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return 0.1 * self.weight * x

    watch["eager"] = 0.001
    fast = auto(Counts())
    for _ in range(3):
        fast(2)
    assert (fast.mode, fast.stats()["timed"], fast.stats()["captures"]) == ("eager", 1, 1)


@pytest.mark.parametrize(("slow", "rounds"), [(1, 3), (100, 1)])
def test_runs_are_timed_in_turns_and_the_least_counts(slow: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still but for the runs, and for what a run left on the device until that is waited for."""
    now, left, order = [0.0], [0.0], list[str]()

    def wait(_: torch.device) -> None:
        now[0], left[0] = now[0] + left[0], 0.0

    def run(name: str, seconds: list[float]) -> None:
        order.append(name)
        left[0] += slow * seconds.pop(0)

    monkeypatch.setattr(modes.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    runs = {GRAPH: lambda: run("graph", graph), EAGER: lambda: run("eager", eager)}
    graph, eager = [0.03, 0.02, 0.04], [0.05, 0.01, 0.03]
    found = modes.time_in_turns(runs, torch.device("cuda"))
    assert order == ["graph", "eager"] * rounds
    assert found == pytest.approx({GRAPH: 0.02, EAGER: 0.01} if rounds == 3 else {GRAPH: 3.0, EAGER: 5.0})
