"""Noise schedules and schedulers."""

from .schedule import NoiseSchedule
from .schedulers import DDIMScheduler, DDPMScheduler
from .table import DDIMTable, ddim_table

__all__ = ["DDIMScheduler", "DDIMTable", "DDPMScheduler", "NoiseSchedule", "ddim_table"]
