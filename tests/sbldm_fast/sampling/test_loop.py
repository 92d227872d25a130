"""The loop in every mode: graphs, compiled steps, and samples that stop early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling import loop, modes
from sbldm_fast.sampling.sampler import MAX_LOOPS

from ..small import SHAPE, UNET, relative, scheduler


@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_graph_modes_walk_the_same_table(unet: UNet2D, mode: str, eta: float, recorded: Any) -> None:
    plain = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=eta, decode=torch.tanh)
    graphed = recorded(unet, scheduler(), mode, steps=6, eta=eta, decode=torch.tanh)
    first = graphed(2, seed=1)
    kept = first.clone()
    torch.testing.assert_close(first, plain(2, seed=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graphed(2, seed=2), plain(2, seed=2), rtol=1e-5, atol=1e-6)
    assert torch.equal(first, kept), "an output was overwritten by the next replay"
    for n in (1, 3, 4, 5, 2):
        graphed(n)
    stats = graphed.stats()
    assert (stats["captures"], stats["replays"], stats["evictions"]) == (6, 7, 2)
    assert len(graphed._loops) == MAX_LOOPS


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
def test_graphs_of_solvers_with_history_and_scaled_input(unet: UNet2D, name: str, mode: str, recorded: Any) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
    sched = getattr(diffusers, name)()
    plain = FastSampler(unet, sched, shape=SHAPE, steps=6, mode="eager")
    graphed = recorded(unet, sched, mode, steps=6)
    for seed in (1, 2):
        assert relative(graphed(2, seed=seed), plain(2, seed=seed)) < 1e-5


def test_a_callback_and_a_stop_leave_the_whole_loop_graph(unet: UNet2D, recorded: Any) -> None:
    graphed = recorded(unet, scheduler(), "loop-graph", steps=6)
    assert graphed.trajectory(2).shape == (6, 2, *SHAPE)
    graphed(2)
    assert graphed.stats()["captures"] == 2, "one of a step, one of the loop"
    stopping = recorded(unet, scheduler(), "loop-graph", steps=6, stop="eps_norm", threshold=100.0, check_every=1)
    assert (
        relative(
            stopping(2),
            FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", stop="eps_norm", threshold=100.0)(2),
        )
        < 1e-5
    )
    assert stopping.stats()["steps_saved"] == 5


def test_every_batch_is_of_one_size_and_the_last_is_padded(unet: UNet2D, recorded: Any) -> None:
    graphed = recorded(unet, scheduler(), "loop-graph", steps=6, eta=0.5)
    whole = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=0.5)(7, seed=2)
    assert relative(graphed(7, seed=2, batch_size=3), whole) < 1e-5
    stats = graphed.stats()
    assert (stats["captures"], stats["replays"], stats["pads"], stats["samples"]) == (1, 3, 2, 7)
    parts = list(graphed.stream(7, seed=2, batch_size=3))
    assert [len(p) for p in parts] == [3, 3, 1]


def test_a_model_that_cannot_be_captured_is_named_and_auto_goes_on(
    unet: UNet2D, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "capture", refuse)
    graphed = recorded(unet, scheduler(), "loop-graph", steps=6)
    with pytest.raises(
        ValueError, match="mode: got 'loop-graph', and UNet2D or decode cannot be captured: operation not permitted"
    ):
        graphed(2)
    graphed._auto, graphed._choose = True, lambda n: None
    assert graphed(2).shape == (2, *SHAPE)
    assert graphed.mode == "eager"
    assert "operation not permitted" in graphed.reason
    assert graphed.stats().get("captures", 0) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["compile", "step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cuda_modes_equal_eager(unet: UNet2D, mode: str, eta: float) -> None:
    model = UNet2D(UNET).eval()
    model.load_state_dict(unet.state_dict())
    model.cuda()
    eager, fast = (
        FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode=m, eta=eta, decode=torch.tanh)
        for m in ("eager", mode)
    )
    for seed in (0, 1, 0):
        with backend("torch"):  # else a wrong kernel would agree with itself
            expected = eager(3, seed=seed)
        assert relative(fast(3, seed=seed), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("winner", ["loop-graph", "eager"])
def test_cuda_auto_equals_eager_whichever_is_faster(unet: UNet2D, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def favour(*given: Any) -> dict[modes.Mode, float]:
        return {mode: t * (str(mode) != winner) for mode, t in modes.time_in_turns(*given).items()}

    monkeypatch.setattr(loop, "time_in_turns", favour)
    model = UNet2D(UNET).eval()
    model.load_state_dict(unet.state_dict())
    model.cuda()
    eager, auto = (
        FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode=m, eta=1.0, decode=torch.tanh)
        for m in ("eager", "auto")
    )
    for n, seed in ((3, 0), (3, 1), (5, 0), (3, 0)):
        with backend("torch"):
            expected = eager(n, seed=seed)
        assert relative(auto(n, seed=seed), expected) < 1e-4
        assert (auto.mode, f"{winner} 0.0 ms" in auto.reason, f"for batches of {n}" in auto.reason) == (
            winner,
            True,
            True,
        )
    assert (auto.stats()["timed"], auto.stats()["captures"]) == (2, 2)


def test_compile_equals_eager(unet: UNet2D) -> None:
    """History, noise and stopping at once: every buffer that a compiled step changes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a solver with history and noise")
    sched = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    arguments: dict[str, Any] = {"shape": SHAPE, "steps": 6, "stop": "convergence", "threshold": 0.1, "check_every": 1}
    eager, compiled = (FastSampler(unet, sched, mode=mode, **arguments) for mode in ("eager", "compile"))
    for seed in (1, 2):
        assert relative(compiled(3, seed=seed), eager(3, seed=seed)) < 1e-5
    assert compiled.stats()["compiled"] == 1, compiled.reason
    assert compiled.stats().get("stopped", 0) == eager.stats().get("stopped", 0) > 0


def test_compile_with_guidance_and_scaled_input() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a scheduler that scales the model's input")

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return 0.1 * x * c.mean() + c + t / 1000

    sched, cond = diffusers.EulerDiscreteScheduler(), torch.randn(2, 3, 2, 2)
    eager, compiled = (FastSampler(model, sched, shape=(3, 2, 2), steps=4, mode=mode) for mode in ("eager", "compile"))
    for c in (cond, 2 * cond):
        assert relative(compiled(2, cond=c, guidance_scale=3.0), eager(2, cond=c, guidance_scale=3.0)) < 1e-4
    assert compiled.stats()["compiled"] == 1, compiled.reason


def test_what_cannot_be_compiled_ahead_goes_through_torch_compile() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x if float(x.mean()) < 1e9 else x  # a look at the data, which torch.export refuses

    sampler = FastSampler(model, scheduler(), shape=(3, 2, 2), steps=3, mode="compile")
    assert relative(sampler(2), FastSampler(model, scheduler(), shape=(3, 2, 2), steps=3, mode="eager")(2)) < 1e-5
    assert "torch.compile, for it cannot be compiled ahead of time" in sampler.reason


@pytest.mark.parametrize(("stop", "threshold"), [("eps_norm", 0.9), ("convergence", 0.05), ("x0_delta", 0.2)])
def test_stopping_freezes_each_sample_and_returns_its_x0(unet: UNet2D, stop: str, threshold: float) -> None:
    sched, steps, n = scheduler(), 20, 3
    sampler = FastSampler(
        unet, sched, shape=SHAPE, steps=steps, mode="eager", stop=stop, threshold=threshold, check_every=3
    )
    got = sampler(n, seed=4)
    # by hand: the full run, its x0 and outputs at every step, and the first step at which each sample meets the
    # criterion
    sched.set_timesteps(steps)
    x, x0s, norms = philox_normal((n, *SHAPE), 4), [], []
    with torch.no_grad():
        for t in sched.timesteps:
            m = unet(x, t)
            x, x0 = sched.step(m, t, x)
            x0s.append(x0)
            norms.append(m.square().mean((1, 2, 3)).sqrt())
    expected, stopped = [], 0
    for k in range(n):
        for i in range(steps):
            moved = float((x0s[i][k] - x0s[i - 1][k]).square().mean().sqrt()) if i else float("inf")
            changed = abs(float(norms[i][k] / norms[i - 1][k]) - 1) if i else float("inf")
            if {"eps_norm": float(norms[i][k]), "convergence": changed, "x0_delta": moved}[stop] < threshold:
                expected.append(x0s[i][k])
                stopped += 1
                break
        else:
            expected.append(x[k])
    assert stopped > 0, "the test needs a sample that stops"
    assert sampler.stats()["stopped"] == stopped
    assert relative(got, torch.stack(expected)) < 1e-4


def test_the_papers_criterion_does_not_fire_on_noise(unet: UNet2D) -> None:
    """001 stops at RMS 0.05 of the noise prediction; noise has RMS 1 at every step."""
    sampler = FastSampler(
        lambda x, t: x / x.square().mean().sqrt(), scheduler(), shape=SHAPE, steps=20, mode="eager", stop="eps_norm"
    )
    sampler(4)
    assert "stopped" not in sampler.stats()
