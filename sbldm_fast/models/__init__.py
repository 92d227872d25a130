"""The autoencoder and the UNet."""

from .config import SchedulerConfig, UNetConfig, VAEConfig, preset
from .unet import UNet2D
from .vae import AutoencoderKL, DiagonalGaussian

__all__ = ["AutoencoderKL", "DiagonalGaussian", "SchedulerConfig", "UNet2D", "UNetConfig", "VAEConfig", "preset"]
