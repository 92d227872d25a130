"""What the UNet is trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbldm_fast.errors import UserError
from sbldm_fast.kernels import frequency_loss, spectral_mse


@dataclass(frozen=True)
class Objective:
    """`mean w_t |target - prediction|^2`, its two frequency bands weighed apart, plus `spectral_weight` times
    `spectral_mse`.

    Args:
        low_weight, high_weight, cutoff: of `frequency_loss` (000 section 3.6); 1, 1 is the mean squared error.
        spectral_weight: lambda of 001 equation 4, 0.1 there; by Parseval it rescales the loss by `1 + lambda H W`.
        cutmix_prob: of latent CutMix, 0.25 in 001 section III.B.
        snr_gamma: min-SNR weighting, 5 in its paper: `w_t = min(snr, gamma) / snr` for epsilon, `min(snr, gamma)` for
            x0, `min(snr, gamma) / (snr + 1)` for v, with `snr = a_t / (1 - a_t)`, and `min(snr, gamma) s_t^2` for a
            flow, whose snr is `((1 - s_t) / s_t)^2`. None: `w_t = 1`. Source: Hang et al. 2023, arXiv:2303.09556.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """

    low_weight: float = 1.0
    high_weight: float = 1.0
    cutoff: float = 0.25
    spectral_weight: float = 0.0
    cutmix_prob: float = 0.0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        for name in ("low_weight", "high_weight", "cutoff", "spectral_weight", "cutmix_prob"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 0 or more")
        for name in ("cutoff", "cutmix_prob"):
            if getattr(self, name) > 1:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 0 to 1")
        if self.low_weight == self.high_weight == self.spectral_weight == 0:
            raise UserError(
                "low_weight, high_weight, spectral_weight: got 0 three times, allowed is above 0 for one: the loss"
                " would be 0"
            )
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise UserError(f"snr_gamma: got {self.snr_gamma}, allowed is above 0, or none")

    def weights(self, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
        """`w_t`, float32 `[T]`; of a flow the table holds `1 - s_t`."""
        a = alphas_cumprod.double()
        if self.snr_gamma is None:
            return torch.ones_like(alphas_cumprod)
        flow = prediction_type == "flow_prediction"
        snr = (a / (1 - a)).square() if flow else a / (1 - a)
        least = snr.clamp(max=self.snr_gamma)
        # epsilon: 1 where snr is below gamma, also where it is 0
        if flow:  # the error of x0 is s times that of the target
            return (least * (1 - a).square()).float()
        by_kind = {"epsilon": (self.snr_gamma / snr).clamp(max=1), "sample": least, "v_prediction": least / (snr + 1)}
        return by_kind[prediction_type].float()

    def loss(self, pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """The loss of predictions and targets `[N, C, H, W]` with weights `[N]`: a float32 scalar."""
        if self.snr_gamma is not None:
            root = weights.sqrt()[:, None, None, None]  # both losses are squares of the difference
            pred, target = root * pred.float(), root * target
        if self.low_weight == self.high_weight == 1:
            loss = spectral_mse(pred, target, norm="ortho")  # the mean squared error
        else:
            loss = frequency_loss(
                pred, target, low_weight=self.low_weight, high_weight=self.high_weight, cutoff=self.cutoff
            )
        return loss + self.spectral_weight * spectral_mse(pred, target) if self.spectral_weight else loss
