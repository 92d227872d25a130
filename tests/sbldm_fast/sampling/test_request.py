"""Which noise a sample has, that of its seed and index, whatever the batch; and what it is asked to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import FastSampler, UNet2D, UNetConfig

from ..small import ASKED, SHAPE, UNET, make, relative, scheduler, textbook_loop, trained


def test_a_sample_depends_on_its_seed_and_number_alone(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", eta=0.3)
    whole = sampler(7, seed=9)
    for first, n in ((0, 1), (0, 4), (3, 4), (6, 1)):
        assert relative(sampler(indices=range(first, first + n), seed=9), whole[first : first + n]) < 1e-5
    assert torch.equal(sampler(7, seed=9), whole)
    listed = sampler(3, seed=[9, 10, 9])
    assert relative(listed[:1], whole[:1]) < 1e-5
    assert relative(listed[2:], listed[:1]) < 1e-5
    assert relative(listed[1:2], listed[:1]) > 1e-2


def test_noise_in_place_of_a_count(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=3)
    assert torch.equal(sampler(noise=philox_normal((2, *SHAPE), 4)), sampler(2, seed=4))


WAYS: list[dict[str, Any]] = [
    {},
    {"conditioning": ("cross_attention",)},
    {"conditioning": ("context", "concat")},
    {"concat_channels": 2},
]


def asked_for(config: UNetConfig, n: int) -> dict[str, Any]:
    maps = torch.randn(n, config.concat_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    values = {"age": [20.0, None, 80.0, 50.0, 33.3][:n], "modality": ["T2", "T1", None, "FLAIR", "T1"][:n]}
    return values | ({"maps": maps} if config.concat_channels else {})


@pytest.mark.parametrize("way", WAYS)
def test_a_condition_is_what_the_model_is_given_at_every_step(way: dict[str, Any]) -> None:
    model = trained(replace(ASKED, **way))
    cond = asked_for(model.config, 5)
    x = philox_normal((5, *SHAPE), 3)
    plain = textbook_loop(lambda x, t: model(x, t, cond), scheduler(), 3, x)
    sampler = make(model)
    whole = sampler(5, seed=3, cond=cond)
    assert relative(whole, plain) < 1e-5
    assert relative(sampler(5, seed=3), plain) > 1e-3, "what is not asked for is unknown"
    padded = sampler(5, seed=3, cond=cond, batch_size=2)
    assert relative(padded, whole) < 1e-5
    for i in (0, 4):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        assert relative(sampler(indices=[i], seed=3, cond=one), whole[i : i + 1]) < 1e-5


@pytest.mark.parametrize("mode", ["eager", "step-graph", "loop-graph"])
def test_guidance_goes_from_nothing_known_to_the_condition(mode: str, recorded: Any) -> None:
    model = trained(ASKED)
    cond, w = asked_for(model.config, 3), torch.tensor([1.0, 2.5, 0.0])

    def guided(x: Tensor, t: Any) -> Tensor:
        m_u, m_c = model(x, t), model(x, t, cond)
        return m_u + (w if low <= float(t) <= high else torch.ones(3))[:, None, None, None] * (m_c - m_u)

    x = philox_normal((3, *SHAPE), 3)
    sampler = recorded(model, mode=mode) if mode != "eager" else make(model)
    times = sampler.timesteps
    for low, high in ((-1.0, 1000.0), (times[1], times[1]), (times[2], times[1]), (times[0], 5000.0)):
        plain = textbook_loop(guided, scheduler(), 3, x)
        made = sampler(3, seed=3, cond=cond, guidance_scale=w, guidance_interval=(low, high))
        assert relative(made, plain) < 1e-5, (low, high)
    low, high = -1.0, 1000.0
    everywhere = sampler(3, seed=3, cond=cond, guidance_scale=w)
    assert relative(everywhere, textbook_loop(guided, scheduler(), 3, x)) < 1e-5


def test_an_interval_holds_where_a_scheduler_is_stepped() -> None:
    model = trained(ASKED)
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a scheduler with thresholding")
    sched = diffusers.DDIMScheduler(thresholding=True, sample_max_value=100.0, clip_sample=False)
    with pytest.warns(UserWarning, match="without a table"):
        sampler = FastSampler(model, sched, shape=SHAPE, steps=3)
    cond = {"age": 30.0}
    times = sampler.timesteps
    within = sampler(2, cond=cond, guidance_scale=3.0, guidance_interval=(times[2], times[1]))
    always, never = sampler(2, cond=cond, guidance_scale=3.0), sampler(2, cond=cond)
    assert relative(within, always) > 1e-4
    assert relative(within, never) > 1e-4


def test_a_model_with_hooks_is_asked_like_any() -> None:
    for config in (ASKED, replace(ASKED, concat_channels=2)):
        model = trained(config)
        cond = asked_for(config, 3)
        plain = make(model)(3, cond=cond)
        model.register_forward_hook(lambda *_: None)
        assert relative(make(model)(3, cond=cond), plain) < 1e-5


def test_a_condition_changes_along_an_arc_and_from_an_image() -> None:
    sampler = make(trained(ASKED), steps=30)
    ages = torch.linspace(20, 80, 3)
    aged = sampler.interpolate((4, 4), 3, cond={"age": ages})
    for i, age in enumerate(ages):
        assert relative(aged[i : i + 1], sampler(1, seed=4, cond={"age": age})) < 1e-5
    z = sampler(1, seed=4, cond={"age": 20})
    older = sampler.from_latents(z, 0.7, cond={"age": 80})
    assert relative(older, sampler.from_latents(z, 0.7, cond={"age": 20})) > 3e-5
    noise = sampler.invert(z, cond={"age": 20})
    again, other = (relative(sampler(noise=noise, cond={"age": age}), z) for age in (20, 80))
    assert again < 0.2 * other


def test_samples_that_stop_are_asked_too() -> None:
    model = trained(ASKED)
    stopping = make(model, steps=6, stop="eps_norm", threshold=1e-9)
    cond = {"age": [20.0, 80.0]}
    assert relative(stopping(2, cond=cond), make(model, steps=6)(2, cond=cond)) < 1e-5


def test_what_cannot_be_asked_is_named() -> None:
    sampler, plain = make(trained(ASKED)), make(trained(UNET))
    maps = make(trained(replace(ASKED, concat_channels=2)))
    cases: list[tuple[Any, str]] = [
        (lambda: plain(2, cond={"age": 30}), "cond: got a value, allowed is None: this model is unconditional"),
        (lambda: sampler(2, cond=torch.zeros(2, 2)), "cond: got Tensor, allowed is a mapping of age, modality"),
        (lambda: sampler(2, cond={"ages": 30}), "cond: got 'ages', allowed are age, modality"),
        (lambda: sampler(2, cond={"age": 81}), r"cond\['age'\]: got 81, the model was trained on 20 to 80 years"),
        (lambda: sampler(2, cond={"age": float("nan")}), r"cond\['age'\]: got nan, allowed is 20 to 80 years; None"),
        (lambda: sampler(2, cond={"age": {30, 40}}), r"cond\['age'\]: got set, allowed is a value or a list of them"),
        (lambda: sampler(2, cond={"modality": "PD"}), r"cond\['modality'\]: got 'PD', allowed is T1 or T2 or FLAIR"),
        (lambda: sampler(2, cond={"age": [30, 40, 50]}), r"cond\['age'\]: got 3 values, allowed is one, or 2"),
        (lambda: sampler(2, cond={"maps": torch.zeros(2, 2, 8, 8)}), r"cond\['maps'\]: got shape .*, allowed is none"),
        (lambda: maps(2, cond={"age": 30}), r"cond\['maps'\]: got none, allowed is \[2, 2, H, W\]"),
        (lambda: sampler(2, guidance_scale=2.0), "guidance_scale: got a value without cond"),
        (lambda: sampler(2, cond={}, guidance_interval=(0, 9)), "guidance_interval: got a value, allowed without"),
        (
            lambda: sampler(2, cond={}, guidance_scale=2.0, guidance_interval=(9, 0)),
            "guidance_interval: got 9 to 0, allowed is a lower timestep, then a higher one",
        ),
        (
            lambda: sampler(2, cond={}, guidance_scale=2.0, guidance_interval=(9,)),
            "guidance_interval: got .*, allowed are two timesteps",
        ),
        (
            lambda: sampler(2, cond={}, guidance_scale=2.0, guidance_interval="12"),  # type: ignore[arg-type]
            "guidance_interval: got .*, allowed is a lower timestep, then a higher one",
        ),
        (
            lambda: sampler(2, cond={}, guidance_scale=2.0, guidance_interval=(0.2, 0.8)),
            "guidance_interval: got 0.2 to 0.8, allowed is one with timesteps of this run, which are [0-9]+ to [0-9]+",
        ),
        (lambda: sampler(2, cond={}, guidance_scale="2"), "guidance_scale: got '2', allowed are numbers"),  # type: ignore[arg-type]
        (lambda: sampler(2, cond={}, guidance_scale=[1, None]), "guidance_scale: got .*, allowed are numbers"),  # type: ignore[arg-type]
        (lambda: sampler(2, uncond={"age": 90}, cond={}, guidance_scale=2.0), r"uncond\['age'\]: got 90"),
        (lambda: sampler.invert(torch.zeros(1, *SHAPE), cond={"age": 90}), r"cond\['age'\]: got 90"),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.warns(UserWarning, match="81 lies outside 20 to 80 years"):
        sampler(2, cond={"age": 81}, extrapolate=True)
    with pytest.warns(UserWarning, match=r"uncond\['age'\]: 81 lies outside"):
        sampler(2, cond={}, uncond={"age": 81}, guidance_scale=2.0, extrapolate=True)
    with pytest.warns(UserWarning, match="81 lies outside 20 to 80 years"):
        sampler.invert(torch.zeros(1, *SHAPE), cond={"age": 81}, extrapolate=True)
