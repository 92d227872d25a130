"""Trained models to ONNX."""

from .graphs import export

__all__ = ["export"]
