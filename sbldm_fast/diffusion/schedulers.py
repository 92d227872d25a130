"""Schedulers that speak diffusers' protocol and, on a CPU in float32, give its results to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.files import read_json, write_json

from ..config import Config
from ..errors import MissingExtra, UserError
from .config import SchedulerConfig
from .schedule import NoiseSchedule, rescale_zero_terminal_snr

if TYPE_CHECKING:
    import diffusers

THEIR_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
FILE = "scheduler_config.json"  # diffusers' name for it


class SchedulerOutput(NamedTuple):
    """What `step` returns: the sample one timestep earlier and the model's idea of x0."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Configured:
    """What all schedulers of our own share: a configuration and the folder format."""

    Configuration: ClassVar[type[Config]]
    config: Any
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def from_config(cls, config: Config | Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler from a configuration of ours or of any diffusers scheduler; keys of other schedulers are passed
        over.

        Raises:
            ValueError: the configuration asks for something that this scheduler cannot do.
        """
        given = config.to_dict() if isinstance(config, Config) else dict(config)
        known = {k: v for k, v in {**given, **overrides}.items() if k in cls.Configuration.__dataclass_fields__}
        return cls(**known)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json`."""
        write_json(Path(folder) / FILE, {**self.config.to_dict(), "_class_name": type(self).__name__})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `scheduler_config.json`; errors as `from_config`."""
        return cls.from_config(read_json(Path(folder) / FILE))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: these schedulers do not scale."""
        return sample


class _Scheduler(Configured):
    """What DDIM and DDPM share: the tables, the timesteps and the forward process."""

    Configuration = SchedulerConfig
    config: SchedulerConfig

    def __init__(self, **config: Any) -> None:
        self.config = SchedulerConfig.from_dict(config)
        c = self.config
        _refuse_flow(type(self).__name__, c.prediction_type)
        self.betas, self.alphas_cumprod = _tables(c)
        one = torch.tensor(1.0)
        self.final_alpha_cumprod = one if c.set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(c.num_train_timesteps - 1, -1, -1)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of a run: int64, descending, in `self.timesteps`.

        Raises:
            ValueError: not 1 to num_train_timesteps steps, or an offset that runs past the last timestep.
        """
        T, n = self.config.num_train_timesteps, num_inference_steps
        steps: np.ndarray
        if not 1 <= n <= T:
            raise UserError(f"num_inference_steps: got {n}, allowed is 1 to {T}")
        if self.config.compat == "monai":
            # MONAI: linspace in float32, and the offset shortens the range instead of shifting it
            offset = self.config.steps_offset
            steps = (torch.linspace(T - 1 - offset, 0, n).round().long() + offset).numpy()
        elif self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, T - 1, n).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            steps = (np.arange(n) * (T // n))[::-1] + self.config.steps_offset
        else:
            steps = np.arange(T, 0, -T / n).round() - 1
        if steps[0] >= T:
            raise UserError(
                f"steps_offset: got {self.config.steps_offset}, with {n} steps the first timestep is past {T - 1}"
            )
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(steps.astype(np.int64)).to(device)

    def previous_timestep(self, timestep: int) -> int:
        """The timestep that `step` leads to, negative for x0.

        With `prev="stride"` one stride T // n down, as in diffusers and MONAI, which is wrong where timesteps are
        unevenly spaced (linspace, and trailing where n does not divide T; diffusers #12633, MONAI #8600); with
        `prev="lookup"` the next of `timesteps`.

        Raises:
            ValueError: `set_timesteps` was not called, or a timestep to look up that is not in `timesteps`.
        """
        if self.num_inference_steps is None:
            raise UserError("num_inference_steps: got None, call set_timesteps first")
        if self.config.prev == "lookup":
            return self._next_timestep(timestep)
        return timestep - self.config.num_train_timesteps // self.num_inference_steps

    def _next_timestep(self, timestep: int) -> int:
        steps = self.timesteps.tolist()
        if timestep not in steps:
            raise UserError(f"timestep: got {timestep}, allowed are the {len(steps)} in self.timesteps")
        return int([*steps, -1][steps.index(timestep) + 1])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e`, timesteps `[N]`."""
        root, rest = self._roots(original_samples, timesteps)
        return root * original_samples + rest * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`v_t = sqrt(a_t) e - sqrt(1 - a_t) x_0`, timesteps `[N]`. Source: Salimans & Ho 2022, arXiv:2202.00512."""
        root, rest = self._roots(sample, timesteps)
        return root * noise - rest * sample

    def _roots(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # the table itself keeps its dtype: casting it for good is what breaks MONAI after one half-precision call
        a = self.alphas_cumprod.to(like.device, like.dtype)[timesteps.to(like.device)].reshape(
            -1, *[1] * (like.dim() - 1)
        )
        return a**0.5, (1 - a) ** 0.5

    def _alphas(self, timestep: int) -> tuple[Tensor, Tensor]:
        before = self.previous_timestep(timestep)
        return self.alphas_cumprod[timestep], self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod

    def _x0(self, m: Tensor, a: Tensor, x: Tensor) -> Tensor:
        if self.config.prediction_type == "epsilon":
            return (x - (1 - a) ** 0.5 * m) / a**0.5
        if self.config.prediction_type == "sample":
            return m
        return a**0.5 * x - (1 - a) ** 0.5 * m

    def _clip(self, x0: Tensor) -> Tensor:
        c = self.config
        return x0.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0


class DDIMScheduler(_Scheduler):
    """DDIM: `x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) e + sigma z`, under diffusers' names and defaults.

    Keyword arguments are the fields of `SchedulerConfig`. `ValueError` for a value that is not allowed.
    Source: Song et al. 2021, arXiv:2010.02502, equations 12 and 16.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """The sample one timestep earlier; arguments as in diffusers, the result is a tuple in either case.

        Raises:
            ValueError: `set_timesteps` was not called, or both `generator` and `variance_noise` were given.
        """
        a, a_prev = self._alphas(int(timestep))
        x0 = self._x0(model_output, a, sample)
        if self.config.prediction_type == "epsilon":
            e = model_output
        elif self.config.prediction_type == "sample":
            e = (sample - a**0.5 * x0) / (1 - a) ** 0.5
        else:
            e = a**0.5 * model_output + (1 - a) ** 0.5 * sample
        x0 = self._clip(x0)
        sigma = eta * (((1 - a_prev) / (1 - a)) * (1 - a / a_prev)) ** 0.5
        if use_clipped_model_output:
            e = (sample - a**0.5 * x0) / (1 - a) ** 0.5
        out = a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * e
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise UserError("generator, variance_noise: got both, allowed is one of them")
            if variance_noise is None:
                variance_noise = _noise_like(model_output, generator)
            out = out + sigma * variance_noise
        return SchedulerOutput(out, x0)


class DDPMScheduler(_Scheduler):
    """DDPM: the posterior mean of x_{t-1} plus noise of variance `fixed_small`, under diffusers' names and defaults.

    Keyword arguments are the fields of `SchedulerConfig`. `ValueError` for a value that is not allowed.
    Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7.
    """

    def previous_timestep(self, timestep: int) -> int:
        """The next entry of `timesteps`, -1 after the last, and t - 1 before `set_timesteps`, as in diffusers' DDPM.

        Raises:
            ValueError: a timestep that is not in `timesteps`.
        """
        return timestep - 1 if self.num_inference_steps is None else self._next_timestep(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """The sample one timestep earlier; arguments as in diffusers, the result is a tuple in either case."""
        t = int(timestep)
        before = self.previous_timestep(t)
        a, a_prev = self.alphas_cumprod[t], self.alphas_cumprod[before] if before >= 0 else torch.tensor(1.0)
        alpha, beta, beta_prev = a / a_prev, 1 - a / a_prev, 1 - a_prev
        x0 = self._clip(self._x0(model_output, a, sample))
        out = (a_prev**0.5 * beta) / (1 - a) * x0 + alpha**0.5 * beta_prev / (1 - a) * sample
        if t > 0:
            variance = torch.clamp(beta_prev / (1 - a) * beta, min=1e-20)
            out = out + variance**0.5 * _noise_like(model_output, generator)
        return SchedulerOutput(out, x0)


class _DiffusersFactory:
    """Makes a scheduler of diffusers, of the name of the class, on the betas of any of our schedules.

    Calling it returns diffusers' own object, so that `isinstance` with this class is False. Keyword arguments are those
    of the class of that name in diffusers, and the schedules, `gamma` and `normalise` of `SchedulerConfig`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a value that is not allowed.
    """

    def __new__(cls, **config: Any) -> diffusers.SchedulerMixin:
        """diffusers' scheduler."""
        if not config.get("use_flow_sigmas"):  # with these diffusers' solver is one of flows
            _refuse_flow(cls.__name__, config.get("prediction_type"))
        ours = {k: v for k, v in config.items() if k in SchedulerConfig.__dataclass_fields__}
        betas = {
            k: config.pop(k)
            for k in ("beta_start", "beta_end", "beta_schedule", "trained_betas", "gamma", "normalise")
            if k in config
        }
        if betas.get("trained_betas") is None and betas.get("beta_schedule", "linear") not in THEIR_SCHEDULES:
            betas = {"trained_betas": _tables(SchedulerConfig.from_dict(ours))[0].tolist()}
        return cls._theirs()(**config, **{k: v for k, v in betas.items() if k not in ("gamma", "normalise")})

    @classmethod
    def from_config(cls, config: SchedulerConfig | Mapping[str, Any], **overrides: Any) -> diffusers.SchedulerMixin:
        """diffusers' scheduler from a configuration of ours or of any of diffusers'; keys that it does not know are
        passed over."""
        given = config.to_dict() if isinstance(config, Config) else dict(config)
        takes = {*inspect.signature(cls._theirs().__init__).parameters, "gamma", "normalise"}
        return cls(**{k: v for k, v in {**given, **overrides}.items() if k in takes})

    @classmethod
    def _theirs(cls) -> type[diffusers.SchedulerMixin]:
        try:
            import diffusers
        except ImportError:
            need = f"{cls.__name__}, unlike the other schedulers,"
            raise MissingExtra(need, "diffusers", "bench") from None
        theirs: type[diffusers.SchedulerMixin] = getattr(diffusers, cls.__name__)
        return theirs


class DPMSolverMultistepScheduler(_DiffusersFactory):
    """Makes diffusers' DPM-Solver++: calling it returns a `diffusers.DPMSolverMultistepScheduler` on our betas.

    `x' = (s'/s) x - a' (exp(-h) - 1) (D_0 + D_1 / 2)`, D_0 = x0, D_1 its divided difference, h the step in log(a/s).
    Keyword arguments are diffusers', and the schedules, `gamma` and `normalise` of `SchedulerConfig`.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2; diffusers does the arithmetic.
    """


def _refuse_flow(name: str, prediction_type: str | None) -> None:
    if prediction_type == "flow_prediction":
        raise UserError(
            f"prediction_type: got 'flow_prediction', allowed for {name} are epsilon, sample, v_prediction;"
            " FlowMatchEulerDiscreteScheduler takes it"
        )


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    # drawn where the generator lives, then moved, as diffusers does
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _tables(c: SchedulerConfig) -> tuple[Tensor, Tensor]:
    """Betas and alphas_cumprod in float32: where diffusers knows the schedule by its own arithmetic, else from
    float64."""
    T = c.num_train_timesteps
    if c.trained_betas is not None:
        betas = torch.tensor(c.trained_betas, dtype=torch.float32)
    elif c.beta_schedule == "linear":
        betas = torch.linspace(c.beta_start, c.beta_end, T, dtype=torch.float32)
    elif c.beta_schedule == "scaled_linear":
        betas = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, T, dtype=torch.float32) ** 2
    elif c.beta_schedule == "squaredcos_cap_v2":
        betas = NoiseSchedule("cosine", T).betas.float()
    else:
        own = NoiseSchedule(
            c.beta_schedule,
            T,
            c.beta_start,
            c.beta_end,
            gamma=c.gamma,
            normalise=c.normalise,
            zero_terminal_snr=c.rescale_betas_zero_snr,
        )
        return own.betas.float(), own.alphas_cumprod
    if c.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return betas, torch.cumprod(1.0 - betas, dim=0)
