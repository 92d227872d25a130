"""How one stage is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sbldm_fast.errors import UserError
from sbldm_fast.machine import native_half

AMP = {"auto": None, "off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SEEDS = 2**40  # below it seed * 1,000,003 + step is one of PyTorch's


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained.

    Args:
        steps: optimizer steps.
        batch_size: items a step, of all processes together.
        lr: learning rate at the end of the warmup; 2e-4 for the UNet and 1e-4 for the VAE in 001 section III.B.
        warmup: steps of linear warmup, before a cosine to zero. 001 section III.B.
        weight_decay: of AdamW. 001 section III.B.
        clip_norm: largest norm of the gradient. 001 section III.B.
        ema_decay: of the average of the weights, 0.9999 for the UNet in 001 section III.B; 0 is no average.
        save_every: steps between two checkpoints with their validations. Our choice.
        keep: checkpoints to keep, beside the best. Our choice.
        seed: of the weights, the order and the noise.
        amp: precision of the arithmetic: `auto` (what the device computes in natively), `off`, `fp16` or `bf16`.
        compile: whether the model runs through `torch.compile`.

    Raises:
        UserError: naming the argument, what came and what is allowed.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    weight_decay: float = 1e-5
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    save_every: int = 1000
    keep: int = 3
    seed: int = 0
    amp: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is above 0")
        for name in ("weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: got {self.ema_decay}, allowed is 0 to below 1")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed: got {self.seed}, allowed is 0 to {SEEDS - 1}")
        if self.amp not in AMP:
            raise UserError(f"amp: got {self.amp!r}, allowed are {', '.join(AMP)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear warmup, then a cosine to zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * self.lr * (1 + math.cos(math.pi * done))


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that `name` means on `device`, or None for float32."""
    return native_half(device) if name == "auto" else AMP[name]
