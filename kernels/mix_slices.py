"""Slices of a volume mixed along z: a depth-wise convolution over each slice and its two neighbours.

    y_n = h_n + w_0 h_(n-1) + w_1 h_n + w_2 h_(n+1),   h = x + conv_bias + residual

A neighbour counts where it is of the same volume; beyond a volume's ends there is nothing. With w = 0 it is h, to the
bit. Rows of a batch are slices: nothing is turned round in memory to bring z to an axis of its own.

Layout: dense, contiguous or channels_last. Source: the volumetric layers of Zhu et al. 2023, arXiv:2307.10094, section
3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_contiguous, check_first_derivative, check_float, check_like, check_shape
from ._backend import resolve, tl, triton

TAPS = 3
BLOCK_BYTES = 2048  # of a program: 16 bytes a thread


def mix_slices_reference(
    x: Tensor, weight: Tensor, volumes: Tensor, conv_bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The specification of `mix_slices`: in float32, of an h that is rounded to the dtype of x."""
    h = _add_up(x, conv_bias, residual)
    below, own, above = weight.float()[..., None, None].unbind(1)
    meet = _meet(volumes)
    f = h.float()
    nothing = torch.zeros_like(f[:1])
    lower = torch.cat([nothing, torch.where(meet, f[:-1], 0.0)])
    upper = torch.cat([torch.where(meet, f[1:], 0.0), nothing])
    return (f + (below * lower + own * f + above * upper)).to(x.dtype)


def _add_up(x: Tensor, conv_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if conv_bias is None and residual is None:
        return x
    h = x.float() if conv_bias is None else x.float() + conv_bias.float()[:, None, None]
    return (h if residual is None else h + residual.float()).to(x.dtype)


def _meet(volumes: Tensor) -> Tensor:
    return torch.eq(volumes[1:], volumes[:-1]).view(-1, 1, 1, 1)


@triton.jit
def _load(x, bias, residual, start, i, mask):
    # one offset of 64 bits for a slice: one for each element, three times, would spill
    h = tl.load(x + start + i, mask=mask, other=0.0)
    if bias is None and residual is None:
        return h.to(tl.float32)
    v = h.to(tl.float32)
    if bias is not None:
        v += tl.where(mask, bias, 0.0)
    if residual is not None:
        v += tl.load(residual + start + i, mask=mask, other=0.0).to(tl.float32)
    return v.to(h.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["N"])  # else a volume of 160 slices would not run what one of 161 has compiled
def _mix_slices_kernel(
    x, conv_bias, residual, weight, volumes, y, weight_stride, N, C, HW, numel, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    # one grid axis: the others end at 65,535
    blocks = tl.cdiv(numel, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    c = i % C if LAST else i // HW
    start = n * numel
    weight += n * weight_stride
    volume = tl.load(volumes + n)
    lower = (tl.load(volumes + n - 1, mask=n > 0, other=0) == volume) & (n > 0)
    upper = (tl.load(volumes + n + 1, mask=n < N - 1, other=0) == volume) & (n < N - 1)
    bias = None
    if conv_bias is not None:
        bias = tl.load(conv_bias + c, mask=mask, other=0.0).to(tl.float32)
    v = _load(x, bias, residual, start, i, mask)
    out = tl.load(weight + C + c, mask=mask, other=0.0).to(tl.float32) * v
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    out += w * _load(x, bias, residual, start - numel, i, mask & lower)
    w = tl.load(weight + 2 * C + c, mask=mask, other=0.0).to(tl.float32)
    out += w * _load(x, bias, residual, start + numel, i, mask & upper)
    tl.store(y + start + i, (v + out).to(y.dtype.element_ty), mask=mask)


torch.library.define(
    "sbldm_fast::mix_slices", "(Tensor x, Tensor weight, Tensor volumes, Tensor? conv_bias, Tensor? residual) -> Tensor"
)


@torch.library.register_fake("sbldm_fast::mix_slices")
def _allocate(x: Tensor, *_: object) -> Tensor:
    # channels_last where x is, else contiguous, whatever its strides
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _launch(x: Tensor, weight: Tensor, volumes: Tensor, conv_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y: Tensor = _allocate(x)
    if x.numel() == 0:
        return y
    last = not y.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    N, C, H, W = x.shape
    block = BLOCK_BYTES // x.element_size()
    stride = 0 if len(weight) == 1 else weight.stride(0)
    with torch.cuda.device_of(x):
        _mix_slices_kernel[(N * triton.cdiv(C * H * W, block),)](
            x, conv_bias, residual, weight, volumes, y, stride, N, C, H * W, C * H * W, LAST=last, BLOCK=block
        )
    return y


torch.library.impl("sbldm_fast::mix_slices", ("cpu", "cuda"), _launch)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, volumes, conv_bias, residual = inputs
    ctx.save_for_backward(x, weight, volumes, conv_bias, residual)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    check_first_derivative("mix_slices")
    x, weight, volumes, conv_bias, residual = ctx.saved_tensors
    f, meet, d = weight.float().expand(len(x), -1, -1), _meet(volumes), dy.float()
    below, own, above = f[..., None, None].unbind(1)
    # a slice gave to the one above by that one's weight of below, and to the one below by its weight of above
    dx = d + own * d
    dx[:-1] += torch.where(meet, below[1:] * d[1:], 0.0)
    dx[1:] += torch.where(meet, above[:-1] * d[:-1], 0.0)
    dbias = dweight = None
    if conv_bias is not None and ctx.needs_input_grad[3]:
        dbias = dx.sum((0, 2, 3)).to(conv_bias.dtype)  # before it is rounded
    dx = dx.to(x.dtype)
    if ctx.needs_input_grad[1]:
        h = _add_up(x, conv_bias, residual).float()
        terms = d.new_zeros(len(x), TAPS, x.shape[1])
        terms[1:, 0] = (torch.where(meet, h[:-1], 0.0) * d[1:]).sum((2, 3))
        terms[:, 1] = (h * d).sum((2, 3))
        terms[:-1, 2] = (torch.where(meet, h[1:], 0.0) * d[:-1]).sum((2, 3))
        dweight = (terms.sum(0, keepdim=True) if len(weight) == 1 else terms).to(weight.dtype)
    return dx, dweight, None, dbias, None if residual is None else dx


torch.library.register_autograd("sbldm_fast::mix_slices", _backward, setup_context=_setup_context)


def mix_slices(
    x: Tensor, weight: Tensor, volumes: Tensor, conv_bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Each slice of a batch, and what its neighbours in its volume, and it itself, add to it.

    `y_n = h_n + w_0 h_(n-1) + w_1 h_n + w_2 h_(n+1)`, `h = x + conv_bias + residual`; in the dtype of `x`, computed in
    float32. Differentiable in every tensor but `volumes`.

    Args:
        x: `[N, C, H, W]`, float32, float16 or bfloat16, contiguous or channels_last, else copied.
        weight: `[N, 3, C]` or `[1, 3, C]`, its last two axes contiguous: of the slice below,
            of the slice itself, of the slice above.
        volumes: int32 `[N]`: neighbouring rows of one number are neighbours in one volume; others do not meet.
        conv_bias: `[C]`, the bias of the convolution that made `x` without it.
        residual: like `x` in any layout.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Zhu et al. 2023, arXiv:2307.10094, section 3.2.
    """
    check_float("x", x, "[N, C, H, W]")
    N, C = x.shape[:2]
    check_shape("weight", weight, ((N, TAPS, C), (1, TAPS, C)), x)
    check_shape("volumes", volumes, ((N,),), x, (torch.int32,))
    check_contiguous(volumes=volumes)
    if not weight[:1].is_contiguous():
        raise UserError(f"weight: got strides {weight.stride()}, allowed is [3, C] side by side: call .contiguous()")
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, ((C,),), x)
    if residual is not None:
        check_like("residual", residual, x)
    if resolve(x.device)[0] == "torch":
        return mix_slices_reference(x, weight, volumes, conv_bias, residual)
    out: Tensor = torch.ops.sbldm_fast.mix_slices(x, weight, volumes, conv_bias, residual)
    return out
