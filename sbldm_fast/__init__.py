"""Fast slice-by-slice latent diffusion for brain MRI: measure, drop in, export.

    from sbldm_fast import Pipeline
    images = Pipeline.from_pretrained("demo").sample(16, seed=0)   # [16, 1, 128, 128] in [-1, 1]

Images are synthetic, not for diagnosis.

Beside the names below: `sbldm_fast.kernels`, the fused ops; `sbldm_fast.data`, scans to slices; `sbldm_fast.training`;
`sbldm_fast.export`, ONNX graphs; `sbldm_fast.images`, pictures of samples; `sbldm_fast.errors`.
"""

from .diffusion import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    NoiseSchedule,
    RFlowScheduler,
    SchedulerConfig,
    SolverTable,
    UniPCMultistepScheduler,
)
from .models import AutoencoderKL, UNet2D, UNetConfig, VAEConfig, preset
from .sampling import FastSampler, Pipeline
from .volume_files import save_volume

__version__ = "0.1.0"
__all__ = [
    "AutoencoderKL",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FastSampler",
    "FlowMatchEulerDiscreteScheduler",
    "NoiseSchedule",
    "Pipeline",
    "RFlowScheduler",
    "SchedulerConfig",
    "SolverTable",
    "UNet2D",
    "UNetConfig",
    "UniPCMultistepScheduler",
    "VAEConfig",
    "preset",
    "save_volume",
]
