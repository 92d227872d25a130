"""Rectified flow: a straight line from data to noise, `x_t = (1 - s) x0 + s e` with s = t / T, and Euler steps back.

The timesteps t run from T, pure noise, to 0 and need not be whole. Sources: Liu et al. 2022, arXiv:2209.03003; Lipman
et al. 2022, arXiv:2210.02747.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..errors import UserError
from .config import FlowConfig, RFlowConfig
from .schedulers import Configured, SchedulerOutput

# of diffusers' class, each another grid or another step
NOT_OURS = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def flow_alphas(num_train_timesteps: int) -> Tensor:
    """`1 - s` at the timesteps 1 to T, float32 `[T]`: what `diffuse` is given in place of `alphas_cumprod`."""
    return 1 - torch.arange(1, num_train_timesteps + 1) / num_train_timesteps


class _Flow(Configured):
    """What the two share: the forward process, and which timestep a step leads to."""

    timesteps: Tensor
    num_inference_steps: int | None = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t = (1 - s) x_0 + s e`, s = t / T, timesteps `[N]`, whole or not."""
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        s = timesteps.to(original_samples.device, wide) / self.config.num_train_timesteps
        s = s.reshape(-1, *[1] * (original_samples.dim() - 1))
        noised: Tensor = s * noise + (1 - s) * original_samples
        return noised.to(original_samples.dtype)

    def _check_steps(self, n: int) -> None:
        T = self.config.num_train_timesteps
        if not 1 <= n <= T:
            raise UserError(f"num_inference_steps: got {n}, allowed is 1 to {T}")

    def _steps(self) -> int:
        if self.num_inference_steps is None:
            raise UserError("num_inference_steps: got None, call set_timesteps first")
        return self.num_inference_steps

    def _index(self, timestep: float | Tensor) -> int:
        self._steps()
        at = [i for i, t in enumerate(self.timesteps.tolist()) if t == float(timestep)]
        if len(at) != 1:
            raise UserError(
                f"timestep: got {float(timestep)}, {len(at)} times in self.timesteps, allowed are those that are there"
                " once"
            )
        return at[0]


class FlowMatchEulerDiscreteScheduler(_Flow):
    """Euler steps along a rectified flow, `x' = x + (s' - s) m` with m = e - x0, under diffusers' names and defaults.

    `num_train_timesteps` and `shift`, which spends more steps near the noise the larger it is: `s = shift s / (1 +
    (shift - 1) s)`. `ValueError` for a value that is not allowed.
    Source: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206, section 5.3.2 (shift).
    """

    Configuration = FlowConfig
    config: FlowConfig

    def __init__(self, **config: Any) -> None:
        self.config = FlowConfig.from_dict(config)
        T = self.config.num_train_timesteps
        self.sigmas = self._shifted(torch.arange(T, 0, -1, dtype=torch.float32) / T)
        self.sigma_max, self.sigma_min = float(self.sigmas[0]), float(self.sigmas[-1])
        self.timesteps = self.sigmas * T

    @classmethod
    def from_config(cls, config: Config | Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler from a configuration of ours or of diffusers; keys of other schedulers are passed over.

        Raises:
            ValueError: the configuration asks for something that this scheduler cannot do.
        """
        given = config.to_dict() if isinstance(config, Config) else config
        for name in NOT_OURS:
            if given.get(name):
                raise UserError(
                    f"{name}: got {given[name]!r}, allowed is none; SolverTable takes diffusers' own object"
                )
        return super().from_config(config, **overrides)

    def _shifted(self, s: Any) -> Any:
        return self.config.shift * s / (1 + (self.config.shift - 1) * s)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of a run: float32, descending from T, in `self.timesteps`, and `self.sigmas`, s of each
        and 0.

        Raises:
            ValueError: not 1 to num_train_timesteps steps.
        """
        self._check_steps(num_inference_steps)
        T = self.config.num_train_timesteps
        # diffusers shifts a second time what its least sigma, shifted already, is the end of
        s = self._shifted(np.linspace(self.sigma_max * T, self.sigma_min * T, num_inference_steps) / T)
        self.num_inference_steps = num_inference_steps
        sigmas = torch.from_numpy(s).float()
        self.timesteps = (sigmas * T).to(device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(device)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as diffusers calls it here."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """The sample one timestep earlier, in the dtype of the model's output; the result is a tuple in either case.

        Raises:
            ValueError: `set_timesteps` was not called, or a timestep that is not in `timesteps`.
        """
        i = self._index(timestep)
        s, following = self.sigmas[i : i + 2].double()  # 0-dim: the products keep the dtype of the model's output
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        prev, x0 = x + (following - s) * model_output, x - s * model_output
        return SchedulerOutput(prev.to(model_output.dtype), x0.to(model_output.dtype))


class RFlowScheduler(_Flow):
    """Euler steps along a rectified flow, `x' = x + (t - t') / T m` with m = x0 - e, under MONAI's names and defaults.

    MONAI 1.6 keeps timesteps as float16 and drops the fraction of t', not of t: with `use_discrete_timesteps=False`,
    as MAISI is used, the steps add up to about 1.01 in place of 1. Here they add up to 1; `compat="monai"` computes
    what MONAI does. Keyword arguments are the fields of `RFlowConfig`; `ValueError` for a value that is not allowed.
    Source: Liu et al. 2022, arXiv:2209.03003; MONAI `networks/schedulers/rectified_flow.py`.
    """

    Configuration = RFlowConfig
    config: RFlowConfig

    def __init__(self, **config: Any) -> None:
        self.config = RFlowConfig.from_dict(config)
        self.timesteps = torch.arange(self.config.num_train_timesteps, 0, -1)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        input_img_size_numel: int | None = None,
    ) -> None:
        """Choose the timesteps of a run: int64 if they are discrete, else float32, descending from T.

        Args:
            input_img_size_numel: the pixels of what the model is given, which `use_timestep_transform` needs; None:
                that of the configuration.

        Raises:
            ValueError: not 1 to num_train_timesteps steps, or a transform without that size.
        """
        self._check_steps(num_inference_steps)
        c, numel = self.config, input_img_size_numel or self.config.input_img_size_numel
        T, monai = c.num_train_timesteps, c.compat == "monai"
        t = (1.0 - np.arange(num_inference_steps) / num_inference_steps) * T
        if monai and c.use_discrete_timesteps:
            t = t.round()
        if c.use_timestep_transform:
            if numel is None or numel < 1:
                raise UserError(f"input_img_size_numel: got {numel}, allowed with use_timestep_transform is 1 or more")
            ratio = (numel / c.base_img_size_numel) ** (1.0 / c.spatial_dim)
            t = ratio * (t / T) / (1 + (ratio - 1) * (t / T)) * T
        if monai:
            t = t.astype(np.float16)
        if c.use_discrete_timesteps:
            t = (t if monai else t.round()).astype(np.int64)
        self.num_inference_steps = num_inference_steps
        kept = t if monai or c.use_discrete_timesteps else t.astype(np.float32)
        self.timesteps = torch.from_numpy(kept).to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        next_timestep: float | Tensor | None = None,
    ) -> SchedulerOutput:
        """The sample at `next_timestep`, by default the next of `timesteps` (MONAI: 1 / steps further), and x0.

        Raises:
            ValueError: `set_timesteps` was not called, or without `next_timestep` a timestep that is not in `timesteps`
                or more than once.
        """
        T = self.config.num_train_timesteps
        if self.config.compat == "monai":
            dt = 1 / self._steps() if next_timestep is None else float(timestep - int(next_timestep)) / T
        else:
            if next_timestep is None:
                next_timestep = ([*self.timesteps.tolist(), 0])[self._index(timestep) + 1]
            dt = (float(timestep) - float(next_timestep)) / T
        return SchedulerOutput(sample + model_output * dt, sample + model_output * timestep / T)
