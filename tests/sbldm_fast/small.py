"""Small models, a scheduler, and the loop that samplers are compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import (
    AutoencoderKL,
    DDIMScheduler,
    FastSampler,
    Pipeline,
    SchedulerConfig,
    UNet2D,
    UNetConfig,
    VAEConfig,
)
from sbldm_fast.models.covariates import Covariate

SHAPE = (4, 8, 8)
UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_resolutions=(4,),
    norm_num_groups=8,
    time_embed_dim=32,
)
AGE = Covariate("age", low=20.0, high=80.0, unit="years", definition="at the scan")
MODALITY = Covariate("modality", ("T1", "T2", "FLAIR"))
ASKED = replace(UNET, covariates=(AGE, MODALITY))
VAE = VAEConfig(sample_size=16, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)


def scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(**({"beta_schedule": "cosine_ramp", "clip_sample": False} | config))


def small_pipeline(unet: UNetConfig = UNET) -> Pipeline:
    config = SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False)
    return Pipeline(AutoencoderKL(VAE), trained(unet), config)


def trained(config: UNetConfig) -> UNet2D:
    """A UNet in which nothing is 0, so that a condition changes what it predicts."""
    torch.manual_seed(1)
    model = UNet2D(config).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def make(model: Any, **arguments: Any) -> FastSampler:
    return FastSampler(model, scheduler(), **({"shape": SHAPE, "steps": 3, "mode": "eager"} | arguments))


def textbook_loop(model: Any, sched: Any, steps: int, x: Tensor, seed: int = 0, **arguments: Any) -> Tensor:
    """The loop of a textbook, with noise from the stream that FastSampler documents."""
    sched.set_timesteps(steps)
    with torch.no_grad():
        for i, t in enumerate(sched.timesteps):
            z = philox_normal(x.shape, seed, stream=i + 1)
            extra = {"variance_noise": z} if arguments.get("eta") else {}
            x = sched.step(model(x, t), t, x, **arguments, **extra).prev_sample
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
