"""Sampling: the loop and the pipeline around it."""

from .pipeline import Pipeline
from .sampler import FastSampler

__all__ = ["FastSampler", "Pipeline"]
