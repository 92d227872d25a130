r"""The mean squared error of two Fourier transforms, without a Fourier transform.

    mean |FFT2(pred) - FFT2(target)|^2 = factor mean (pred - target)^2
    dpred = 2 factor / numel (pred - target) = -dtarget
    factor = H W (norm "backward"), 1 ("ortho": the mean squared error itself), 1 / (H W) ("forward")

This is Parseval's theorem: the loss favors no frequency, it rescales the mean squared error. Infinity gives infinity,
where a literal transform gives NaN. Layouts: any strides; where pred and target lie alike and without gaps, in one run.
Source: 001 equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_float, check_like
from ._backend import needs_grad, resolve, tl, triton
from .frequency_loss import backward, offset, setup_context

NORMS = ("backward", "ortho", "forward")
BLOCK = 2048


def spectral_mse_reference(pred: Tensor, target: Tensor, norm: str = "backward") -> Tensor:
    """The specification, taken literally, in float32."""
    E = torch.fft.fft2(pred.float() - target.float(), norm=norm)
    power: Tensor = E.real.square() + E.imag.square()
    return power.mean()


@triton.jit
def _spectral_mse_kernel(
    pred, target, grad, sums, strides, C, H, W, numel, factor: tl.constexpr, ALIKE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    if ALIKE:
        at_p, at_t, at_g = i, i, i
    else:
        x, y, c, n = i % W, i // W % H, i // W // H % C, i // W // H // C
        pred_strides, target_strides, grad_strides = strides
        at_p = offset(n, c, y, x, pred_strides)
        at_t = offset(n, c, y, x, target_strides)
        if grad is not None:
            at_g = offset(n, c, y, x, grad_strides)
    p = tl.load(pred + at_p, mask=mask, other=0.0).to(tl.float32)
    e = p - tl.load(target + at_t, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(e * e))
    if grad is not None:
        tl.store(grad + at_g, e * (2.0 * factor / tl.cast(numel, tl.float32)), mask=mask)


@triton.jit
def _mean_kernel(sums, loss, rows, numel, factor: tl.constexpr, BLOCK: tl.constexpr):
    # one program, so that the order of the sum is one
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < rows, other=0.0)
    tl.store(loss, factor * tl.sum(total) / tl.cast(numel, tl.float32))


torch.library.define(
    "sbldm_fast::spectral_mse",
    "(Tensor pred, Tensor target, float factor, bool gradient) -> (Tensor loss, Tensor grad)",
)


@torch.library.register_fake("sbldm_fast::spectral_mse")
def _allocate(pred: Tensor, target: Tensor, factor: float, gradient: bool) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(pred, dtype=torch.float32) if gradient else pred.new_empty(0, dtype=torch.float32)
    return pred.new_empty((), dtype=torch.float32), grad


def _launch(pred: Tensor, target: Tensor, factor: float, gradient: bool) -> tuple[Tensor, Tensor]:
    loss, grad = _allocate(pred, target, factor, gradient)
    _, C, H, W = pred.shape
    strides = (pred.stride(), target.stride(), grad.stride() if gradient else None)
    dense = pred.is_contiguous() or pred.is_contiguous(memory_format=torch.channels_last)
    alike = dense and pred.stride() == target.stride() and (not gradient or grad.stride() == pred.stride())
    block = BLOCK if alike else BLOCK // 4  # three addresses an element fill the registers
    rows = triton.cdiv(pred.numel(), block)
    sums = torch.empty(rows, dtype=torch.float32, device=pred.device)
    with torch.cuda.device_of(pred):
        if rows:
            _spectral_mse_kernel[(rows,)](
                pred,
                target,
                grad if gradient else None,
                sums,
                strides,
                C,
                H,
                W,
                pred.numel(),
                factor=factor,
                ALIKE=alike,
                BLOCK=block,
            )
        _mean_kernel[(1,)](sums, loss, rows, pred.numel(), factor=factor, BLOCK=1024)
    return loss, grad


torch.library.impl("sbldm_fast::spectral_mse", ("cpu", "cuda"), _launch)


torch.library.register_autograd("sbldm_fast::spectral_mse", backward, setup_context=setup_context)


def spectral_mse(pred: Tensor, target: Tensor, *, norm: str = "backward") -> Tensor:
    """`mean |FFT2(pred) - FFT2(target)|^2`, a float32 scalar: by Parseval a multiple of the mean squared error.

    Args:
        pred, target: `[N, C, H, W]`, float32, float16 or bfloat16 each, any strides; computed in float32, also under
            autocast.
        norm: that of `torch.fft.fft2`: `"backward"` (H W times the mean squared error), `"ortho"` (once) or `"forward"`
            (1 / (H W)).

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: 001 equation 4.
    """
    check_float("pred", pred, "[N, C, H, W]")
    check_like("target", target, pred, "pred", dtype=False)
    if norm not in NORMS:
        raise UserError(f"norm: got {norm!r}, allowed are {', '.join(NORMS)}")
    pixels = float(pred.shape[2] * pred.shape[3])
    factor = {"backward": pixels, "ortho": 1.0, "forward": 1.0 / max(pixels, 1.0)}[norm]
    if resolve(pred.device)[0] == "torch":
        return factor * (pred.float() - target.float()).square().mean()
    loss: Tensor = torch.ops.sbldm_fast.spectral_mse(pred, target, factor, needs_grad(pred, target))[0]
    return loss
