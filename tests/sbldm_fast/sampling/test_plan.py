"""What a plan holds, against the model that it was made of."""

from __future__ import annotations

import torch

from sbldm_fast import FastSampler, UNet2D

from ..small import SHAPE, scheduler


def test_rows_of_time_are_the_embedding_of_each_step(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager")
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            torch.testing.assert_close(
                sampler.plan.network.predict(x, sampler.plan.time_rows[i : i + 1], {}),
                unet(x, int(t)),
                rtol=1e-5,
                atol=1e-5,
            )
