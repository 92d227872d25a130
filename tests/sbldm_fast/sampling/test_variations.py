"""Interpolation, image to image, and inversion."""

from __future__ import annotations

import pytest
import torch
from sbldm_fast.kernels import philox_normal

from sbldm_fast import FastSampler, UNet2D

from ..small import SHAPE, relative, scheduler


def test_interpolation_ends_at_the_two_seeds(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager")
    between = sampler.interpolate((3, 8), 5)
    assert relative(between[[0, -1]], sampler(2, seed=[3, 8])) < 1e-4
    assert relative(sampler.interpolate((3, 3), 2), sampler(2, seed=[3, 3])) < 1e-6
    a, b = (philox_normal((1, *SHAPE), s) for s in (3, 8))
    # halfway on an arc, to the first order in their lengths
    middle = (a + b) / (a + b).norm() * (a.norm() + b.norm()) / 2
    assert relative(between[2:3], sampler(noise=middle)) < 0.05


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_from_latents_is_diffusers_img2img(unet: UNet2D, name: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
    sched, z = getattr(diffusers, name)(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.3
    got = FastSampler(unet, sched, shape=SHAPE, steps=10, mode="eager").from_latents(z, 0.4, seed=7)
    sched.set_timesteps(10)
    start = 6 * sched.order
    times = sched.timesteps[start:]
    x = sched.add_noise(z, philox_normal((2, *SHAPE), 7), times[:1])
    if hasattr(sched, "set_begin_index"):
        sched.set_begin_index(start)
    with torch.no_grad():
        for t in times:
            x = sched.step(unet(sched.scale_model_input(x, t), t), t, x).prev_sample
    assert relative(got, x) < 1e-4


def test_from_latents_numbers_its_noise(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=0.5)
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    whole = sampler.from_latents(z, 0.5, seed=3)
    assert relative(sampler.from_latents(z[2:], 0.5, seed=3, indices=[2]), whole[2:]) < 1e-5


def test_inversion_finds_the_noise(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=50, mode="eager")
    noise = philox_normal((2, *SHAPE), 6)
    found = sampler.invert(sampler(noise=noise))
    assert relative(found, noise) < 1e-3
    with pytest.raises(ValueError, match="a step that forgets x"):
        FastSampler(unet, scheduler(prediction_type="sample"), shape=SHAPE, steps=5, mode="eager").invert(noise)
    with pytest.raises(ValueError, match="allowed is a deterministic first-order one"):
        FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", eta=1.0).invert(noise)
