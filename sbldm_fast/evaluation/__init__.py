"""How good samples are, and whether they are copies."""

from .coherence import gradients, neighbour_ssim, spectrum_along
from .distribution import Features, compare, frechet_distance, kid, precision_recall
from .features import extract
from .material import Settings
from .memorisation import Neighbours, nearest
from .metrics import (
    diversity,
    fft_sharpness,
    four_g_r_ssim,
    laplacian_variance,
    ms_ssim,
    nrmse,
    psnr,
    radial_spectrum,
    ssim,
)
from .report import evaluate_pipeline

__all__ = [
    "Features",
    "Neighbours",
    "Settings",
    "compare",
    "diversity",
    "evaluate_pipeline",
    "extract",
    "fft_sharpness",
    "four_g_r_ssim",
    "frechet_distance",
    "gradients",
    "kid",
    "laplacian_variance",
    "ms_ssim",
    "nearest",
    "neighbour_ssim",
    "nrmse",
    "precision_recall",
    "psnr",
    "radial_spectrum",
    "spectrum_along",
    "ssim",
]
