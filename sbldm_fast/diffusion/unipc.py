"""UniPC, natively: the pipeline's own solver needs no other library."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..errors import UserError
from .schedulers import SchedulerOutput, _Scheduler

# of diffusers' class, what this one is
OWN: dict[str, Any] = {
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "thresholding": False,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"), False),
}


class UniPCMultistepScheduler(_Scheduler):
    """UniPC, a predictor-corrector on x0, under diffusers' names and defaults: `bh2`, no noise, no clipping.

    With l = log(a/s), h the step in l and D_k = (x0_-k - x0) / r_k, r_k = (l_-k - l) / h, a step is
    `x' = (s'/s) x - a' (exp(-h) - 1) (x0 + sum_k rho_k D_k)`, and the next model output corrects it before it goes on.
    The first steps and the last, which leads to x0 itself, are of lower order; `solver_order` and the other keyword
    arguments are fields of `SchedulerConfig`. `ValueError` for a value that is not allowed.
    Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**{"timestep_spacing": "linspace"} | config)
        self._start = 0
        self._past: list[tuple[int, Tensor]] = []  # timesteps and x0 of the steps before, newest last
        self._left: tuple[int, int, Tensor] | None = None  # timestep, order and x of the step before

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> Self:
        """A scheduler from a configuration of ours or of diffusers; keys of other schedulers are passed over.

        Raises:
            ValueError: the configuration asks for something that this scheduler cannot do.
        """
        given = {**(config.to_dict() if isinstance(config, Config) else config), **overrides}
        for name, own in OWN.items():
            if given.get(name, own) != own:
                raise UserError(
                    f"{name}: got {given[name]!r:.100}, allowed is {own!r}; FastSampler takes diffusers' own object"
                )
        return super().from_config(config, **overrides)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """As of every scheduler, except that `leading` and `linspace` are cut into one more step, whose end is left
        out, as in diffusers; what was remembered of a run is forgotten."""
        super().set_timesteps(num_inference_steps, device)
        T, n, spacing = self.config.num_train_timesteps, num_inference_steps, self.config.timestep_spacing
        if spacing in ("leading", "linspace"):
            places = np.linspace(0, T - 1, n + 1).round().astype(np.int64)
            if spacing == "leading":
                places = np.arange(n + 1) * (T // (n + 1)) + self.config.steps_offset
            if len(np.unique(places[1:])) < n:
                raise UserError(f"num_inference_steps: got {n}, allowed with {spacing!r} are fewer: timesteps repeat")
            self.timesteps = torch.from_numpy(places[:0:-1].copy()).to(device)
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the next run with that timestep, at first order: the run of an img2img.

        Raises:
            ValueError: not the number of a timestep.
        """
        if type(begin_index) is not int or not 0 <= begin_index < len(self.timesteps):
            raise UserError(f"begin_index: got {begin_index!r}, allowed is 0 to {len(self.timesteps) - 1}")
        self._start, self._past, self._left = begin_index, [], None

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """The sample at the next timestep; the steps of a run come in their order.

        Raises:
            ValueError: `set_timesteps` was not called, or a timestep that is not in `timesteps` or not the next one.
        """
        t = int(timestep)
        if self.num_inference_steps is None:
            raise UserError("num_inference_steps: got None, call set_timesteps first")
        following = self._next_timestep(t)
        index = self.timesteps.tolist().index(t)
        if index == self._start:
            self.set_begin_index(index)
        x0 = self._x0(model_output, self.alphas_cumprod[t], sample)
        if self._left is not None:
            before, order, x = self._left
            if self._next_timestep(before) != t:
                raise UserError(f"timestep: got {t}, allowed after {before} is {self._next_timestep(before)}")
            sample = self._update(x, before, t, order, x0)
        order = min(self.config.solver_order, len(self._past) + 1, len(self.timesteps) - index)
        self._past = [*self._past, (t, x0)][-self.config.solver_order :]
        self._left = t, order, sample
        return SchedulerOutput(self._update(sample, t, following, order), x0)

    def _levels(self, t: int) -> tuple[float, float, float]:
        """alpha, sigma and log(alpha / sigma) at a timestep, in float64; a terminal SNR of 0 is a little above it, as
        in diffusers."""
        a = (float(self.alphas_cumprod[t]) or 2.0**-24) if t >= 0 else 1.0
        return a**0.5, (1 - a) ** 0.5, math.inf if a == 1 else 0.5 * math.log(a / (1 - a))

    def _update(self, x: Tensor, s: int, t: int, order: int, x0_new: Tensor | None = None) -> Tensor:
        """x from timestep s to t by the x0 remembered, and, to correct it, by that at t."""
        _, sigma_s, l_s = self._levels(s)
        alpha_t, sigma_t, l_t = self._levels(t)
        _, x0 = self._past[-1]
        if t < 0:
            return x0
        h = l_t - l_s
        phi = math.expm1(-h)
        rks = [(self._levels(u)[2] - l_s) / h for u, _ in self._past[-2 : -1 - order : -1]]
        differences = [(old - x0) / r for r, (_, old) in zip(rks, self._past[-2 : -1 - order : -1], strict=True)]
        if x0_new is not None:
            rks, differences = [*rks, 1.0], [*differences, x0_new - x0]
        rhos = _weights(rks, -h)
        return sigma_t / sigma_s * x - alpha_t * phi * (x0 + sum(r * d for r, d in zip(rhos, differences, strict=True)))


def _weights(rks: list[float], hh: float) -> list[float]:
    """rho_k of `sum_k rho_k r_k^(j-1) = b_j`, b_j the moments of exp over the step; of one alone 1/2, as its authors
    have it."""
    if len(rks) < 2:
        return [0.5] * len(rks)
    phi = math.expm1(hh)
    moment, factorial, b = phi / hh - 1, 1, []
    for j in range(1, len(rks) + 1):
        b.append(moment * factorial / phi)
        factorial *= j + 1
        moment = moment / hh - 1 / factorial
    powers = torch.tensor([[r**j for r in rks] for j in range(len(rks))], dtype=torch.float64)
    solved: list[float] = torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()
    return solved
