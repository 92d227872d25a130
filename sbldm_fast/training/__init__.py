"""Training of the autoencoder and of the UNet."""

from .loop import Optimisation, Stopped, torchrun
from .objective import Objective
from .stages import train_pipeline

__all__ = ["Objective", "Optimisation", "Stopped", "torchrun", "train_pipeline"]
