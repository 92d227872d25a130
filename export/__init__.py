"""Trained models to ONNX, for ONNX Runtime and TensorRT."""

from .exporter import export
from .ort import ORTSampler
from .verify import check

__all__ = ["ORTSampler", "check", "export"]
