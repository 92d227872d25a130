r"""A mean squared error that weighs low and high spatial frequencies apart; loss and gradient at once.

    e = pred - target,   E = FFT2(e) / sqrt(H W),   |f| = sqrt(fx^2 + fy^2) on the unshifted grid of fftfreq
    loss = low_weight mean_low + high_weight mean_high
    mean_low = sum_{|f| <= cutoff} |E|^2 / numel,   mean_high the rest / numel
    dpred = 2 / numel (low_weight e_low + high_weight e_high) = -dtarget

By Parseval weights 1, 1 give exactly the mean squared error. Images up to 32x32 need no FFT: with the real orthonormal
basis B of the low modes, `[K, H W]` (K = 49 at 16x16 and cutoff 1/4), e_low = B^T B e and e_high = e - e_low, whose
squares add up without cancellation. Larger ones take rfft2, one pass that weighs and adds up, and irfft2. A mode is low
or high by float64 arithmetic. Layouts: any strides. Source: 000 section 3.6 prints a centered mask on an unshifted FFT,
which marks the high modes; here they agree.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_first_derivative, check_float, check_like
from ._backend import needs_grad, resolve, tl, triton

BASIS_SIDE = 32  # largest side that takes the basis
BASIS_TILE = 4096  # elements of the basis in registers at a time
BLOCK = 1024


def low_modes(H: int, W: int, cutoff: float, device: torch.device) -> Tensor:
    """Bool `[H, W]`: which modes of an unshifted FFT are low."""
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (H, W))
    low: Tensor = (fy[:, None].square() + fx[None, :].square()).sqrt() <= cutoff
    return low.to(device)


def frequency_loss_reference(
    pred: Tensor, target: Tensor, low_weight: float = 1.0, high_weight: float = 1.0, cutoff: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in float32: the loss, mean_low and mean_high."""
    e = pred.float() - target.float()
    if e.numel() == 0:  # MKL has no FFT of nothing
        return e.mean(), e.mean(), e.mean()
    E = torch.fft.fft2(e, norm="ortho")
    power = E.real.square() + E.imag.square()
    low = low_modes(power.shape[-2], power.shape[-1], cutoff, power.device)
    mean_low, mean_high = (power.masked_fill(other, 0).mean() for other in (~low, low))
    return low_weight * mean_low + high_weight * mean_high, mean_low, mean_high


@functools.cache
def low_basis(H: int, W: int, cutoff: float, device: torch.device) -> Tensor:
    """The real orthonormal basis of the low modes, float32 `[K, H W]`: a cosine and a sine for each pair of modes f and
    -f."""
    low = low_modes(H, W, cutoff, torch.device("cpu"))
    y, x = torch.arange(H, dtype=torch.float64)[:, None], torch.arange(W, dtype=torch.float64)[None, :]
    rows = []
    for i, j in low.nonzero().tolist():
        pair = (-i % H, -j % W)
        if (i, j) > pair:
            continue
        angle = 2 * torch.pi * (i * y / H + j * x / W)
        rows += [angle.cos()] if (i, j) == pair else [angle.cos() * 2**0.5, angle.sin() * 2**0.5]
    basis = torch.stack(rows).flatten(1) / (H * W) ** 0.5 if rows else torch.zeros(0, H * W)
    return basis.float().to(device)


@functools.cache
def _half_mask(H: int, W: int, cutoff: float, device: torch.device) -> Tensor:
    # last of all to the device, and waiting for it: another stream may be the next to read
    return low_modes(H, W, cutoff, torch.device("cpu"))[:, : W // 2 + 1].to(torch.int8).contiguous().to(device)


@triton.jit
def offset(n, c, y, x, strides):
    of_sample, of_channel, of_row, of_pixel = strides
    return n * of_sample + c * of_channel + y * of_row + x * of_pixel


@triton.jit
def _basis_kernel(
    pred,
    target,
    basis,
    grad,
    sums,
    strides,
    C,
    H,
    W,
    K,
    numel,
    low_weight: tl.constexpr,
    high_weight: tl.constexpr,
    PIXELS: tl.constexpr,
    MODES: tl.constexpr,
):
    # a program owns an image
    n, c = (tl.program_id(0) // C).to(tl.int64), (tl.program_id(0) % C).to(tl.int64)
    s = tl.arange(0, PIXELS)
    mask = s < H * W
    y, x = (s // W).to(tl.int64), (s % W).to(tl.int64)
    pred_strides, target_strides, grad_strides = strides
    e = tl.load(pred + offset(n, c, y, x, pred_strides), mask=mask, other=0.0).to(tl.float32)
    e -= tl.load(target + offset(n, c, y, x, target_strides), mask=mask, other=0.0).to(tl.float32)
    low = tl.zeros_like(e)
    for start in range(0, K, MODES):
        k = start + tl.arange(0, MODES)
        b = tl.load(basis + k[:, None] * (H * W) + s[None, :], mask=(k < K)[:, None] & mask[None, :], other=0.0)
        coefficients = tl.sum(b * e[None, :], axis=1)
        low += tl.sum(b * coefficients[:, None], axis=0)
    high = tl.where(mask, e - low, 0.0)
    tl.store(sums + tl.program_id(0) * 2, tl.sum(low * low))
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(high * high))
    if grad is not None:
        g = (low_weight * low + high_weight * high) * (2.0 / tl.cast(numel, tl.float32))
        tl.store(grad + offset(n, c, y, x, grad_strides), g, mask=mask)


@triton.jit
def _spectrum_kernel(
    spectrum,
    low_mask,
    sums,
    modes,
    W,
    columns,
    modes_of_image,
    numel,
    low_weight: tl.constexpr,
    high_weight: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # spectrum is [..., H, W/2 + 1, (re, im)] of rfft2: a mode stands for its mirror too, but for those that are their
    # own column's
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < modes * 2
    mode = i // 2
    low = tl.load(low_mask + mode % modes_of_image, mask=mask, other=0) != 0
    column = mode % columns
    alone = (column == 0) | (column * 2 == W)
    E = tl.load(spectrum + i, mask=mask, other=0.0)
    power = E * E * tl.where(alone, 1.0, 2.0)
    tl.store(sums + tl.program_id(0) * 2, tl.sum(tl.where(low, power, 0.0)))
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(tl.where(low, 0.0, power)))
    weight = tl.where(low, low_weight, high_weight) * (2.0 / tl.cast(numel, tl.float32))
    tl.store(spectrum + i, E * weight, mask=mask)


@triton.jit
def _total_kernel(
    sums, loss, means, rows, numel, low_weight: tl.constexpr, high_weight: tl.constexpr, BLOCK: tl.constexpr
):
    # one program, so that the order of the sum is one
    low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        low += tl.load(sums + i * 2, mask=i < rows, other=0.0)
        high += tl.load(sums + i * 2 + 1, mask=i < rows, other=0.0)
    mean_low, mean_high = tl.sum(low) / tl.cast(numel, tl.float32), tl.sum(high) / tl.cast(numel, tl.float32)
    tl.store(means, mean_low)
    tl.store(means + 1, mean_high)
    tl.store(loss, low_weight * mean_low + high_weight * mean_high)


torch.library.define(
    "sbldm_fast::frequency_loss",
    "(Tensor pred, Tensor target, float low_weight, float high_weight, float cutoff, bool gradient)"
    " -> (Tensor loss, Tensor means, Tensor grad)",
)


@torch.library.register_fake("sbldm_fast::frequency_loss")
def _allocate(
    pred: Tensor, target: Tensor, low_weight: float, high_weight: float, cutoff: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(pred, dtype=torch.float32) if gradient else pred.new_empty(0, dtype=torch.float32)
    loss, means = pred.new_empty((), dtype=torch.float32), pred.new_empty(2, dtype=torch.float32)
    return loss, means, grad


def _launch(
    pred: Tensor, target: Tensor, low_weight: float, high_weight: float, cutoff: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, means, grad = _allocate(pred, target, low_weight, high_weight, cutoff, gradient)
    N, C, H, W = pred.shape
    numel, weights = pred.numel(), {"low_weight": low_weight, "high_weight": high_weight}
    with torch.cuda.device_of(pred):
        if numel == 0 or max(H, W) <= BASIS_SIDE:
            rows = N * C if numel else 0
            sums = torch.empty(rows, 2, dtype=torch.float32, device=pred.device)
            if rows:
                basis, pixels = low_basis(H, W, cutoff, pred.device), triton.next_power_of_2(H * W)
                strides = (pred.stride(), target.stride(), grad.stride() if gradient else None)
                _basis_kernel[(rows,)](
                    pred,
                    target,
                    basis,
                    grad if gradient else None,
                    sums,
                    strides,
                    C,
                    H,
                    W,
                    basis.shape[0],
                    numel,
                    PIXELS=pixels,
                    MODES=max(1, min(16, BASIS_TILE // pixels)),
                    num_warps=4,
                    **weights,
                )
        else:
            spectrum = torch.fft.rfft2(pred.float() - target.float(), norm="ortho").contiguous()
            modes = spectrum.numel()
            rows = triton.cdiv(2 * modes, BLOCK)
            sums = torch.empty(rows, 2, dtype=torch.float32, device=pred.device)
            _spectrum_kernel[(rows,)](
                torch.view_as_real(spectrum),
                _half_mask(H, W, cutoff, pred.device),
                sums,
                modes,
                W,
                W // 2 + 1,
                H * (W // 2 + 1),
                numel,
                BLOCK=BLOCK,
                **weights,
            )
            if gradient:
                grad.copy_(torch.fft.irfft2(spectrum, s=(H, W), norm="ortho"))
        _total_kernel[(1,)](sums, loss, means, rows, numel, BLOCK=BLOCK, **weights)
    return loss, means, grad


torch.library.impl("sbldm_fast::frequency_loss", ("cpu", "cuda"), _launch)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])


def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    check_first_derivative("frequency_loss, spectral_mse")
    scaled = ctx.saved_tensors[0] * dloss
    of_pred, of_target, *rest = ctx.needs_input_grad
    return (
        scaled.to(ctx.dtypes[0]) if of_pred else None,
        -scaled.to(ctx.dtypes[1]) if of_target else None,
        *[None] * len(rest),
    )


torch.library.register_autograd("sbldm_fast::frequency_loss", backward, setup_context=setup_context)


@overload
def frequency_loss(
    pred: Tensor,
    target: Tensor,
    *,
    low_weight: float = 1.0,
    high_weight: float = 1.0,
    cutoff: float = 0.25,
    return_means: Literal[False] = False,
) -> Tensor: ...
@overload
def frequency_loss(
    pred: Tensor,
    target: Tensor,
    *,
    low_weight: float = 1.0,
    high_weight: float = 1.0,
    cutoff: float = 0.25,
    return_means: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
def frequency_loss(
    pred: Tensor,
    target: Tensor,
    *,
    low_weight: float = 1.0,
    high_weight: float = 1.0,
    cutoff: float = 0.25,
    return_means: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`low_weight mean_low + high_weight mean_high`, a float32 scalar; 1, 1 is the mean squared error.

    Args:
        pred, target: `[N, C, H, W]`, float32, float16 or bfloat16 each, any strides; computed in float32, also under
            autocast.
        low_weight, high_weight: of the modes at and below `cutoff`, and of the others; each new pair compiles a kernel.
        cutoff: in cycles per pixel, 0 (the mean alone is low) to 1; from sqrt(1/2) on all modes are low.
        return_means: return `(loss, mean_low, mean_high)`, the two means for logging, without gradient.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: 000 section 3.6; its mask, printed for a centred spectrum, is applied here to the grid that it belongs to.
    """
    check_float("pred", pred, "[N, C, H, W]")
    check_like("target", target, pred, "pred", dtype=False)
    if not 0 <= cutoff <= 1:
        raise UserError(f"cutoff: got {cutoff}, allowed is 0 to 1 cycles per pixel")
    for name, value in (("low_weight", low_weight), ("high_weight", high_weight)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name}: got {value}, allowed is a finite number >= 0")
    if resolve(pred.device)[0] == "torch":
        loss, mean_low, mean_high = frequency_loss_reference(pred, target, low_weight, high_weight, cutoff)
        mean_low, mean_high = mean_low.detach(), mean_high.detach()
    else:
        gradient = needs_grad(pred, target)
        loss, means, _ = torch.ops.sbldm_fast.frequency_loss(pred, target, low_weight, high_weight, cutoff, gradient)
        mean_low, mean_high = means.unbind()
    return (loss, mean_low, mean_high) if return_means else loss
