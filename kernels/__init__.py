"""Fused kernels for small diffusion models: each op has a PyTorch reference and a Triton kernel that is proven equal to
it."""

from . import group_norm_silu_backward as _registered  # noqa: F401  # the op that autograd calls by name
from ._backend import backend
from .ddim_step import ddim_step
from .diffuse import diffuse
from .frequency_loss import frequency_loss
from .group_norm_silu import GroupNormSiLU, group_norm_silu
from .mix_slices import mix_slices
from .philox_normal import philox_normal
from .solver_step import solver_step
from .spectral_mse import spectral_mse

__all__ = [
    "GroupNormSiLU",
    "backend",
    "ddim_step",
    "diffuse",
    "frequency_loss",
    "group_norm_silu",
    "mix_slices",
    "philox_normal",
    "solver_step",
    "spectral_mse",
]
