"""Training of the autoencoder and of the UNet."""

from .loop import Optimisation, Stopped
from .objective import Objective
from .ranks import torchrun
from .stages import train_pipeline

__all__ = ["Objective", "Optimisation", "Stopped", "torchrun", "train_pipeline"]
