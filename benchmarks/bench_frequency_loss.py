"""frequency_loss, value and gradient, against FFT, mask and sum in PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from sbldm_fast.kernels import frequency_loss
from torch import Tensor

from .suite_kernels import OpCase, Providers, on_device, ours

module = importlib.import_module("sbldm_fast.kernels.frequency_loss")  # the package's attribute is the function


def with_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], pred: Tensor, target: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    leaf = pred.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(leaf, target)
        return value, torch.autograd.grad(value, leaf)[0]

    return step


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for N, C, side in ((16, 8, 16), (16, 4, 32), (16, 1, 128), *([(8192, 8, 16), (64, 4, 256)] if large else [])):
        for dtype in on_device(device):
            pred, target = torch.randn(2, N, C, side, side, device=device, dtype=dtype)
            low = module.low_modes(side, side, 0.25, device)

            def eager(pred: Tensor, target: Tensor, low: Tensor = low) -> Tensor:
                E = torch.fft.rfft2(pred.float() - target.float(), norm="ortho")
                half = low[:, : E.shape[-1]]
                column = torch.arange(E.shape[-1], device=E.device)
                twice = torch.where((column == 0) | (column == low.shape[1] // 2), 1.0, 2.0)
                power: Tensor = torch.where(half, 2.0, 0.5) * twice * (E.real**2 + E.imag**2)
                return power.sum() / pred.numel()

            def op(pred: Tensor, target: Tensor) -> Tensor:
                return frequency_loss(pred, target, low_weight=2.0, high_weight=0.5)

            compiled = torch.compile(eager, dynamic=False)
            providers: Providers = {
                "eager": with_gradient(eager, pred, target),
                "torch.compile": with_gradient(compiled, pred, target),
            }
            providers |= ours(with_gradient(op, pred, target))
            modes = (
                int(low.sum())
                if device.type != "meta"
                else int(module.low_modes(side, side, 0.25, torch.device("cpu")).sum())
            )
            small = side <= module.BASIS_SIDE
            # read pred and target, write the gradient; ours also scales it in a pass of its own, and by FFT moves the
            # spectrum three times
            moved, again = pred.numel() * 3 * pred.element_size(), pred.numel() * (8 if small else 32)
            flops = pred.numel() * (4 * modes if small else 60)
            yield OpCase(f"{N}x{C}x{side}x{side}", dtype, "nchw", moved, flops, 3 if small else 8, providers, again)


def test_frequency_loss(timed: Callable[[], None]) -> None:
    timed()
