"""Scans to training slices, and a synthetic population."""

from .dataset import Slices
from .frame import Frame
from .prepare import prepare

__all__ = ["Frame", "Slices", "prepare"]
