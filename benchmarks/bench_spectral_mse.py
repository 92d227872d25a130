"""spectral_mse, value and gradient, against Parseval's form in PyTorch: the literal transform would be a weaker
baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import spectral_mse
from torch import Tensor

from .bench_frequency_loss import with_gradient
from .suite_kernels import OpCase, Providers, on_device, ours


def eager(pred: Tensor, target: Tensor) -> Tensor:
    return pred.shape[-1] * pred.shape[-2] * F.mse_loss(pred.float(), target.float())


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for dtype in on_device(device):
        for N in (16, *([8192] if large else [])):
            pred, target = torch.randn(2, N, 8, 16, 16, device=device, dtype=dtype)
            providers: Providers = {"eager": with_gradient(eager, pred, target)}
            providers["torch.compile"] = with_gradient(torch.compile(eager, dynamic=False), pred, target)
            providers |= ours(with_gradient(spectral_mse, pred, target))
            # read both, write the gradient; ours also scales it in a pass of its own
            moved = pred.numel() * 3 * pred.element_size()
            yield OpCase(f"{N}x8x16x16", dtype, "nchw", moved, 5 * pred.numel(), 3, providers, pred.numel() * 8)


def test_spectral_mse(timed: Callable[[], None]) -> None:
    timed()
