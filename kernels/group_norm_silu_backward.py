r"""The gradients of `group_norm_silu`, which calls this op; formulas of u, p, a, b there.

    q  = dy sigmoid(p) (1 + p (1 - sigmoid(p)))   (without activation: dy)
    A_nc = sum_hw q u,   B_nc = sum_hw q
    dx = rstd (a q - mean_g(a q) - u mean_g(a q u)) + dh,   dresidual = dx
    dweight = sum_n A (1 + scale),   dbias = sum_n B (1 + scale),   dscale = A weight + B bias,   dshift = B

All sums in float32, in one order. Layouts, tiles and the cut of large groups as in the forward pass; dy and dh may lie
in memory in another way than h does, as compiled graphs hand them over. Source: Wu & He 2018, differentiated by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import tl, triton
from ._group_tiles import (
    affine_arguments,
    is_flat,
    load_affine,
    load_pairs,
    offsets,
    per_group,
    place,
    plan,
    register_tile,
    spread,
    store_pair,
)

ROWS, BLOCK = 16, 32  # samples at a time and channels of a program that sums over the batch


def group_norm_silu_backward_reference(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    """The specification: dx, dweight, dbias, dscale, dshift, in the dtype of `h`'s maths, `stats` = mean and rstd
    `[N, 2, G]`."""
    N, C = h.shape[:2]
    mean, rstd = stats.to(h.dtype).repeat_interleave(C // stats.shape[2], 2)[..., None, None].unbind(1)
    factor = torch.ones(1, C, dtype=h.dtype) if scale is None else 1 + scale
    w = torch.ones(C, dtype=h.dtype) if weight is None else weight
    v = torch.zeros(C, dtype=h.dtype) if bias is None else bias
    a, b = (w * factor)[..., None, None], (v * factor + (0 if shift is None else shift))[..., None, None]
    u = (h - mean) * rstd
    p = u * a + b
    q = dy * p.sigmoid() * (1 + p * (1 - p.sigmoid())) if silu else dy
    A, B = (q * u).sum((2, 3)), q.sum((2, 3))

    def mean_g(t: Tensor) -> Tensor:
        return t.reshape(N, stats.shape[2], -1).mean(2).repeat_interleave(C // stats.shape[2], 1)[..., None, None]

    dx = rstd * (a * q - mean_g(a * q) - u * mean_g(a * q * u)) + (0 if dh is None else dh)
    return dx, (A * factor).sum(0), (B * factor).sum(0), A * w + B * v, B


@triton.jit
def _slope(h, dy, stats, n, c, in_c, s, mask, strides, affine, size, TILE, FLAT: tl.constexpr, SILU: tl.constexpr):
    C, _, _, _ = size
    GROUP: tl.constexpr = TILE[0]
    h_strides, dy_strides, _, _ = strides
    groups = C // GROUP
    at = stats + n * 2 * groups + c // GROUP
    mean, rstd = tl.load(at, mask=in_c, other=0.0), tl.load(at + groups, mask=in_c, other=0.0)
    a, b = load_affine(n, c, in_c, affine)
    u = tl.load(h + offsets(n, c, s, size, h_strides, FLAT), mask=mask, other=0.0).to(tl.float32)
    u = tl.where(mask, (u - mean[:, None]) * rstd[:, None], 0.0)
    q = tl.load(dy + offsets(n, c, s, size, dy_strides, FLAT), mask=mask, other=0.0).to(tl.float32)
    if SILU:
        p = u * a[:, None] + b[:, None]
        sigmoid = tl.sigmoid(p)
        q = q * sigmoid * (1.0 + p * (1.0 - sigmoid))
    return u, q, a, rstd


@triton.jit
def _tile_gradients_kernel(
    h, dy, stats, sums, pairs, strides, affine, size, TILE: tl.constexpr, FLAT: tl.constexpr, SILU: tl.constexpr
):
    C, _, _, chunks = size
    GROUP: tl.constexpr = TILE[0]
    n, chunk, c, in_c, s, mask = place(size, TILE)
    u, q, a, _ = _slope(h, dy, stats, n, c, in_c, s, mask, strides, affine, size, TILE, FLAT, SILU)
    A, B = tl.sum(q * u, axis=1), tl.sum(q, axis=1)
    row = n * chunks + chunk
    store_pair(sums, A, B, row, c, in_c, C)
    one_lane = in_c & (c % GROUP == 0)
    store_pair(pairs, per_group(a * A, TILE), per_group(a * B, TILE), row, c // GROUP, one_lane, C // GROUP)


@triton.jit
def _group_norm_silu_backward_kernel(
    h, dy, dh, dx, stats, sums, pairs, strides, affine, size, TILE: tl.constexpr, FLAT: tl.constexpr, SILU: tl.constexpr
):
    C, HW, _, _ = size
    GROUP: tl.constexpr = TILE[0]
    _, _, dh_strides, dx_strides = strides
    n, _, c, in_c, s, mask = place(size, TILE)
    u, q, a, rstd = _slope(h, dy, stats, n, c, in_c, s, mask, strides, affine, size, TILE, FLAT, SILU)
    if pairs is None:
        A, B = tl.sum(q * u, axis=1), tl.sum(q, axis=1)
        store_pair(sums, A, B, n, c, in_c, C)
        by_u, by_one = per_group(a * A, TILE), per_group(a * B, TILE)
    else:
        of_u, of_one = load_pairs(pairs, n, c, size, TILE)
        by_u, by_one = spread(tl.sum(of_u, axis=0), TILE), spread(tl.sum(of_one, axis=0), TILE)
    share = tl.div_rn(1.0, tl.cast(HW, tl.float32) * GROUP)
    d = (a[:, None] * q - (by_one * share)[:, None] - u * (by_u * share)[:, None]) * rstd[:, None]
    if dh is not None:
        d += tl.load(dh + offsets(n, c, s, size, dh_strides, FLAT), mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + offsets(n, c, s, size, dx_strides, FLAT), d.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _parameters_kernel(sums, affine, dweight, dbias, dscale, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    weight, bias, scale, _, scale_stride, _ = affine
    c = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    of_weight, of_bias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, ROWS):
        n = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (n < N) & (c < C)
        A = tl.load(sums + n * 2 * C + c, mask=mask, other=0.0)
        B = tl.load(sums + n * 2 * C + C + c, mask=mask, other=0.0)
        if scale is not None:
            by = A
            if weight is not None:
                by = by * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
            if bias is not None:
                by += B * tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
            tl.store(dscale + n * C + c, by.to(dscale.dtype.element_ty), mask=mask)
            factor = 1.0 + tl.load(scale + n * scale_stride + c, mask=mask, other=0.0).to(tl.float32)
            A *= factor
            B *= factor
        of_weight += A
        of_bias += B
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if weight is not None:
        tl.store(dweight + c, tl.sum(of_weight, axis=0).to(dweight.dtype.element_ty), mask=c < C)
    if bias is not None:
        tl.store(dbias + c, tl.sum(of_bias, axis=0).to(dbias.dtype.element_ty), mask=c < C)


torch.library.define(
    "sbldm_fast::group_norm_silu_backward",
    "(Tensor dy, Tensor? dh, Tensor h, Tensor stats, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, bool"
    " silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
)


@torch.library.register_fake("sbldm_fast::group_norm_silu_backward")
def _allocate(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    return torch.empty_like(h), *(
        h.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias, scale, shift)
    )


def _launch(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dscale, dshift = _allocate(dy, dh, h, stats, weight, bias, scale, shift, silu)
    N, C = h.shape[:2]
    if h.numel() == 0:
        return dx, *(g.zero_() for g in (dweight, dbias, dscale, dshift))
    # h and dy are kept at once, so half a group as large
    size, TILE, programs, warps = plan(
        h.shape, stats.shape[2], h.stride(1) == 1, h.element_size(), register_tile(h.device) // 2
    )
    common = {"TILE": TILE, "FLAT": is_flat(h, dy, dh, dx), "SILU": silu, "num_warps": warps}
    strides = (h.stride(), dy.stride(), None if dh is None else dh.stride(), dx.stride())
    affine = affine_arguments(weight, bias, scale, shift)
    chunks = size[-1]
    sums = torch.empty(N, chunks, 2, C, dtype=torch.float32, device=h.device)
    pairs = None
    with torch.cuda.device_of(h):
        if chunks > 1:
            pairs = torch.empty(N, chunks, 2, stats.shape[2], dtype=torch.float32, device=h.device)
            _tile_gradients_kernel[(programs,)](h, dy, stats, sums, pairs, strides, affine, size, **common)
        _group_norm_silu_backward_kernel[(programs,)](
            h, dy, dh, dx, stats, sums, pairs, strides, affine, size, **common
        )
        sums = sums.sum(1) if chunks > 1 else sums[:, 0]
        if weight is not None or bias is not None or scale is not None:
            each = None if scale is None else scale.new_empty(N, C)
            _parameters_kernel[(triton.cdiv(C, BLOCK),)](
                sums, affine, dweight, dbias, each, N, C, ROWS=ROWS, BLOCK=BLOCK
            )
            if each is not None:
                dscale = each if each.shape == dscale.shape else each.float().sum(0, keepdim=True).to(each.dtype)
    if shift is not None:
        dshift = (sums[:, 1] if shift.shape[0] == N else sums[:, 1].sum(0, keepdim=True)).to(shift.dtype, copy=True)
    return dx, dweight, dbias, dscale, dshift


torch.library.impl("sbldm_fast::group_norm_silu_backward", ("cpu", "cuda"), _launch)
