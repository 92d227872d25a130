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
    MONAI's timesteps. `solver_order` is of UniPC.
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
            ("prediction_type", ("epsilon", "sample", "v_prediction")),
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
