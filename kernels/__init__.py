"""Fused kernels for small diffusion models: each op has a PyTorch reference and a Triton kernel that is proven equal to it."""

from ._backend import backend
from .ddim_step import ddim_step
from .group_norm_silu import GroupNormSiLU, group_norm_silu
from .philox_normal import philox_normal

__all__ = ["GroupNormSiLU", "backend", "ddim_step", "group_norm_silu", "philox_normal"]
