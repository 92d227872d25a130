"""Which noise a sample has: that of its seed and index, whatever the batch."""

from __future__ import annotations

import torch
from sbldm_fast.kernels import philox_normal

from sbldm_fast import FastSampler, UNet2D

from ..small import SHAPE, relative, scheduler


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
