"""A solver as data: the numbers of every step.

    x0 = clip(c_x x + c_m m)
    x' = a_0 x + b_0 m + d x0 + s z + sum_k (a_k x_-k + b_k m_-k)

`probe` reads them off a scheduler before the loop starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Self

import torch
from torch import Tensor

from sbldm_fast.files import read_json, write_json

from ..errors import UserError


class NotLinear(UserError):
    """A scheduler that no table describes; the message says why."""


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A run of a solver: what each step multiplies, adds and asks the model for.

    timesteps: `[S]`, int64 or float64, what the model is given.
    rows: `[S, 6 + 2 K]` float64, `[c_x, c_m, d, s, a_0, b_0, ..., a_K, b_K]`; c is NaN where x0 is not known.
    input_scale: `[S]` float64, the factor of `scale_model_input`.
    alpha, sigma: `[S]` float64, x = alpha x0 + sigma noise at the start of a step; NaN where not known.
    init_noise_sigma: standard deviation of the first x.
    clip_range: x0 is clipped to it; None: not at all.
    """

    timesteps: Tensor
    rows: Tensor
    input_scale: Tensor
    alpha: Tensor
    sigma: Tensor
    init_noise_sigma: float = 1.0
    clip_range: float | None = None

    @property
    def history(self) -> int:
        """K, how many steps back the solver looks."""
        return (self.rows.shape[1] - 6) // 2

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.rows[:, 3] != 0).any())

    @classmethod
    def from_scheduler(cls, scheduler: Any, steps: int, *, eta: float | None = None, start: int = 0) -> SolverTable:
        """The table of a scheduler of ours, diffusers, MONAI or their protocol; the scheduler itself is left as it is.

        Args:
            steps: for `set_timesteps`; a solver of second order may make more model calls than that.
            eta: of schedulers whose `step` takes it, 0 deterministic to 1 the variance of DDPM; None: the scheduler's
                own default.
            start: the timestep to begin with, counted from the first: the run of an img2img.

        Raises:
            NotLinear: no row describes a step (thresholding, a learned variance); a ValueError.
            ValueError: not a scheduler, or steps or eta that it does not take.
        """
        from .probe import read_table  # which builds tables

        return read_table(scheduler, steps, eta, start)

    def from_step(self, start: int) -> SolverTable:
        """The rest of the run.

        Raises:
            ValueError: the solver looks back on steps that a run from `start` does not have.
        """
        if not 0 <= start < len(self.timesteps):
            raise UserError(f"start: got {start}, allowed is 0 to {len(self.timesteps) - 1}")
        if self.history and start:
            raise UserError(
                f"table: got a history of {self.history} steps, allowed to start inside is none; give its scheduler"
            )
        cut = {k: getattr(self, k)[start:] for k in ("timesteps", "rows", "input_scale", "alpha", "sigma")}
        return replace(self, **cut)

    def step(self, i: int, x: list[Tensor], m: list[Tensor], z: Tensor | float = 0.0) -> Tensor:
        """x after step i from all x and m so far, newest last, in their dtype: the table in one expression, for
        proofs."""
        c_x, c_m, d, s, *pairs = self.rows[i].tolist()
        out: Tensor = torch.zeros_like(x[-1]) + s * z
        if d:
            x0 = c_x * x[-1] + c_m * m[-1]
            out = out + d * (x0 if self.clip_range is None else x0.clamp(-self.clip_range, self.clip_range))
        for k in range(min(self.history + 1, len(x))):
            out = out + pairs[2 * k] * x[-1 - k] + pairs[2 * k + 1] * m[-1 - k]
        return out

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON has it; NaN is null."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": 1} | {k: _to_json(v) if isinstance(v, Tensor) else v for k, v in values.items()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The table that `save` wrote.

        Raises:
            ValueError: the file is missing or is not such a table.
        """
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "table") -> Self:
        """The table of `to_dict`; errors as `load`, naming `source`."""
        try:
            timesteps = torch.tensor(values["timesteps"])
            tensors = {k: _from_json(values[k]) for k in ("rows", "input_scale", "alpha", "sigma")}
            table = cls(
                timesteps.double() if timesteps.is_floating_point() else timesteps,
                **tensors,
                init_noise_sigma=float(values["init_noise_sigma"]),
                clip_range=None if values["clip_range"] is None else float(values["clip_range"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as wrong:
            raise UserError(f"{source}: not a solver table ({type(wrong).__name__}: {short(str(wrong))})") from None
        if values.get("format") != 1 or table.timesteps.dim() != 1 or not 0 < table.init_noise_sigma < math.inf:
            raise UserError(
                f"{source}: format, timesteps, init_noise_sigma: allowed are 1, a list and a number above 0"
            )
        if timesteps.dtype == torch.bool or not ((table.timesteps >= 0) & (table.timesteps < 2**24)).all():
            raise UserError(
                f"{source}: timesteps: got one that no model is asked for, allowed are numbers from 0 to 2^24"
            )
        if table.clip_range is not None and not 0 < table.clip_range < math.inf:
            raise UserError(f"{source}: clip_range: got {table.clip_range}, allowed is null or a number above 0")
        S, width = table.rows.shape if table.rows.dim() == 2 else (0, 0)
        if (
            S < 1
            or width < 6
            or width % 2
            or any(len(v) != S for v in (table.timesteps, table.input_scale, table.alpha, table.sigma))
        ):
            raise UserError(
                f"{source}: rows: got {list(table.rows.shape)}, allowed are [steps, 6 + 2 K] and as many of the others"
            )
        if not table.rows[:, 2:].isfinite().all() or not table.input_scale.isfinite().all():
            raise UserError(f"{source}: rows, input_scale: got a number that is not finite")
        if any(v.isinf().any() for v in (table.rows, table.alpha, table.sigma)):
            raise UserError(
                f"{source}: rows, alpha, sigma: got infinity, allowed are numbers, and null where one is not known"
            )
        return table


def _to_json(v: Tensor) -> Any:
    return [_to_json(row) for row in v] if v.dim() > 1 else [None if n != n else n for n in v.tolist()]


def _from_json(numbers: Any) -> Tensor:
    rows = [
        [torch.nan if n is None else n for n in row] if isinstance(row, list) else torch.nan if row is None else row
        for row in numbers
    ]
    return torch.tensor(rows, dtype=torch.float64)
