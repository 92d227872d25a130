"""Noise schedules, schedulers and the tables they turn into."""

from .config import SchedulerConfig
from .schedule import NoiseSchedule
from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from .table import NotLinear, SolverTable
from .unipc import UniPCMultistepScheduler

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
