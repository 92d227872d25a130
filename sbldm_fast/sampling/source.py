"""What a sampler is made of: the caller's model and scheduler, and what was made of them, kept true."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sbldm_fast.diffusion import NotLinear, SolverTable
from sbldm_fast.diffusion.probe import copy_with_timesteps

from ..errors import UserError
from .content import addresses, digest, fingerprint, parts_of, survey
from .model import ours
from .modes import Mode, parse_mode
from .plan import Network, Options, Plan, first_parameter, time_rows

MAX_PLANS = 4  # runs from their first step, and from later ones


class Source:
    """A model and a scheduler, and the plans of the runs that they make.

    The caller may change both: `refresh` compares them, by content, with what the plans were made from.

    Args:
        steps, eta: of `set_timesteps` and of the scheduler's steps.
        dtype: of the model's arithmetic, on a copy; None: as the model is.
        device: of a callable without parameters.
        mode: its name.

    Attributes:
        network: the model, ready to be called.
        linear: whether a table describes the scheduler; if not, it is stepped as it is.
        timesteps: of a run from its first step on.

    Raises:
        ValueError: as `FastSampler`.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        steps: int,
        eta: float | None,
        dtype: torch.dtype | None,
        device: torch.device,
        options: Options,
        mode: str,
    ) -> None:
        _check_network(model)
        self.scheduler, self.steps, self.eta, self.options = scheduler, steps, eta, options
        self._dtype, self._device, self._asked_mode = dtype, device, mode
        parameter = first_parameter(model)
        # in half precision the sampler has weights of its own, and the caller's need not live
        own = parameter is not None and dtype not in (None, parameter.dtype)
        self._caller: Callable[[], Any] = weakref.ref(model) if own else lambda: model
        self._settings = ""
        self._plans = OrderedDict[int, Plan]()  # by the step that they start with
        self.mode = parse_mode(mode, device if parameter is None else parameter.device)
        self._prepare(model)
        self.note()

    def replan(self, options: Options, mode: Mode) -> None:
        """Run with other options, or in another mode, from now on."""
        self.options, self.mode = options, mode
        for start, plan in self._plans.items():
            self._plans[start] = replace(plan, options=options, mode=mode)

    def plan_from(self, start: int) -> Plan:
        """The plan of a run that begins with step `start`, kept.

        Raises:
            ValueError: the scheduler has no table, or cannot start there.
        """
        if start not in self._plans:
            name = type(self.scheduler).__name__
            if not self.linear and not start:
                raise UserError(f"scheduler: got {name}, allowed is one that a SolverTable describes")
            try:
                table = self._table_from(start) if self.linear else None
            except NotLinear:
                table = None
            if table is None or not (table.alpha[0] + table.sigma[0]).isfinite():
                raise UserError(
                    f"scheduler: got {name}, allowed to start from latents is one with add_noise and a table"
                )
            if len(self._plans) > MAX_PLANS:
                self._plans.pop(next(kept for kept in self._plans if kept))
            self._plans[start] = Plan.of(self.network, table, self.options, self.mode)
        return self._plans[start]

    def start_for(self, strength: float) -> int:
        """The step with which the last `strength` of the steps begin."""
        steps = len(self.timesteps) if isinstance(self.scheduler, SolverTable) else self.steps
        return (steps - max(int(steps * strength), 1)) * getattr(self.scheduler, "order", 1)

    def init_noise_sigma(self, start: int) -> float:
        """What noise of unit variance is multiplied with, to start with step `start`."""
        if self.linear:
            return self.plan_from(start).table.init_noise_sigma
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def refresh(self) -> bool:
        """Make anew what was made of weights, modules or settings that have been changed since; whether a loop that was
        made of the plans is no longer of use."""
        stale = False
        if fingerprint(self.scheduler) != self._settings:
            self._settings = ""
            stale = self._solve()  # a run of the caller's own moves a scheduler's counters: its table is what it was
            self._settings = fingerprint(self.scheduler)  # last: what is refused is refused again
        model = self._caller()
        if model is None:  # nobody can change it
            return stale
        now, before = self._content(model), self._made_of
        if now == before:
            return stale
        if len(now) == len(before) == 3 and now[:2] == before[:2] and self.mode.graph and not self.mode.compiled:
            self._rewrite(model)
        else:
            self._prepare(model)
            stale = True
        self.note()
        return stale

    def note(self) -> None:
        """Remember what the plans are made from as it is now."""
        self._made_of = self._content(self._caller())

    def _prepare(self, model: Any) -> None:
        parameter = first_parameter(model)
        parse_mode(self._asked_mode, self._device if parameter is None else parameter.device)  # a graph stays on CUDA
        self.network = Network.of(model, self.options.shape, self._dtype, self._device)
        self._solved = ""
        self._solve()
        self._settings = fingerprint(self.scheduler)

    def _solve(self) -> bool:
        """Read the table off the scheduler and plan a run; False where the table is the one that was there."""
        table = None
        try:
            table = self._table_from(0)
            self.timesteps: list[float] = table.timesteps.tolist()
            _check_distilled(self.network.model, table)
        except NotLinear as why:
            name = type(self.scheduler).__name__
            warnings.warn(f"{name} is stepped as it is, without a table: {why}", stacklevel=5)
            if self.options.stop is not None or self._asked_mode not in ("auto", "eager"):
                got = f"{self._asked_mode!r}, {self.options.stop!r}"
                raise UserError(f"mode, stop: got {got}, allowed for {name} are 'eager', None") from why
            self.timesteps = copy_with_timesteps(self.scheduler, self.steps, self.eta).timesteps.tolist()
        self.linear = table is not None
        if self._solved == (solved := fingerprint(table)):
            return False
        self._plans.clear()
        if table is not None:
            self._plans[0] = Plan.of(self.network, table, self.options, self.mode)
        self._solved = solved  # last: a table that is refused is refused again
        return True

    def _table_from(self, start: int) -> SolverTable:
        """The solver's table from step `start` on, where a solver with history begins anew."""
        if not isinstance(self.scheduler, SolverTable):
            return SolverTable.from_scheduler(self.scheduler, self.steps, eta=self.eta, start=start)
        if self.eta:
            raise UserError(f"eta: got {self.eta}, allowed is 0 with a SolverTable, which has its own")
        return self.scheduler.from_step(start)

    def _content(self, model: Any) -> tuple[Any, ...]:
        """What copies, addresses or traces are held of, as it is now; nothing where the caller's module is called."""
        graph, fuse = self.mode.graph, self.options.fuse
        copied = self.mode.compiled is not None or self.network.model is not model
        if not (copied or graph or fuse):
            parameter = first_parameter(model)
            return () if parameter is None else (parameter.device, parameter.dtype)
        found, tensors = survey(*parts_of(model))
        read = addresses([*tensors, *survey(*parts_of(self.options.decode))[1]]) if graph or fuse else []
        return found, read, digest(tensors) if copied else 0

    def _rewrite(self, model: Any) -> None:
        """Write copies of the model again: a graph goes on reading where it read when it was recorded."""
        anew = Network.of(model, self.options.shape, self._dtype, self._device)
        with torch.no_grad():
            for mine, fresh in zip(survey([self.network.model])[1], survey([anew.model])[1], strict=True):
                mine.copy_(fresh)
            for plan in self._plans.values():
                plan.time_rows.copy_(time_rows(self.network, plan.table, self.options.tf32))


def _check_distilled(model: Any, table: SolverTable) -> None:
    """Refuse, as `UserError`, a run that a distilled network does not know."""
    steps = getattr(model.config, "distilled_steps", 0) if ours(model) else 0
    if not steps:
        return
    times = table.timesteps.tolist()
    if len(times) != steps:
        raise UserError(
            f"steps: got {len(times)} model calls, allowed for this network is {steps}, which it was distilled for"
        )
    T = times[0] + 1
    known = [round(T * (1 - i / steps)) - 1 for i in range(steps)]
    if table.history or table.stochastic or any(abs(t - k) > 1 for t, k in zip(times, known, strict=True)):
        raise UserError(
            f"scheduler: got a solver with the timesteps {times}, allowed for this network is DDIM without noise on"
            " trailing timesteps, which it was distilled for"
        )


def _check_network(model: Any) -> None:
    """Refuse a pipeline or an inferer, and what cannot be called."""
    if callable(model) and (not hasattr(model, "scheduler") or isinstance(model, nn.Module)):
        return
    inside = next((f", its .{name}" for name in ("unet", "transformer", "prior") if hasattr(model, name)), "")
    raise UserError(
        f"model: got {type(model).__name__}, allowed is the network that it runs{inside}, or a function of x and t"
    )
