"""Training of the autoencoder and of the UNet."""

from .loop import Optimisation
from .stages import train_pipeline

__all__ = ["Optimisation", "train_pipeline"]
