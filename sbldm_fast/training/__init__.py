"""Training of the autoencoder and of the UNet."""

from .config import TrainConfig
from .distill import distill_pipeline
from .objective import Objective
from .ranks import torchrun
from .run import Stopped
from .stages import train_pipeline
from .volume import train_volume

__all__ = ["Objective", "Stopped", "TrainConfig", "distill_pipeline", "torchrun", "train_pipeline", "train_volume"]
