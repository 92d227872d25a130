r"""GroupNorm, time modulation and SiLU in one pass over memory; the gradients are in group_norm_silu_backward.py.

    h = x + conv_bias + residual,   u = (h - mean_g) rstd_g,   rstd_g = 1 / sqrt(var_g + eps)
    p = u a + b,        a = weight (1 + scale),    b = bias (1 + scale) + shift,   y = silu(p) = p sigmoid(p)

`mean_g`, `var_g` are taken over the C/G channels and all pixels of a group, in float32, centred (never E[x^2] - m^2).
`conv_bias` is the bias of the convolution before, which cuDNN would add in a kernel of its own, as PyTorch would the
residual. Layouts: NCHW, channels_last and any strided view, read in place; a volume is seen as `[N, C, D H, W]` or
`[N, C, D, H W]`, and copied only where its strides allow neither. Source: Wu & He 2018 (GroupNorm), Dhariwal &
Nichol 2021 section 3 (scale and shift from the time embedding), Chan et al. 1979 (merging the statistics of tiles).

A group of up to `register_tile` elements is read once and kept in registers. A larger one is cut into tiles, in two
launches: the statistics of each tile, then each program merges these in one order and normalises its own tile. No
atomics: the same bits from run to run.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.errors import UserError

from ._arguments import check_first_derivative, check_float, check_like, check_shape
from ._backend import needs_grad, resolve, tl, triton
from ._group_tiles import (
    affine_arguments,
    as_images,
    inverse_root,
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

ACTIVATIONS = ("silu", "none")


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The specification of `group_norm_silu`, in float32: y and h."""
    h, spatial = x, [1] * (x.dim() - 2)
    if conv_bias is not None:  # rounded once, with the residual
        h = x.float() + conv_bias.float().reshape(-1, *spatial)
    if residual is not None:
        h = h + residual
    h = h.to(x.dtype)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch 2.13's gradient fails on a bias alone
    # not F.group_norm, which refuses a batch of one with one element a group
    w, b = (None if t is None else t.float() for t in (weight, bias))
    y = torch.group_norm(h.float(), num_groups, w, b, eps)
    if scale is not None:
        y = y * (1 + scale.float().reshape(*scale.shape, *spatial))
    if shift is not None:
        y = y + shift.float().reshape(*shift.shape, *spatial)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), h


@triton.jit
def _load_sum(x, conv_bias, residual, h, n, c, in_c, s, mask, size, strides, FLAT: tl.constexpr):
    x_strides, residual_strides, y_strides = strides  # h lies as y does
    v = tl.load(x + offsets(n, c, s, size, x_strides, FLAT), mask=mask, other=0.0).to(tl.float32)
    if conv_bias is not None:
        # not where nothing is: the first mean would have it, and the second would have to take it out again
        v += tl.where(mask, tl.load(conv_bias + c, mask=in_c, other=0.0).to(tl.float32)[:, None], 0.0)
    if residual is not None:
        v += tl.load(residual + offsets(n, c, s, size, residual_strides, FLAT), mask=mask, other=0.0).to(tl.float32)
    if conv_bias is not None or residual is not None:
        # the statistics are those of the h that is returned, or would be
        rounded = v.to(x.dtype.element_ty)
        if h is not None:
            tl.store(h + offsets(n, c, s, size, y_strides, FLAT), rounded, mask=mask)
        v = rounded.to(tl.float32)
    return v


@triton.jit
def _center(v, mask, count, TILE):
    # once, for the whole program: exact where the count is a power of two, as in every preset
    share = tl.div_rn(1.0, count)
    # twice: the mean of what is left after the rounded mean restores the digits that a sum far from zero has lost
    mean = per_group(tl.sum(v, axis=1), TILE) * share
    d = tl.where(mask, v - mean[:, None], 0.0)
    rest = per_group(tl.sum(d, axis=1), TILE) * share
    d = tl.where(mask, d - rest[:, None], 0.0)
    return d, mean + rest, per_group(tl.sum(d * d, axis=1), TILE)


@triton.jit
def _tile_statistics_kernel(x, conv_bias, residual, h, pairs, strides, size, TILE: tl.constexpr, FLAT: tl.constexpr):
    C, HW, _, chunks = size
    GROUP: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[3]
    n, chunk, c, in_c, s, mask = place(size, TILE)
    v = _load_sum(x, conv_bias, residual, h, n, c, in_c, s, mask, size, strides, FLAT)
    count = tl.cast(tl.minimum(HW - chunk * PIXELS, PIXELS) * GROUP, tl.float32)
    _, mean, squares = _center(v, mask, count, TILE)
    store_pair(pairs, mean, squares, n * chunks + chunk, c // GROUP, in_c & (c % GROUP == 0), C // GROUP)


@triton.jit
def _group_norm_silu_kernel(
    x,
    conv_bias,
    residual,
    h,
    y,
    stats,
    pairs,
    strides,
    affine,
    size,
    eps: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SILU: tl.constexpr,
):
    C, HW, _, _ = size
    GROUP: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[3]
    CHUNKS: tl.constexpr = TILE[4]
    n, chunk, c, in_c, s, mask = place(size, TILE)
    v = _load_sum(x, conv_bias, residual, h, n, c, in_c, s, mask, size, strides, FLAT)
    count = tl.cast(HW, tl.float32) * GROUP
    share = tl.div_rn(1.0, count)
    if pairs is None:
        d, mean, squares = _center(v, mask, count, TILE)
    else:
        means, within = load_pairs(pairs, n, c, size, TILE)
        pixels = tl.maximum(tl.minimum(HW - tl.arange(0, CHUNKS) * PIXELS, PIXELS), 0)
        counts = pixels.to(tl.float32)[:, None] * GROUP
        about = tl.sum(means * counts, axis=0) * share
        between = means - about[None, :]
        rest = tl.sum(between * counts, axis=0) * share
        between = between - rest[None, :]
        squares = spread(tl.sum(within + between * between * counts, axis=0), TILE)
        mean = spread(about + rest, TILE)
        d = v - spread(about, TILE)[:, None] - spread(rest, TILE)[:, None]
    rstd = inverse_root(squares * share + eps)
    store_pair(stats, mean, rstd, n, c // GROUP, in_c & (c % GROUP == 0) & (chunk == 0), C // GROUP)
    a, b = load_affine(n, c, in_c, affine)
    v = d * (rstd * a)[:, None] + b[:, None]
    if SILU:
        v = v * tl.sigmoid(v)
    _, _, y_strides = strides
    tl.store(y + offsets(n, c, s, size, y_strides, FLAT), v.to(y.dtype.element_ty), mask=mask)


torch.library.define(
    "sbldm_fast::group_norm_silu",
    "(Tensor x, Tensor? conv_bias, Tensor? residual, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor?"
    " scale, Tensor? shift, bool silu, bool keep_sum) -> (Tensor y, Tensor h, Tensor stats)",
)


@torch.library.register_fake("sbldm_fast::group_norm_silu")
def _allocate(
    x: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # stats: mean and rstd of each group; h: an output may not be an input, so where it is not asked for it is empty
    h = torch.empty_like(x) if keep_sum else x.new_empty(0)
    return torch.empty_like(x), h, torch.empty(x.shape[0], 2, num_groups, dtype=torch.float32, device=x.device)


def _launch(
    x: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, stats = _allocate(x, conv_bias, residual, num_groups, weight, bias, eps, scale, shift, silu, keep_sum)
    if x.numel() == 0:
        return y, h, stats
    size, TILE, programs, warps = plan(x.shape, num_groups, x.stride(1) == 1, x.element_size(), register_tile(x.device))
    common = {"TILE": TILE, "FLAT": is_flat(x, residual, y), "num_warps": warps}
    terms = x, conv_bias, residual, h if keep_sum else None
    chunks = size[-1]
    pairs = None
    with torch.cuda.device_of(x):
        if chunks > 1:
            pairs = torch.empty(x.shape[0], chunks, 2, num_groups, dtype=torch.float32, device=x.device)
            _tile_statistics_kernel[(programs,)](*terms, pairs, _strides(*terms, y), size, **common)
            if keep_sum:
                terms = h, None, None, None
        affine = affine_arguments(weight, bias, scale, shift)
        _group_norm_silu_kernel[(programs,)](
            *terms, y, stats, pairs, _strides(*terms, y), affine, size, eps=eps, SILU=silu, **common
        )
    return y, h, stats


def _strides(
    x: Tensor, conv_bias: Tensor | None, residual: Tensor | None, h: Tensor | None, y: Tensor
) -> tuple[Any, ...]:
    return x.stride(), None if residual is None else residual.stride(), y.stride()  # h lies as y does


torch.library.impl("sbldm_fast::group_norm_silu", ("cpu", "cuda"), _launch)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, conv_bias, residual, _, weight, bias, _, scale, shift, ctx.silu, ctx.keep_sum = inputs
    ctx.conv_bias, ctx.residual = None if conv_bias is None else conv_bias.dtype, residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1] if ctx.keep_sum else x, output[2], weight, bias, scale, shift)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Any, ...]:
    check_first_derivative("group_norm_silu")
    rest: tuple[Tensor | None, ...] = (None,) * 4
    dx = dh  # y went unused
    if dy is not None:
        saved = ctx.saved_tensors
        dx, *found = torch.ops.sbldm_fast.group_norm_silu_backward(dy, dh if ctx.keep_sum else None, *saved, ctx.silu)
        rest = tuple(None if t is None else g for g, t in zip(found, saved[2:], strict=True))
    dconv_bias = None
    if dx is not None and ctx.needs_input_grad[1]:
        dconv_bias = dx.sum((0, 2, 3), dtype=torch.float32).to(ctx.conv_bias)
    dweight, dbias, dscale, dshift = rest
    return dx, dconv_bias, dx if ctx.residual else None, None, dweight, dbias, None, dscale, dshift, None, None


torch.library.register_autograd("sbldm_fast::group_norm_silu", _backward, setup_context=_setup_context)


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: None = None,
    activation: str = "silu",
    return_sum: Literal[False] = False,
) -> Tensor: ...
@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: Tensor,
    activation: str = "silu",
    return_sum: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "silu",
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm with optional time modulation, then SiLU; of a sum, where terms are given.

    `y = silu((GN(h) * weight + bias) * (1 + scale) + shift)`, `h = x + conv_bias + residual`; in the dtype and layout
    of `x`, also under autocast (contiguous, where a volume had to be copied); statistics in float32. Differentiable in
    every tensor.

    Args:
        x: `[N, C, *spatial]` of one to three spatial axes, float32, float16 or bfloat16, any strides.
        num_groups: a divisor of C.
        weight, bias: `[C]`.
        eps: added to the variance, > 0.
        scale, shift: `[N, C]` or `[1, C]`, the channels side by side in memory.
        conv_bias: `[C]`, the bias of the convolution that made `x` without it.
        residual: like `x` in any layout; `(y, h)` is returned then, else y.
        activation: `"silu"` or `"none"`.
        return_sum: return `(y, h)` without a residual too.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Wu & He 2018, arXiv:1803.08494; modulation as in Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """
    _check(x, num_groups, weight, bias, eps, scale, shift, conv_bias, residual, activation)
    return_sum = return_sum or residual is not None
    if resolve(x.device)[0] == "torch":
        y, h = group_norm_silu_reference(
            x,
            num_groups,
            weight,
            bias,
            eps,
            scale=scale,
            shift=shift,
            conv_bias=conv_bias,
            residual=residual,
            activation=activation,
        )
    else:
        # the gradient is taken at h, which without a term is x
        terms = conv_bias is not None or residual is not None
        keep = terms and (return_sum or needs_grad(x, conv_bias, weight, bias, scale, shift))
        y, h = _run(
            x, conv_bias, residual, num_groups, weight, bias, eps, scale, shift, activation == "silu", keep=keep
        )
        h = h if terms else x
    return (y, h) if return_sum else y


def _run(
    x: Tensor, conv_bias: Tensor | None, residual: Tensor | None, num_groups: int, *rest: Any, keep: bool
) -> tuple[Tensor, Tensor]:
    # the op is one of images
    image = as_images(x)
    if residual is not None and image is not x:
        residual = residual.reshape(image.shape)
    y, h, _ = torch.ops.sbldm_fast.group_norm_silu(image, conv_bias, residual, num_groups, *rest, keep)
    return (y, h) if image is x else (y.view(x.shape), h.view(x.shape) if keep else h)


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    check_float("x", x, "[N, C, L]", "[N, C, H, W]", "[N, C, D, H, W]")
    N, C = x.shape[:2]
    if num_groups < 1 or C % num_groups:
        raise UserError(f"num_groups: got {num_groups}, allowed are the divisors of the {C} channels of x")
    if not eps > 0:
        raise UserError(f"eps: got {eps}, allowed is > 0")
    if activation not in ACTIVATIONS:
        raise UserError(f"activation: got {activation!r}, allowed are {', '.join(ACTIVATIONS)}")
    if residual is not None:
        check_like("residual", residual, x)
    of_channels, rows = ((C,),), ((N, C), (1, C))
    for name, t, shapes in (
        ("weight", weight, of_channels),
        ("bias", bias, of_channels),
        ("conv_bias", conv_bias, of_channels),
        ("scale", scale, rows),
        ("shift", shift, rows),
    ):
        if t is not None:
            check_shape(name, t, shapes, x)
            if t.stride(-1) != 1 and C > 1:
                raise UserError(
                    f"{name}: got strides {t.stride()}, allowed is the channels side by side: call .contiguous()"
                )


class GroupNormSiLU(nn.Module):
    """`nn.GroupNorm` followed by SiLU, as one op; its state_dict is that of `nn.GroupNorm`.

    Shapes, errors and source: `group_norm_silu`.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, activation: str = "silu"
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise UserError(f"num_groups: got {num_groups}, allowed are the divisors of num_channels = {num_channels}")
        self.num_groups, self.num_channels, self.eps, self.activation = num_groups, num_channels, eps, activation
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        conv_bias: Tensor | None = None,
        residual: Tensor | None = None,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `group_norm_silu` returns."""
        op: Any = group_norm_silu  # its overloads tell the two results apart by arguments that here may be either
        out: Tensor | tuple[Tensor, Tensor] = op(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            conv_bias=conv_bias,
            residual=residual,
            activation=self.activation,
            return_sum=return_sum,
        )
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None},"
            f" activation={self.activation!r}"
        )
