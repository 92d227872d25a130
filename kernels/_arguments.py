"""Checks of arguments that several ops share: each names the argument, what came and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._backend import needs_grad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a tensor


def check_float(name: str, t: Tensor, *layouts: str) -> None:
    """`t` is float32, float16 or bfloat16 and has the dimensions of one of `layouts`; none: any but a number."""
    dims = [layout.count(",") + 1 for layout in layouts]
    if t.dtype not in DTYPES or (t.dim() not in dims if layouts else t.dim() < 1):
        allowed = " or ".join(layouts or ("[N, ...]",))
        raise UserError(f"{name}: got {t.dtype} {tuple(t.shape)}, allowed is {allowed} in float32, float16 or bfloat16")


def check_like(name: str, t: Tensor, x: Tensor, of: str = "x", dtype: bool = True) -> None:
    """`t` has the shape, device and, with `dtype`, dtype of `x`; else any of the float dtypes."""
    if t.shape != x.shape or t.device != x.device or (t.dtype != x.dtype if dtype else t.dtype not in DTYPES):
        kind = x.dtype if dtype else "float32, float16 or bfloat16"
        raise UserError(
            f"{name}: got {t.dtype} {tuple(t.shape)} on {t.device}, allowed is the like of {of}, {kind}"
            f" {tuple(x.shape)} on {x.device}"
        )


def check_shape(
    name: str, t: Tensor, shapes: tuple[tuple[int, ...], ...], x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """`t` has one of `shapes` and of `dtypes`, on the device of `x`."""
    if tuple(t.shape) not in shapes:
        raise UserError(f"{name}: got shape {tuple(t.shape)}, allowed is {' or '.join(map(str, shapes))}")
    if t.dtype not in dtypes:
        raise UserError(f"{name}: got {t.dtype}, allowed is {' or '.join(map(str, dtypes))}")
    if t.device != x.device:
        raise UserError(f"{name}: got device {t.device}, allowed is that of x, {x.device}")


def check_count(name: str, value: object, top: int) -> None:
    """`value` is an integer from 0 to below `top`."""
    if not isinstance(value, int) or not 0 <= value < top:
        raise UserError(f"{name}: got {value!r}, allowed is an integer from 0 to {top - 1}")


def check_clip(clip_range: float | None) -> None:
    """`clip_range` is None or above 0."""
    if clip_range is not None and not clip_range > 0:
        raise UserError(f"clip_range: got {clip_range}, allowed is > 0 or None")


def is_dense(t: Tensor) -> bool:
    """Whether `t` lies in memory as its indices run, or with its channels side by side, as images or volumes may."""
    return t.is_contiguous() or (t.dim() in CHANNELS_LAST and t.is_contiguous(memory_format=CHANNELS_LAST[t.dim()]))


def check_contiguous(**tensors: Tensor | None) -> None:
    """Each tensor lies in memory as its indices run."""
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise UserError(f"{name}: got strides {t.stride()}, allowed is a contiguous tensor: call .contiguous()")


def check_no_grad(**tensors: Tensor | None) -> None:
    """No tensor asks for a gradient that the op does not have."""
    for name, t in tensors.items():
        if needs_grad(t):
            raise UserError(
                f"{name}: got requires_grad=True, allowed is a tensor without: this op has no gradient, use"
                " torch.no_grad()"
            )


def check_first_derivative(op: str) -> None:
    """A backward pass is not itself being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: got create_graph=True, allowed is a first derivative: the kernel has no second,"
            " backend('torch') has"
        )
