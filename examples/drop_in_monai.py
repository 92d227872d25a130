"""A MONAI model, conditioned and guided, under `FastSampler`: `python examples/drop_in_monai.py` (extra `bench`).

`cond` goes in under the model's own argument, here `context`; `guidance_scale` adds the unconditional pass. The
weights are random, so the example checks the latents against MONAI's loop and does not look at them.
"""

from __future__ import annotations

import argparse

import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor

from sbldm_fast import FastSampler

GUIDANCE = 3.0


def loop_of_monai(unet: DiffusionModelUNet, scheduler: DDIMScheduler, noise: Tensor, context: Tensor) -> Tensor:
    """The loop that users of MONAI write, with classifier-free guidance."""
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = t.repeat(len(x))
            plain = unet(x, times, context=torch.zeros_like(context))
            guided = plain + GUIDANCE * (unet(x, times, context=context) - plain)
            x = scheduler.step(guided, int(t), x)[0]
    return x


def main(arguments: list[str] | None = None) -> None:
    """Sample twice from one noise and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=4, help="how many latents")
    parser.add_argument("--steps", type=int, default=20, help="solver steps")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    attention = {"attention_levels": (False, True), "num_head_channels": 16}
    condition = {"with_conditioning": True, "cross_attention_dim": 8}
    sizes = {"channels": (16, 32), "num_res_blocks": 1, "norm_num_groups": 8}
    unet = DiffusionModelUNet(spatial_dims=2, in_channels=4, out_channels=4, **sizes, **attention, **condition).eval()
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(options.steps)
    noise, context = torch.randn(options.n, 4, 16, 16), torch.randn(options.n, 1, 8)

    sampler = FastSampler(unet, scheduler, shape=(4, 16, 16), steps=options.steps, mode="eager")
    ours = sampler(noise=noise, cond={"context": context}, guidance_scale=GUIDANCE)
    theirs = loop_of_monai(unet, scheduler, noise, context)
    print(f"{len(ours)} latents, largest relative error {float((ours - theirs).abs().max() / theirs.abs().max()):.1e}")


if __name__ == "__main__":
    main()
