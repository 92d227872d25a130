"""Schedulers that no table describes, stepped as they are: their own results, each sample's own noise, and errors with
a name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling.stepped import seed_of

from ..small import SHAPE as LATENT
from ..small import relative, textbook_loop

diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
SHAPE = (3, 4, 4)


def tenth(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def make(name: str, steps: int = 6, **config: Any) -> FastSampler:
    with pytest.warns(UserWarning, match="stepped as it is, without a table"):
        return FastSampler(tenth, getattr(diffusers, name)(**config), shape=SHAPE, steps=steps)


DRAWING = [
    ("UnCLIPScheduler", {}),
    ("CMStochasticIterativeScheduler", {}),
    ("LCMScheduler", {"clip_sample": True}),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 3.0, "clip_sample": False}),
]


@pytest.mark.parametrize(("name", "config"), DRAWING)
def test_a_samples_noise_is_its_own_whatever_the_batch(name: str, config: dict[str, Any]) -> None:
    sampler = make(name, **config)
    whole = sampler(4, seed=2)
    assert relative(sampler(indices=[2], seed=2), whole[2:3]) < 1e-5
    assert relative(sampler(4, seed=2, batch_size=3), whole) < 1e-5
    assert relative(sampler(indices=[1, 1], seed=2), whole[[1, 1]]) < 1e-5
    assert relative(sampler(4, seed=3), whole) > 1e-3
    same = sampler(noise=whole[:1].expand(4, *SHAPE), seed=2)
    assert all(relative(same[i : i + 1], same[:1]) > 1e-3 for i in (1, 2, 3)), (
        "the noise of the steps is another for each"
    )
    assert relative(sampler(noise=whole[:1], seed=2 + 2**32), same[:1]) > 1e-3


def test_what_needs_a_table_says_that_there_is_none() -> None:
    sampler = make("UnCLIPScheduler")
    with pytest.raises(ValueError, match="got UnCLIPScheduler, allowed is one that a SolverTable describes"):
        _ = sampler.table
    with pytest.raises(ValueError, match="allowed to start from latents is one with add_noise and a table"):
        sampler.from_latents(torch.zeros(1, *SHAPE), 0.5)


@pytest.mark.parametrize(("name", "config"), DRAWING)
def test_it_is_the_schedulers_own_loop_with_that_generator(name: str, config: dict[str, Any]) -> None:
    sampler = make(name, **config)
    got = sampler(1, seed=[7])
    scheduler = copy.deepcopy(sampler.scheduler)
    scheduler.set_timesteps(6)
    x, generator = (
        philox_normal((1, *SHAPE), 7) * scheduler.init_noise_sigma,
        torch.Generator().manual_seed(seed_of(7, 0)),
    )
    times = [*scheduler.timesteps, None]
    for i, t in enumerate(scheduler.timesteps):
        following = {"prev_timestep": times[i + 1]} if name == "UnCLIPScheduler" else {}
        h = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(tenth(h, t), t, x, generator=generator, **following).prev_sample
    assert relative(got, x) < 1e-5


def test_unclip_takes_strides_and_not_single_steps() -> None:
    """An exact model of N(0, 0.5^2): 25 steps must come near that spread, as UnCLIPPipeline's loop does."""
    scheduler = diffusers.UnCLIPScheduler(clip_sample=False, prediction_type="sample")
    alphas = scheduler.alphas_cumprod

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = alphas[t.long()]
        return x * a.sqrt() * 0.25 / (a * 0.25 + 1 - a)

    std = float(FastSampler(model, scheduler, shape=(3, 16, 16), steps=25, mode="eager")(16, seed=1).std())
    assert abs(std - 0.436) < 0.02, "UnCLIPPipeline's own loop; strides taken for single steps give 0.7"


@pytest.mark.parametrize("steps", [2, 4, 9])
def test_eta_is_passed_as_it_is_given(steps: int) -> None:
    """TCD is the one scheduler whose own eta is not 0."""
    scheduler = diffusers.TCDScheduler()

    def own(**eta: float) -> Tensor:
        fresh = diffusers.TCDScheduler()
        fresh.set_timesteps(steps)
        x = philox_normal((2, *SHAPE), 5) * fresh.init_noise_sigma
        for i, t in enumerate(fresh.timesteps):
            z = iter([philox_normal((2, *SHAPE), 5, stream=i + 1)])
            original = diffusers.schedulers.scheduling_tcd.randn_tensor
            diffusers.schedulers.scheduling_tcd.randn_tensor = lambda *_, z=z, **__: next(z)
            try:
                x = fresh.step(tenth(x, t), t, x, **eta).prev_sample
            finally:
                diffusers.schedulers.scheduling_tcd.randn_tensor = original
        return x

    zero = FastSampler(tenth, scheduler, shape=SHAPE, steps=steps, mode="eager", eta=0.0)
    assert not zero.table.stochastic
    assert relative(zero(2, seed=5), own(eta=0.0)) < 1e-4
    default = FastSampler(tenth, scheduler, shape=SHAPE, steps=steps, mode="eager")
    assert default.table.stochastic
    assert relative(default(2, seed=5), own()) < 1e-4


def test_learned_variance_is_named_and_stepped() -> None:
    with pytest.warns(
        UserWarning, match="DDPMScheduler is stepped as it is, without a table: its model also predicts the variance"
    ):
        sampler = FastSampler(
            lambda x, t: torch.cat([0.1 * x, 0 * x], 1),
            diffusers.DDPMScheduler(variance_type="learned_range"),
            shape=SHAPE,
            steps=4,
        )
    assert sampler(2).isfinite().all()
    with pytest.warns(UserWarning, match="stepped as it is"):
        one = FastSampler(tenth, diffusers.DDPMScheduler(variance_type="learned_range"), shape=SHAPE, steps=4)
    with pytest.raises(ValueError, match="scheduler: DDPMScheduler failed at step 0 of 4 on what this model gives: "):
        one(2)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("CogVideoXDPMScheduler", {}),
        ("RePaintScheduler", {}),
        ("DDPMWuerstchenScheduler", {}),
        ("HeliosScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*stepped as it is")
def test_what_cannot_be_stepped_either_is_refused_by_name(name: str, config: dict[str, Any]) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(ValueError, match=name):
        FastSampler(tenth, getattr(diffusers, name)(**config), shape=SHAPE, steps=5)(2)


@pytest.mark.filterwarnings("ignore:.*stepped as it is")
def test_a_schedulers_own_nan_is_not_blamed_on_the_model() -> None:
    scheduler = diffusers.LCMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(
        FloatingPointError, match="scheduler: LCMScheduler makes NaN or infinity of finite numbers at step 0"
    ):
        FastSampler(tenth, scheduler, shape=SHAPE, steps=4)(2)


def test_guidance_and_a_callback_through_the_schedulers_own_steps() -> None:
    scheduler = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0, clip_sample=False)
    with pytest.warns(UserWarning, match="stepped as it is"):
        sampler = FastSampler(lambda x, t, c: 0.1 * x + c, scheduler, shape=SHAPE, steps=4, eta=1.0)
    cond, seen = torch.randn(2, *SHAPE), []
    out = sampler(2, cond=cond, guidance_scale=1.0, callback=lambda i, t, x: seen.append(t))
    assert relative(out, sampler(2, cond=cond)) < 1e-4
    assert seen == sampler.timesteps


def test_a_stepped_schedulers_noise_is_the_samples_own() -> None:
    sched = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0, clip_sample=False)
    with pytest.warns(UserWarning, match="stepped as it is"):
        sampler = FastSampler(lambda x, t: 0.1 * x, sched, shape=(2, 4, 4), steps=4, eta=1.0)
    whole = sampler(4, seed=2)
    assert relative(sampler(4, seed=2, batch_size=2), whole) < 1e-5
    assert relative(sampler(indices=[3], seed=2), whole[3:]) < 1e-5
    assert relative(whole[:1], whole[1:2]) > 1e-2


def test_what_no_table_describes_is_stepped_and_counted(unet: UNet2D) -> None:
    sched = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0, clip_sample=False)
    with pytest.warns(UserWarning, match="DDIMScheduler is stepped as it is, without a table: x0 of step"):
        sampler = FastSampler(unet, sched, shape=LATENT, steps=8)
    assert sampler.mode == "eager"
    got = sampler(2, seed=3)
    expected = textbook_loop(unet, sched, 8, philox_normal((2, *LATENT), 3))
    assert relative(got, expected) < 1e-4  # quantiles magnify rounding
    sampler(2)
    assert sampler.stats()["fallbacks"] == 2
    with (
        pytest.raises(ValueError, match="mode, stop: got 'compile', None"),
        pytest.warns(UserWarning, match="stepped as it is"),
    ):
        FastSampler(unet, sched, shape=LATENT, steps=8, mode="compile")
