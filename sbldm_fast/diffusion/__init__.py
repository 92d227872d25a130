"""Noise schedules, schedulers and the tables they turn into."""

from .config import SchedulerConfig
from .flow import FlowMatchEulerDiscreteScheduler, RFlowScheduler
from .schedule import NoiseSchedule
from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from .table import NotLinear, SolverTable
from .unipc import UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "NoiseSchedule",
    "NotLinear",
    "RFlowScheduler",
    "SchedulerConfig",
    "SolverTable",
    "UniPCMultistepScheduler",
]
