r"""Noise schedules: betas and alphas_cumprod, built in float64.

    a_t = prod_{s<=t} (1 - beta_s),    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,    t = 0 ... T-1

The names are not alike. With beta from b0 = 1e-4 to b1 = 0.02, T = 1000, u = t/(T-1) and k = (t+1)/T:

| name            | beta_t                                                                       | a_{T-1} | SNR > 1 |
|-----------------|------------------------------------------------------------------------------|---------|---------|
| `linear`        | b0 + (b1 - b0) u                               (Ho et al. 2020)              | 4.0e-5  | t <= 258 |
| `scaled_linear` | (sqrt b0 + (sqrt b1 - sqrt b0) u)^2            (Rombach et al. 2022)         | 7.3e-4  | t <= 417 |
| `cosine_ramp`   | b0 + (b1 - b0) (1 - cos(k pi/2))               (001 equation 2)              | 6.2e-4  | t <= 431 |
| `cosine`        | 1 - f(k)/f(k - 1/T) <= 0.999, f(k) = cos^2((k + .008)/1.008 pi/2)            | 2.4e-9  | t <= 495 |
|                 |                                                (Nichol & Dhariwal 2021)      |         |         |
| `gamma`         | linear beta_t * k^gamma                        (000 section 3.5, gamma = 0.5) | 3.1e-4  | t <= 372 |

`cosine_ramp` is a cosine ramp of beta, not the cosine schedule. `gamma` moves the terminal SNR *away* from zero for
every gamma > 0 (the factor never exceeds 1), contrary to what 000 says of it; `normalise="sum"` scales the betas back
to their sum, which keeps the terminal SNR (4.0e-5 at gamma = 0.5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError

NAMES = ("linear", "scaled_linear", "cosine_ramp", "cosine", "gamma")


class NoiseSchedule:
    """The float64 tables of one schedule: `betas` and `alphas_cumprod64`, `[T]`, and `alphas_cumprod` in float32.

    Args:
        name: one of `linear`, `scaled_linear`, `cosine_ramp`, `cosine`, `gamma`; the module's table tells them apart.
        num_train_timesteps: T.
        beta_start, beta_end: first and last beta; `cosine` uses neither.
        gamma: exponent of `gamma`, >= 0.
        normalise: `"none"`, or `"sum"` for `gamma`.
        zero_terminal_snr: rescale so that a_{T-1} = 0 (`rescale_zero_terminal_snr`).

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """

    def __init__(
        self,
        name: str = "cosine_ramp",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        gamma: float = 0.5,
        normalise: str = "none",
        zero_terminal_snr: bool = False,
    ) -> None:
        if name not in NAMES:
            raise UserError(f"name: got {name!r}, allowed are {', '.join(NAMES)}")
        if num_train_timesteps < 2:
            raise UserError(f"num_train_timesteps: got {num_train_timesteps}, allowed is 2 or more")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"beta_start, beta_end: got {beta_start}, {beta_end}, allowed is 0 < start <= end < 1")
        if gamma < 0:
            raise UserError(f"gamma: got {gamma}, allowed is 0 or more")
        if normalise not in ("none", "sum"):
            raise UserError(f"normalise: got {normalise!r}, allowed are none, sum")
        T = num_train_timesteps
        k = torch.arange(1, T + 1, dtype=torch.float64) / T
        linear = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        if name == "linear":
            betas = linear
        elif name == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
        elif name == "cosine_ramp":
            betas = beta_start + (beta_end - beta_start) * (1 - (k * math.pi / 2).cos())
        elif name == "cosine":
            betas = (1 - _cosine_bar(k) / _cosine_bar(k - 1 / T)).clamp(max=0.999)
        else:
            betas = linear * k**gamma
            if normalise == "sum":
                betas = betas * (linear.sum() / betas.sum())
        self.betas = rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas
        self.alphas_cumprod64 = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_cumprod = self.alphas_cumprod64.float()


def _cosine_bar(k: Tensor) -> Tensor:
    return ((k + 0.008) / 1.008 * math.pi / 2).cos() ** 2


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas `[T]` shifted and scaled so that the last sqrt(a_t) is 0 and the first is kept.

    `sqrt(a) <- (sqrt(a) - sqrt(a_T)) * sqrt(a_0) / (sqrt(a_0) - sqrt(a_T))`.
    Source: Lin et al. 2024, arXiv:2305.08891, algorithm 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
