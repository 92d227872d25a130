"""FastSampler against the textbook loop, and what it refuses."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor, nn

from sbldm_fast import DDPMScheduler, FastSampler, SolverTable, UNet2D

from ..small import SHAPE, UNET, make, relative, scheduler, textbook_loop


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_equals_the_textbook_loop_over_fifty_steps(unet: UNet2D, spacing: str, prediction: str, eta: float) -> None:
    sched = scheduler(timestep_spacing=spacing, prediction_type=prediction)
    got = FastSampler(unet, sched, shape=SHAPE, steps=50, mode="eager", eta=eta)(2, seed=3)
    expected = textbook_loop(unet, sched, 50, philox_normal((2, *SHAPE), 3), seed=3, eta=eta)
    assert relative(got, expected) < 1e-5


def test_ddpm_is_its_own_loop(unet: UNet2D, monkeypatch: pytest.MonkeyPatch) -> None:
    sched = DDPMScheduler(clip_sample=False)
    got = FastSampler(unet, sched, shape=SHAPE, steps=20, mode="eager")(2, seed=3)
    noises = iter([philox_normal((2, *SHAPE), 3, stream=i + 1) for i in range(20)])
    monkeypatch.setattr(
        importlib.import_module("sbldm_fast.diffusion.schedulers"), "_noise_like", lambda *_: next(noises)
    )
    expected = textbook_loop(unet, sched, 20, philox_normal((2, *SHAPE), 3))
    assert relative(got, expected) < 1e-5


def test_clipping_is_the_schedulers() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    sched = scheduler(clip_sample=True, clip_sample_range=0.5)
    got = FastSampler(model, sched, shape=SHAPE, steps=10, mode="eager")(2)
    assert relative(got, textbook_loop(model, sched, 10, philox_normal((2, *SHAPE), 0))) < 1e-5
    assert (got.abs() > 0.49).any()
    assert got.abs().max() <= 0.5 + 1e-6


def test_a_plain_callable(unet: UNet2D) -> None:
    got = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3,), steps=4)(2)
    assert relative(got, textbook_loop(lambda x, t: 0.1 * x, scheduler(), 4, philox_normal((2, 3), 0))) < 1e-5


def test_a_module_without_parameters() -> None:
    class Tenth(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    assert FastSampler(Tenth(), scheduler(), shape=(3,), steps=2)(noise=torch.ones(2, 3)).shape == (2, 3)


def test_half_precision_works_on_a_copy(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=10, mode="eager", dtype=torch.bfloat16)
    half, full = sampler(2), FastSampler(unet, scheduler(), shape=SHAPE, steps=10, mode="eager")(2)
    assert half.dtype == torch.float32
    assert next(unet.parameters()).dtype == torch.float32
    assert 0 < relative(half, full) < 0.1


def test_a_table_from_a_file_is_a_scheduler(unet: UNet2D, tmp_path: Path) -> None:

    SolverTable.from_scheduler(scheduler(), 7).save(tmp_path / "t.json")
    sampler = FastSampler(unet, SolverTable.load(tmp_path / "t.json"), shape=SHAPE, mode="eager")
    assert sampler.steps == 7
    assert torch.equal(sampler(2), FastSampler(unet, scheduler(), shape=SHAPE, steps=7, mode="eager")(2))
    assert sampler.from_latents(torch.zeros(2, *SHAPE), 0.5).shape == (2, *SHAPE)


def test_callback_and_trajectory(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", decode=torch.tanh)
    calls: list[tuple[int, float]] = []
    out = sampler(2, seed=1, callback=lambda i, t, x: calls.append((i, t)))
    assert calls == list(enumerate(sampler.timesteps))
    path = sampler.trajectory(2, seed=1)
    assert path.shape == (5, 2, *SHAPE)
    assert relative(path[-1].tanh(), out) < 1e-6
    assert relative(path[0], path[-1]) > 1e-3


def test_a_decoder_with_an_output_of_its_own_does_not_overwrite_what_it_gave() -> None:
    held = torch.zeros(2, *SHAPE)
    sampler = make(lambda x, t: 0.1 * x, decode=lambda z: held.copy_(z))
    assert torch.equal(sampler(4, batch_size=2), make(lambda x, t: 0.1 * x)(4, batch_size=2))


def test_inference_mode_and_autocast_of_a_caller_stay_the_callers() -> None:
    from sbldm_fast import UNet2D

    model = UNet2D(UNET).eval()
    nn.init.normal_(model.row_offsets, std=0.1)
    expected = make(model)(2)
    sampler = make(model)
    with torch.inference_mode():
        assert torch.equal(sampler(2), expected)
        inside = make(model)
        inside(2)
    assert torch.equal(sampler(2), expected)
    assert torch.equal(inside(2), expected)
    with torch.autocast("cpu", torch.bfloat16):
        cast = make(model)
    assert torch.equal(cast(2), expected)


def test_nan_is_named_by_step_and_sample() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        bad = (t < 500) & (torch.arange(x.shape[0]) == 1)
        return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, 0.1 * x)

    sampler = FastSampler(model, scheduler(), shape=(2, 2, 2), steps=10, mode="eager")
    with pytest.raises(
        FloatingPointError, match=r"model: NaN or infinity at step 5 \(timestep 400\) in samples \[1\]$"
    ):
        sampler(3)
    decoded = FastSampler(
        lambda x, t: 0.1 * x, scheduler(), shape=(2, 2, 2), steps=10, mode="eager", decode=lambda z: z / 0
    )
    with pytest.raises(
        FloatingPointError, match=r"decode: NaN or infinity in samples \[0, 1\], whose latents are finite"
    ):
        decoded(2)


def test_nan_is_named_by_its_number_in_the_call() -> None:
    """Sample 4 of 5, in batches of 2: the first of the last batch, whose padding is the same sample."""
    start = torch.zeros(5, 2, 2, 2)
    start[4] = 7.0

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.mean((1, 2, 3), keepdim=True) > 5) & (t < 900), torch.nan, 0.0 * x)

    sampler = FastSampler(model, scheduler(), shape=(2, 2, 2), steps=10, mode="eager")
    with pytest.raises(
        FloatingPointError, match=r"model: NaN or infinity at step 1 \(timestep 800\) in samples \[4\]$"
    ):
        sampler(noise=start, batch_size=2)


def test_bad_input_is_named(unet: UNet2D) -> None:
    def make(**arguments: Any) -> FastSampler:
        return FastSampler(unet, scheduler(), **({"shape": SHAPE, "steps": 2} | arguments))

    plain = FastSampler(lambda x, t, c: x, scheduler(), shape=SHAPE, steps=2)
    for call, message in (
        (
            lambda: make(mode="fast"),
            "mode: got 'fast', allowed are eager, compile, default, reduce-overhead, max-autotune",
        ),
        (lambda: make(mode="eager+compile"), "mode: got 'eager.compile'"),
        (lambda: make(mode="loop-graph+reduce-overhead"), "allowed in a graph are compile, max-autotune-no-cudagraphs"),
        (lambda: make(mode="loop-graph+compile"), "mode: got 'loop-graph.compile', which needs CUDA"),
        (lambda: make(stop="soon"), "stop: got 'soon', allowed are eps_norm, convergence, x0_delta and None"),
        (lambda: make(stop="eps_norm", check_every=0), "check_every: got 0"),
        (lambda: make(steps=1001), "steps: got 1001, allowed is 1 to num_train_timesteps = 1000"),
        (lambda: make()(2, batch_size=0), "batch_size: got 0"),
        (lambda: make()(2, guidance_scale=2.0), "guidance_scale: got a value without cond"),
        (lambda: make()(2, cond=torch.zeros(2, 4)), "cond: got a value, allowed is None: this model is unconditional"),
        (
            lambda: plain(2, cond=torch.zeros(3, 4)),
            "cond, uncond: got tensors of another shape, allowed is one row for each of 2",
        ),
        (
            lambda: plain(2, cond={"a": torch.zeros(2, 4)}, uncond={"b": torch.zeros(2, 4)}, guidance_scale=1.0),
            "got a of another shape",
        ),
        (lambda: plain(2, uncond=torch.zeros(2, 4), guidance_scale=1.0), "cond, uncond: got tensors"),
        (
            lambda: plain(2, cond=torch.zeros(2, 4), uncond=torch.zeros(2, 4)),
            "uncond: got a value, allowed without guidance_scale is None",
        ),
        (
            lambda: plain(2, cond=torch.zeros(2, 4), guidance_scale=float("nan")),
            "guidance_scale: got nan, allowed are finite numbers",
        ),
        (
            lambda: plain(2, cond={"a": None, "b": {"c": "text"}}),
            r"cond\['b'\]\['c'\]: got str, allowed are tensors and arrays",
        ),
        (lambda: plain(2, cond=torch.tensor(1.0)), "cond: got a number, allowed are tensors"),
        (lambda: make(threshold=0.1), "threshold: got 0.1, allowed is above 0 and, without stop, None"),
        (lambda: make(steps=True), "steps: got True, allowed is 1 to"),
        (lambda: make(shape=()), r"shape: got \(\), allowed is that of one sample"),
        (lambda: make()(2.0), "n: got 2.0, allowed is a whole number"),
        (lambda: make()(2, batch_size=1.5), "batch_size: got 1.5, allowed is a whole number"),
        (lambda: make()(2, seed=1.5), "seed: got 1.5, allowed is a whole number, or one for each sample"),
        (lambda: make()(2, seed=None), "seed: got None"),
        (lambda: make()(2, seed=torch.tensor(1)), "seed: got tensor"),
        (lambda: make()(2, seed=[1, 2.5]), "seed: got 2.5, allowed is a whole number"),
        (lambda: make()(indices=[0.5]), "indices: got 0.5, allowed is a whole number"),
        (
            lambda: make().trajectory(2, callback=print),
            "callback: got .*, allowed is None: a trajectory has one of its own",
        ),
        (lambda: make().interpolate((1, 2, 3), 4), "seeds: got 3, allowed are two"),
        (lambda: make().interpolate((1, 2), 1), "n: got 1, allowed is 2 or more"),
        (lambda: make(eta=0.5).interpolate((1, 2), 3), "scheduler: got one with noise in its steps"),
        (
            lambda: FastSampler(unet, scheduler(clip_sample=True), shape=SHAPE, steps=2).invert(torch.zeros(1, *SHAPE)),
            "clip_sample=False",
        ),
        (lambda: plain(2, cond=torch.zeros(2, 4), guidance_scale=torch.ones(3)), "guidance_scale: got 3 values"),
        (lambda: make(stop="eps_norm", threshold=-1.0), "threshold: got -1.0, allowed is above 0"),
        (lambda: make(shape=(3, 8, 8)), r"shape: got \(3, 8, 8\), allowed for this model is \(4, H, W\)"),
        (lambda: make(steps=5.5), "steps: got 5.5"),
        (
            lambda: make().trajectory(2, batch_size=1),
            "batch_size: got 1, allowed is None: a trajectory is of one batch",
        ),
        (lambda: make()(indices=[3, -1]), "indices: got -1"),
        (lambda: make().from_latents(torch.zeros(1, *SHAPE), 0.0), "strength: got 0.0, allowed is above 0 up to 1"),
        (
            lambda: FastSampler(lambda x, t: x[:, :1], scheduler(), shape=SHAPE, steps=2)(2),
            r"model: got an output of shape \(2, 1, 8, 8\)",
        ),
        (
            lambda: FastSampler(unet, object(), shape=SHAPE),
            "scheduler: got object, allowed is a scheduler with set_timesteps",
        ),
        (lambda: make(mode="loop-graph"), "mode: got 'loop-graph', which needs CUDA"),
        (lambda: make(mode="step-graph"), "mode: got 'step-graph', which needs CUDA"),
        (lambda: make(steps=0), "steps: got 0"),
        (lambda: make(eta=-1.0), "eta: got -1.0"),
        (lambda: make()(), "n, noise, indices: got none of them"),
        (lambda: make()(3, noise=torch.zeros(2, *SHAPE)), r"n, noise, indices: got \[3, 2\]"),
        (lambda: make()(noise=torch.zeros(2, 3, 8, 8)), r"noise: got shape \(2, 3, 8, 8\), allowed is \[n, 4, 8, 8\]"),
        (lambda: make()(2, seed=[1]), "seed: got 1 seeds for 2 samples"),
        (lambda: make()(2, seed=-1), "seed: got -1"),
        (lambda: make()(-2), "n: got -2, allowed is 1 or more"),
        (lambda: make()(0), "n: got 0, allowed is 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_argument_that_no_method_has_is_refused(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=2, mode="eager")
    z = torch.zeros(1, *SHAPE)
    for call in (
        lambda: sampler(1, guidance=2.0),
        lambda: list(sampler.stream(1, guidance=2.0)),
        lambda: sampler.trajectory(1, guidance=2.0),
        lambda: sampler.interpolate((1, 2), 2, guidance=2.0),
        lambda: sampler.from_latents(z, 0.5, guidance=2.0),
        lambda: sampler.from_latents(z, 0.5, noise=z),
    ):
        with pytest.raises(TypeError, match=r"guidance|noise"):
            call()
