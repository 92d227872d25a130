"""The configuration of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as short  # what a file holds may be of any length, and no text for a terminal
from typing import ClassVar

from ..config import Config
from ..errors import UserError


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """What a scheduler needs, under diffusers' names and with its defaults; our presets do not clip, latents are not in
    [-1, 1].

    Beyond diffusers: the schedules `cosine_ramp`, `cosine` and `gamma` with `gamma` and `normalise` (see
    `NoiseSchedule`); `prev`, the timestep that a step of DDIM leads to (see `previous_timestep`); `compat="monai"`,
    MONAI's timesteps; `prediction_type="flow_prediction"`, a rectified flow, which has no betas (see `FlowConfig`).
    `solver_order` is of UniPC.
    """

    BETA_SCHEDULES: ClassVar = ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine_ramp", "cosine", "gamma")

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    gamma: float = 0.5
    normalise: str = "none"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    prev: str = "stride"
    compat: str = "diffusers"
    solver_order: int = 2

    LIKE: ClassVar = {"trained_betas": (1e-4,)}
    BOUNDS: ClassVar = {
        "num_train_timesteps": (1, 100_000),
        "steps_offset": (0, 100_000),
        "solver_order": (1, 3),
        "clip_sample_range": (1e-6, 1e6),
        "gamma": (1e-3, 1e3),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("beta_schedule", self.BETA_SCHEDULES),
            ("prediction_type", ("epsilon", "sample", "v_prediction", "flow_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
            ("thresholding", (False,)),
            ("variance_type", ("fixed_small",)),
            ("prev", ("stride", "lookup")),
            ("compat", ("diffusers", "monai")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: got {short(getattr(self, name))}, allowed are {', '.join(map(str, allowed))}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"beta_start, beta_end: got {self.beta_start}, {self.beta_end}, allowed is 0 < start <= end < 1"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"trained_betas: got {len(self.trained_betas)}, allowed is num_train_timesteps ="
                f" {self.num_train_timesteps}"
            )
        if self.trained_betas is not None and not all(0 < beta < 1 for beta in self.trained_betas):
            raise UserError("trained_betas: got one that is not between 0 and 1, allowed are betas above 0 and below 1")


@dataclass(frozen=True)
class FlowConfig(SchedulerConfig):
    """What `FlowMatchEulerDiscreteScheduler` needs: `num_train_timesteps` and `shift`; the other fields change nothing
    in it."""

    prediction_type: str = "flow_prediction"
    shift: float = 1.0

    BOUNDS: ClassVar = {**SchedulerConfig.BOUNDS, "shift": (1e-3, 1e3)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type != "flow_prediction":
            raise UserError(
                f"prediction_type: got {self.prediction_type!r}, allowed for FlowMatchEulerDiscreteScheduler is"
                " flow_prediction; DDIMScheduler takes the others"
            )


@dataclass(frozen=True)
class RFlowConfig(Config):
    """What `RFlowScheduler` needs, under MONAI's names and with its defaults.

    Beyond MONAI: `input_img_size_numel`, for callers that give `set_timesteps` the number of steps alone;
    `compat="monai"`, MONAI's rounding. `prediction_type` keeps other schedulers from reading its files: the model's
    sign is another than theirs.
    """

    num_train_timesteps: int = 1000
    use_discrete_timesteps: bool = True
    use_timestep_transform: bool = False
    base_img_size_numel: int = 32 * 32 * 32
    spatial_dim: int = 3
    input_img_size_numel: int | None = None
    compat: str = "exact"
    prediction_type: str = "rflow"

    LIKE: ClassVar = {"input_img_size_numel": 1}
    BOUNDS: ClassVar = {
        "num_train_timesteps": (1, 100_000),
        "base_img_size_numel": (1, 2**40),
        "spatial_dim": (1, 3),
        "input_img_size_numel": (1, 2**40),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("compat", ("exact", "monai")), ("prediction_type", ("rflow",))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: got {short(getattr(self, name))}, allowed are {', '.join(allowed)}")
