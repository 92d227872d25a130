"""Noise schedules, schedulers and the tables they turn into."""

from .config import SchedulerConfig
from .schedule import NoiseSchedule
from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from .table import NotLinear, SolverTable

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "NoiseSchedule",
    "NotLinear",
    "SchedulerConfig",
    "SolverTable",
    "UniPCMultistepScheduler",
]
