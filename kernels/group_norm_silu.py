r"""GroupNorm, time modulation and SiLU in one pass over memory.

    u = (x - mean_g) * rsqrt(var_g + eps) * weight_c + bias_c
    y = silu(u * (1 + scale_nc) + shift_nc),   silu(a) = a * sigmoid(a)

`mean_g`, `var_g` are taken over the C/G channels and all pixels of a group, in float32, centred (never E[x^2] - m^2).
Layouts: NCHW, channels_last and any strided view, read in place. Source: Wu & He 2018 (GroupNorm), Dhariwal & Nichol 2021
section 3 (scale and shift from the time embedding).

A program owns one sample and a run of whole groups. Groups up to `REGISTER_TILE` elements are read once and kept in
registers; larger ones are read twice, with the statistics of the chunks merged after Chan et al. 1979.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._backend import needs_grad, resolve, tl, triton

REGISTER_TILE = 8192  # elements, 16 a thread: twice as many spill on sm_75
LOOP_TILE = 4096
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
    activation: str = "silu",
) -> Tensor:
    """The specification of `group_norm_silu`, in float32."""
    # not F.group_norm, which refuses a batch of one with one element a group
    y = torch.group_norm(x.float(), num_groups, _float(weight), _float(bias), eps)
    if scale is not None:
        y = y * (1 + scale.float()[..., None, None])
    if shift is not None:
        y = y + shift.float()[..., None, None]
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


@triton.jit
def _affine(var, c, n, mask, weight, bias, scale, shift, scale_stride, shift_stride, eps: tl.constexpr):
    # what is constant over the pixels folds into y = (x - mean) * a + b; the mean stays outside, where x - mean is exact
    a = 1.0 / tl.sqrt(var + eps)
    if weight is not None:
        a *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    b = tl.zeros_like(a)
    if bias is not None:
        b = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + n * scale_stride + c, mask=mask, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    if shift is not None:
        b += tl.load(shift + n * shift_stride + c, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _per_group(v, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    # the sum over each group's channels, handed back to every channel of the group
    total = tl.sum(tl.reshape(v, (GROUPS, BLOCK_C // GROUPS)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, (GROUPS, BLOCK_C // GROUPS)), (BLOCK_C,))


@triton.jit
def _offsets(c, s, WIDTH, stride_c, stride_h, stride_w, FLAT: tl.constexpr):
    # FLAT: the rows follow on one another, so a pixel needs no division
    pixel = s * stride_w if FLAT else (s // WIDTH) * stride_h + (s % WIDTH) * stride_w
    return c.to(tl.int64)[:, None] * stride_c + pixel[None, :]


@triton.jit
def _group_norm_silu_kernel(
    x, y, weight, bias, scale, shift, scale_stride, shift_stride,
    C, HW, WIDTH, xn, xc, xh, xw, yn, yc, yh, yw,
    CHANNELS: tl.constexpr,  # channels of one group
    GROUPS: tl.constexpr,  # groups of one program
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    ONE_TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SILU: tl.constexpr,
    eps: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(C, GROUPS * CHANNELS)
    n = (tl.program_id(0) // programs).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = (tl.program_id(0) % programs) * (GROUPS * CHANNELS) + lane
    in_c = (lane < GROUPS * CHANNELS) & (c < C)
    x += n * xn
    y += n * yn
    area = tl.cast(HW, tl.float32)

    if ONE_TILE:
        s = tl.arange(0, BLOCK_HW)
        mask = in_c[:, None] & (s < HW)[None, :]
        v = tl.load(x + _offsets(c, s, WIDTH, xc, xh, xw, FLAT), mask=mask, other=0.0).to(tl.float32)
        mean = _per_group(tl.sum(v, axis=1), GROUPS, BLOCK_C) / (area * CHANNELS)
        d = tl.where(mask, v - mean[:, None], 0.0)
        var = _per_group(tl.sum(d * d, axis=1), GROUPS, BLOCK_C) / (area * CHANNELS)
        a, b = _affine(var, c, n, in_c, weight, bias, scale, shift, scale_stride, shift_stride, eps)
        v = d * a[:, None] + b[:, None]
        if SILU:
            v = v * tl.sigmoid(v)
        tl.store(y + _offsets(c, s, WIDTH, yc, yh, yw, FLAT), v.to(y.dtype.element_ty), mask=mask)
    else:
        count = tl.cast(0.0, tl.float32)
        mean_c = tl.zeros((BLOCK_C,), tl.float32)
        m2_c = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, HW, BLOCK_HW):
            s = start + tl.arange(0, BLOCK_HW)
            mask = in_c[:, None] & (s < HW)[None, :]
            v = tl.load(x + _offsets(c, s.to(tl.int64), WIDTH, xc, xh, xw, FLAT), mask=mask, other=0.0).to(tl.float32)
            here = tl.cast(tl.minimum(HW - start, BLOCK_HW), tl.float32)
            mean_b = tl.sum(v, axis=1) / here
            d = tl.where(mask, v - mean_b[:, None], 0.0)
            delta = mean_b - mean_c
            mean_c += delta * (here / (count + here))
            m2_c += tl.sum(d * d, axis=1) + delta * delta * (count * here / (count + here))
            count += here
        mean = _per_group(tl.where(in_c, mean_c, 0.0), GROUPS, BLOCK_C) / CHANNELS
        apart = tl.where(in_c, mean_c - mean, 0.0)
        var = _per_group(m2_c / area + apart * apart, GROUPS, BLOCK_C) / CHANNELS
        a, b = _affine(var, c, n, in_c, weight, bias, scale, shift, scale_stride, shift_stride, eps)
        for start in range(0, HW, BLOCK_HW):
            s = start + tl.arange(0, BLOCK_HW)
            mask = in_c[:, None] & (s < HW)[None, :]
            s = s.to(tl.int64)
            v = tl.load(x + _offsets(c, s, WIDTH, xc, xh, xw, FLAT), mask=mask, other=0.0).to(tl.float32)
            v = (v - mean[:, None]) * a[:, None] + b[:, None]
            if SILU:
                v = v * tl.sigmoid(v)
            tl.store(y + _offsets(c, s, WIDTH, yc, yh, yw, FLAT), v.to(y.dtype.element_ty), mask=mask)


def launch_parameters(C: int, num_groups: int, HW: int, channels_last: bool, itemsize: int) -> dict[str, int | bool]:
    """Tile shape and warps for one problem; a pure function, so that the T4 gate compiles what the launcher launches."""
    channels = C // num_groups
    groups, block_c, block_hw = 1, triton.next_power_of_2(channels), triton.next_power_of_2(HW)
    if block_c == channels:
        # 16 bytes for each of the 32 threads of a warp, side by side: in channels_last it is the channels that lie so
        vector = 16 // itemsize
        want = max(vector // channels if channels_last else 1, 32 * vector // (channels * block_hw))
        groups = min(max(1, want), triton.next_power_of_2(num_groups))
        block_c = groups * channels
    one_tile = block_c * block_hw <= REGISTER_TILE
    if not one_tile:
        block_hw = max(1, LOOP_TILE // block_c)
    num_warps = min(16, max(1, block_c * block_hw // 512))
    return {"CHANNELS": channels, "GROUPS": groups, "BLOCK_C": block_c, "BLOCK_HW": block_hw, "ONE_TILE": one_tile,
            "num_warps": num_warps}  # fmt: skip


torch.library.define(
    "sbldm_fast::group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, bool silu) -> Tensor",
)


@torch.library.impl("sbldm_fast::group_norm_silu", ("cpu", "cuda"))
def _launch(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    N, C, H, W = x.shape
    p = launch_parameters(C, num_groups, H * W, x.stride(1) == 1, x.element_size())
    flat = all(t.stride(2) == W * t.stride(3) for t in (x, y))
    grid = (N * triton.cdiv(C, int(p["GROUPS"]) * int(p["CHANNELS"])),)
    with torch.cuda.device_of(x):
        _group_norm_silu_kernel[grid](
            x, y, weight, bias, scale, shift, _row_stride(scale), _row_stride(shift), C, H * W, W, *x.stride(), *y.stride(),
            FLAT=flat, SILU=silu, eps=eps, **p,
        )  # fmt: skip
    return y


def _row_stride(row: Tensor | None) -> int:
    return 0 if row is None or row.shape[0] == 1 else row.stride(0)


@torch.library.register_fake("sbldm_fast::group_norm_silu")
def _fake(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """GroupNorm with optional time modulation, then SiLU.

    `y = silu((GN(x) * weight + bias) * (1 + scale) + shift)`, in the dtype and layout of `x`, statistics in float32.

    Args:
        x: `[N, C, H, W]`, float32, float16 or bfloat16, any strides.
        num_groups: a divisor of C.
        weight, bias: `[C]`.
        eps: added to the variance, > 0.
        scale, shift: `[N, C]` or `[1, C]`, the channels side by side in memory.
        activation: `"silu"` or `"none"`.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Wu & He 2018, arXiv:1803.08494; modulation as in Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """
    _check(x, num_groups, weight, bias, eps, scale, shift, activation)
    chosen, _ = resolve(x.device, needs_grad(x, weight, bias, scale, shift))
    if chosen == "torch":
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
    out: Tensor = torch.ops.sbldm_fast.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation == "silu")
    return out


def _check(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, shift: Tensor | None, activation: str,
) -> None:  # fmt: skip
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, C, H, W]")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: got {x.dtype}, allowed are float32, float16 and bfloat16")
    N, C = x.shape[:2]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, allowed are the divisors of the {C} channels of x")
    if eps <= 0:
        raise ValueError(f"eps: got {eps}, allowed is > 0")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, allowed are {', '.join(ACTIVATIONS)}")
    for name, t, shapes in (
        ("weight", weight, ((C,),)),
        ("bias", bias, ((C,),)),
        ("scale", scale, ((N, C), (1, C))),
        ("shift", shift, ((N, C), (1, C))),
    ):
        if t is None:
            continue
        if tuple(t.shape) not in shapes:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, allowed is {' or '.join(map(str, shapes))}")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, allowed is that of x, {x.device}")
        if t.stride(-1) != 1 and C > 1:
            raise ValueError(f"{name}: got strides {t.stride()}, allowed is the channels side by side: call .contiguous()")


class GroupNormSiLU(nn.Module):
    """`nn.GroupNorm` followed by SiLU, as one op; its state_dict is that of `nn.GroupNorm`.

    Shapes, errors and source: `group_norm_silu`.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, activation: str = "silu") -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups: got {num_groups}, allowed are the divisors of num_channels = {num_channels}")
        self.num_groups, self.num_channels, self.eps, self.activation = num_groups, num_channels, eps, activation
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None}, activation={self.activation!r}"
