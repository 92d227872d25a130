"""The numbers of every step of a DDIM-like run, taken out of a scheduler before the loop starts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import DDIMScheduler, DDPMScheduler


class DDIMTable(NamedTuple):
    """A run of `ddim_step`: `timesteps` of length S, `alpha_bar` and `alpha_bar_prev` as float64 `[S]`, and what is constant."""

    timesteps: list[int]
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    eta: float
    prediction_type: str
    clip_range: float | None


def ddim_table(scheduler: Any, steps: int, eta: float = 0.0) -> DDIMTable:
    """The table of `scheduler`, DDIM or DDPM of ours or of diffusers, for `steps` steps; the scheduler itself is left as it is.

    alphas_cumprod are the scheduler's own float32 numbers: the table and `step` are one solver, to rounding. DDPM without
    clipping is DDIM with eta = 1 (Song et al. 2021, section 4.1).

    Raises:
        ValueError: another scheduler, an `eta` that it does not take, a clipped DDPM, or epsilon from a zero terminal SNR.
    """
    kinds = {"DDIMScheduler": DDIMScheduler, "DDPMScheduler": DDPMScheduler}
    kind = kinds.get(type(scheduler).__name__)
    if kind is None or not hasattr(scheduler, "config"):
        raise ValueError(
            f"scheduler: got {type(scheduler).__module__}.{type(scheduler).__name__}, "
            f"allowed are {', '.join(kinds)} of sbldm_fast or diffusers"
        )
    own = kind.from_config(scheduler.config)
    own.set_timesteps(steps)
    c = own.config
    if kind is DDPMScheduler:
        if c.clip_sample:
            raise ValueError("scheduler: got DDPMScheduler with clip_sample=True, allowed is clip_sample=False (latents exceed 1)")
        eta = 1.0
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, allowed is 0 to 1")
    bars, timesteps = own.alphas_cumprod.double(), own.timesteps.tolist()
    last = bars.new_tensor(1.0) if kind is DDPMScheduler else own.final_alpha_cumprod.double()
    before = [own.previous_timestep(t) for t in timesteps]
    alpha_bar = bars[timesteps]
    if c.prediction_type == "epsilon" and bool((alpha_bar == 0).any()):
        raise ValueError("rescale_betas_zero_snr: x0 cannot be had from epsilon at zero SNR, allowed are sample and v_prediction")
    alpha_bar_prev = torch.stack([bars[t] if t >= 0 else last for t in before])
    return DDIMTable(timesteps, alpha_bar, alpha_bar_prev, eta, c.prediction_type, c.clip_sample_range if c.clip_sample else None)
