"""Trained models to ONNX, for ONNX Runtime and TensorRT."""

from .check import check
from .graphs import export
from .ort import ORTSampler

__all__ = ["ORTSampler", "check", "export"]
