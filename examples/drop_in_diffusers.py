"""A diffusers model under `FastSampler`: `python examples/drop_in_diffusers.py` (extra `bench`, which has diffusers).

The model and the scheduler stay diffusers' own objects; the loop around them is replaced. The weights are random, so
the example checks the latents against diffusers' loop and does not look at them. `sbldm-fast bench sampling` has times.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from sbldm_fast import FastSampler


def loop_of_diffusers(unet: UNet2DModel, scheduler: DDIMScheduler, noise: Tensor, steps: int) -> Tensor:
    """The loop that users of diffusers write."""
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


def main(arguments: list[str] | None = None) -> None:
    """Sample twice from one noise and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=4, help="how many latents")
    parser.add_argument("--steps", type=int, default=20, help="solver steps")
    parser.add_argument("--mode", default="eager", help="compile is faster on a CPU once it has compiled")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, in_channels=8, out_channels=8, block_out_channels=(32, 64), **blocks).eval()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    noise = torch.randn(options.n, 8, 16, 16)

    sampler = FastSampler(unet, scheduler, shape=(8, 16, 16), steps=options.steps, mode=options.mode)
    ours = sampler(noise=noise)
    theirs = loop_of_diffusers(unet, scheduler, noise, options.steps)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{options.n} latents beside diffusers' own loop: largest relative error {error:.1e}")


if __name__ == "__main__":
    main()
