"""Scans to training slices, and a synthetic population."""

from .dataset import Slices
from .prepare import prepare

__all__ = ["Slices", "prepare"]
