"""What a run is, on its device: the model made ready, the solver's rows and those of time. Only `faster` changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.diffusion.table import SolverTable
from sbldm_fast.models.config import check_divides

from ..errors import UserError
from .model import Predict, TensorDict, ours, predictor, prepare_model
from .modes import Mode
from .precision import float32_precision
from .request import whole_number

STOPS = {"eps_norm": 0.05, "convergence": 1e-3, "x0_delta": 0.01}  # with the threshold of each


@dataclass(frozen=True, eq=False)
class Options:
    """How samples are made, as the arguments of `FastSampler` say it.

    Raises:
        ValueError: an argument that is not allowed.
    """

    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor] | None = None
    fuse: bool = False
    stop: str | None = None
    threshold: float | None = None
    check_every: int = 5
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.stop is not None and self.stop not in STOPS:
            raise UserError(f"stop: got {self.stop!r}, allowed are {', '.join(STOPS)} and None")
        if self.check_every < 1:
            raise UserError(f"check_every: got {self.check_every}, allowed is 1 or more")
        if self.threshold is not None and (self.stop is None or not self.threshold > 0):
            allowed = "above 0" + " and, without stop, None" * (self.stop is None)
            raise UserError(f"threshold: got {self.threshold}, allowed is {allowed}")
        object.__setattr__(self, "shape", tuple(whole_number("shape", s, 1) for s in self.shape))
        if not self.shape:
            raise UserError("shape: got (), allowed is that of one sample, (C, H, W) or (C, D, H, W)")
        if self.stop is not None and self.threshold is None:
            object.__setattr__(self, "threshold", STOPS[self.stop])


@dataclass(frozen=True, eq=False)
class Network:
    """A model as a loop calls it: in evaluation mode, in its dtype, on its device.

    Attributes:
        model: the caller's, or a copy where something had to be changed.
        predict: `(x, time_row, cond) -> prediction`.
        layout: how x should lie.
    """

    model: Any
    predict: Predict
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format

    @classmethod
    def of(cls, model: Any, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> Network:
        """`model` for samples of `shape`; `device` is that of a callable without parameters.

        Raises:
            ValueError: the model takes other shapes.
        """
        parameter = first_parameter(model)
        device = device if parameter is None else parameter.device
        dtype = dtype or (torch.float32 if parameter is None else parameter.dtype)
        if ours(model):
            if tuple(shape[:-2]) != (channels := model.config.in_channels,):
                raise UserError(f"shape: got {shape}, allowed for this model is ({channels}, H, W)")
            check_divides("shape: its size", (shape[-2], shape[-1]), model.config.stride)
        model, layout = prepare_model(model, dtype, device, len(shape))
        return cls(model, predictor(model), device, dtype, layout)

    def time_rows(self, timesteps: Tensor) -> Tensor:
        """What the model is given of time, a row for each of `timesteps` `[steps]`: `[steps, R]` of a `UNet2D`, which
        holds the scale and shift of every block, or the timesteps themselves."""
        return self.model.time_rows(timesteps).to(self.dtype) if ours(self.model) else timesteps

    def condition(self, cond: TensorDict) -> TensorDict:
        """A conditioning where the model is, numbers that are not whole in its dtype; of a `UNet2D` what its covariates
        become before the first step."""
        if ours(self.model):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                cond = self.model.condition({k: v.to(self.device) for k, v in cond.items()}) if cond else {}
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in cond.items()}


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a loop needs to know.

    Attributes:
        network: the model.
        table: the solver's rows in float64.
        options: what the caller asked for.
        mode: how the loop is run.
        solver_rows: `[steps, 6 + 2 K]` float32, the table's rows on the device.
        time_rows: `[steps, R]` or `[steps]`, what the model is given of time at each step.
        input_scale: `[steps]` float32, what x is multiplied with for the model; None: 1.
        pool: the memory of the graphs of all batch sizes: replays follow on one another, and outputs are copied out
            before the next. Those that `auto` times have each their own, which can be given back.
        faster: by kind of batch, the mode that `auto` found to be the faster, and in words what it found.
    """

    network: Network
    table: SolverTable
    options: Options
    mode: Mode
    solver_rows: Tensor
    time_rows: Tensor
    input_scale: Tensor | None
    pool: Any
    faster: dict[Any, tuple[Mode, str]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, network: Network, table: SolverTable, options: Options, mode: Mode) -> Plan:
        """The plan of a run through `table`.

        Raises:
            ValueError: `stop`, and the table does not tell what x0 is.
        """
        if options.stop is not None and not table.rows[:, :2].isfinite().all():
            raise UserError(f"stop: got {options.stop!r}, allowed is None: this scheduler does not tell what x0 is")
        device = network.device
        scale = table.input_scale
        return cls(
            network,
            table,
            options,
            mode,
            solver_rows=table.rows.to(device, torch.float32),
            time_rows=time_rows(network, table, options.tf32),
            input_scale=None if bool((scale == 1).all()) else scale.to(device, torch.float32),
            pool=torch.cuda.graph_pool_handle() if device.type == "cuda" else None,
        )

    @property
    def timesteps(self) -> list[float]:
        """The timestep of each step."""
        return self.table.timesteps.tolist()


def time_rows(network: Network, table: SolverTable, tf32: bool) -> Tensor:
    """What the model is given of time at each step of `table`, on its device."""
    kind = torch.float32 if table.timesteps.is_floating_point() else torch.int64
    times = table.timesteps.to(network.device, kind)
    plain = torch.autocast(network.device.type, enabled=False)
    with torch.no_grad(), plain, float32_precision(network.device, tf32):
        return network.time_rows(times)


def first_parameter(model: Any) -> Tensor | None:
    """A parameter of a module, by which its device and dtype are known; None of anything else."""
    return next(model.parameters(), None) if isinstance(model, nn.Module) else None
