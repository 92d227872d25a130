"""The autoencoder and the UNet."""

from sbldm_fast.diffusion.config import SchedulerConfig

from .config import UNetConfig, VAEConfig
from .presets import preset
from .unet import UNet2D
from .vae import AutoencoderKL, DiagonalGaussian

__all__ = ["AutoencoderKL", "DiagonalGaussian", "SchedulerConfig", "UNet2D", "UNetConfig", "VAEConfig", "preset"]
