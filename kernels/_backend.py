"""Which implementation of an op runs: the PyTorch reference or the Triton kernel, and why."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sbldm_fast.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, Arm: the reference still runs everywhere

    class _NoTriton:
        """Stands in for `triton` and `tl` so that the kernel files import; `resolve` keeps the kernels from being
        launched."""

        constexpr = None

        @staticmethod
        def jit(function: object = None, **_: object) -> object:
            return function or (lambda f: f)

    triton = tl = _NoTriton

HAS_TRITON = triton.__name__ == "triton"
__all__ = ["HAS_TRITON", "backend", "interpreted", "needs_grad", "obstacle", "resolve", "tl", "triton"]
CHOICES = ("auto", "torch", "triton")
_choice = os.environ.get("SBLDM_FAST_BACKEND", "auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every fused op inside a `with` block.

    `"torch"` is the readable reference, `"triton"` the kernel (an error where it cannot run), `"auto"` the kernel on
    CUDA and the reference elsewhere. The environment variable `SBLDM_FAST_BACKEND` sets the default.

    Raises:
        ValueError: `name` is none of the three.
    """
    global _choice
    if name not in CHOICES:
        raise UserError(f"backend: got {name!r}, allowed are {', '.join(CHOICES)}")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "meta":
        return None  # nothing is computed: the op gives the shapes, so that a count on meta tensors is one of CUDA
    if device.type == "cpu" and interpreted():
        return None
    return f"Triton has no {device.type} target (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"


@functools.cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (7, 0)
    return None if major >= 7 else f"Triton needs compute capability 7.0 or newer, and {device} has {major}.{minor}"


def resolve(device: torch.device, no_gradient: bool = False) -> tuple[str, str]:
    """The implementation that an op on `device` gets, and the reason in one clause.

    `no_gradient`: a gradient is asked for, and the op's kernel has none.

    Raises:
        ValueError: `"triton"` was asked for where it cannot run, or a gradient is needed that the kernel does not have.
    """
    if _choice not in CHOICES:
        raise UserError(f"SBLDM_FAST_BACKEND: got {_choice!r}, allowed are {', '.join(CHOICES)}")
    if _choice == "torch":
        return "torch", "asked for"
    why_not = obstacle(device)
    if _choice == "triton":
        if why_not:
            raise UserError(f"backend='triton' cannot run on {device}: {why_not}; use backend='auto' or 'torch'")
        if no_gradient:
            raise UserError(
                "backend='triton' has no gradient of this op: use torch.no_grad(), or backend='auto' or 'torch'"
            )
        return "triton", "asked for"
    if why_not:
        return "torch", why_not
    if device.type == "cpu":
        return "torch", "the interpreter is for tests, not for speed"
    if no_gradient:
        return "torch", "this op's kernel has no gradient"
    return "triton", "CUDA device"


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
