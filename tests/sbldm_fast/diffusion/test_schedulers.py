"""Schedulers against diffusers and MONAI, to the bit."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch

import sbldm_fast
from sbldm_fast import DDIMScheduler, DDPMScheduler, NoiseSchedule, preset

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that these tests compare with")


def run(scheduler: Any, steps: int, outputs: torch.Tensor, x: torch.Tensor, **step: Any) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    for t, m in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(m, t, x, generator=generator, **step).prev_sample
    return x


SPACINGS, PREDICTIONS = ("leading", "trailing", "linspace"), ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("steps", [7, 10, 30])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_are_diffusers_to_the_bit(spacing: str, schedule: str, steps: int) -> None:
    outputs, x = torch.randn(steps + 1, 2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for prediction, clip, zero in itertools.product(PREDICTIONS, (True, False), (True, False)):
        config: dict[str, Any] = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": clip}
        config |= {"rescale_betas_zero_snr": zero}
        if schedule == "trained":
            config["trained_betas"] = tuple(NoiseSchedule("cosine_ramp").betas.tolist())
        else:
            config["beta_schedule"] = schedule
        for name, ours, theirs, arguments in (
            (
                "DDIM",
                DDIMScheduler,
                diffusers.DDIMScheduler,
                [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0, "use_clipped_model_output": True}],
            ),
            ("DDPM", DDPMScheduler, diffusers.DDPMScheduler, [{}]),
        ):
            a, b = ours(**config), theirs(**config)
            assert torch.equal(a.alphas_cumprod, b.alphas_cumprod)
            for extra in arguments:
                got, expected = run(a, steps, outputs, x, **extra), run(b, steps, outputs, x, **extra)
                assert torch.equal(a.timesteps, b.timesteps)
                # zero SNR with epsilon divides by zero in both
                assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)), (name, config, extra)


def test_options_and_forward_process_are_diffusers() -> None:
    x, e, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 500, 999])
    config = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample_range": 0.7}
    a, b = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    assert torch.equal(run(a, 10, e[None].repeat(10, 1, 1, 1, 1), x), run(b, 10, e[None].repeat(10, 1, 1, 1, 1), x))
    for dtype in (torch.float32, torch.float16):
        for method in ("add_noise", "get_velocity"):
            assert torch.equal(
                getattr(a, method)(x.to(dtype), e.to(dtype), t), getattr(b, method)(x.to(dtype), e.to(dtype), t)
            )
    assert a.alphas_cumprod.dtype == torch.float32
    noise = torch.randn_like(x)
    assert torch.equal(
        a.step(e, a.timesteps[0], x, eta=0.5, variance_noise=noise).prev_sample,
        b.step(e, b.timesteps[0], x, eta=0.5, variance_noise=noise).prev_sample,
    )


def test_configs_cross_over() -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    ours = DDIMScheduler.from_config(theirs.config, timestep_spacing="trailing")
    assert (ours.config.beta_schedule, ours.config.clip_sample, ours.config.timestep_spacing) == (
        "scaled_linear",
        False,
        "trailing",
    )
    with pytest.raises(ValueError, match="thresholding: got True"):
        DDIMScheduler.from_config(diffusers.DDIMScheduler(thresholding=True).config)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_step_counts_are_named(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps: got {steps}, allowed is 1 to 1000"):
        DDIMScheduler().set_timesteps(steps)


def test_bad_steps_are_named() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        DDIMScheduler().step(x, 1, x)
    s = DDPMScheduler()
    s.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep: got 7"):
        s.step(x, 7, x)
    s = DDIMScheduler(steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset: got 1"):
        s.set_timesteps(1000)
    s.set_timesteps(10)
    with pytest.raises(ValueError, match="generator, variance_noise: got both"):
        s.step(x, 1, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


@pytest.mark.parametrize("steps", [1, 3, 10, 30, 50, 333])
@pytest.mark.parametrize(("offset", "clip"), [(0, False), (1, True)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_compat_monai_is_monai_to_the_bit(steps: int, offset: int, clip: bool, eta: float) -> None:
    schedulers = pytest.importorskip(
        "monai.networks.schedulers", reason="MONAI is the peer that this test compares with"
    )
    ours = DDIMScheduler(compat="monai", steps_offset=offset, clip_sample=clip)
    theirs = schedulers.DDIMScheduler(steps_offset=offset, clip_sample=clip)
    for s in (ours, theirs):
        s.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t in ours.timesteps:
        x, y = (
            ours.step(x.sin(), t, x, eta=eta, generator=a).prev_sample,
            theirs.step(y.sin(), t, y, eta=eta, generator=b)[0],
        )
        assert torch.equal(x, y)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("linspace", 30), ("trailing", 30), ("leading", 50)])
def test_lookup_leads_to_the_next_timestep(spacing: str, steps: int) -> None:
    ours = DDIMScheduler(prev="lookup", timestep_spacing=spacing, clip_sample=False)
    ours.set_timesteps(steps)
    times = ours.timesteps.tolist()
    assert [ours.previous_timestep(t) for t in times] == [*times[1:], -1]
    # and the step that it takes is DDIM's formula with that timestep
    x, m = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t, before = times[0], times[1]
    a, a_prev = ours.alphas_cumprod[[t, before]].double()
    x0 = (x.double() - (1 - a).sqrt() * m.double()) / a.sqrt()
    expected = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * m.double()
    torch.testing.assert_close(ours.step(m, t, x).prev_sample.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"timestep: got 7, allowed are the \d+ in self.timesteps"):
        ours.previous_timestep(7)


def test_solvers_of_diffusers_on_our_betas() -> None:
    ours, theirs = sbldm_fast.DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler
    config = {"solver_order": 2, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    a, b = ours(**config), theirs(**config)
    assert type(a) is theirs
    assert dict(a.config) == dict(b.config)
    on_ours = ours.from_config(preset("paper").scheduler, timestep_spacing="linspace")
    torch.testing.assert_close(on_ours.betas, NoiseSchedule("cosine_ramp").betas.float(), rtol=0, atol=0)
    assert on_ours.config.timestep_spacing == "linspace"
    gamma = ours(beta_schedule="gamma", gamma=2.0)
    torch.testing.assert_close(gamma.betas, NoiseSchedule("gamma", gamma=2.0).betas.float(), rtol=0, atol=0)
    again = ours.from_config(b.config)
    assert torch.equal(again.alphas_cumprod, b.alphas_cumprod)
    with pytest.raises(ValueError, match="beta_schedule: got 'odd'"):
        ours(beta_schedule="odd")


def test_solvers_of_diffusers_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for make in (
        sbldm_fast.DPMSolverMultistepScheduler,
        lambda: sbldm_fast.DPMSolverMultistepScheduler.from_config({}),
    ):
        with pytest.raises(
            ImportError, match=r"DPMSolverMultistepScheduler, .*, needs diffusers: pip install .sbldm_fast\[bench\]"
        ):
            make()


def test_presets_keep_their_schedule() -> None:
    assert torch.equal(
        DDIMScheduler.from_config(preset("paper").scheduler).betas, NoiseSchedule("cosine_ramp").betas.float()
    )
