"""The fast sampler: any model, any linear scheduler, in several ways that compute the same thing."""

from __future__ import annotations

import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from sbldm_fast.diffusion.table import SolverTable

from ..errors import NotFinite, TooLarge, UserError
from .loop import Callback, Loop, ModeFailed, broken
from .memory import find_what_fits, out_of_memory
from .model import Cond, evaluating, read_cond
from .modes import Mode, choose, parse_mode
from .plan import Options, Plan
from .precision import float32_precision
from .request import Arguments, Batch, SampleRequest, seeds_and_noise, whole_number
from .source import Source
from .stepped import step_through
from .turn import Turn
from .variations import invert, noise_arc, noise_latents

MAX_LOOPS = 4  # batch sizes kept captured at a time


class FastSampler:
    """A model and a scheduler, turned into a function from seeds to samples.

    Before the loop: the scheduler becomes a `SolverTable` and, for a `UNet2D`, time becomes a table of the scale and
    shift of every block. In the loop: one model call and one `solver_step` a step, no transfer, no synchronisation.

    - `eager`: the loop in Python.
    - `compile` (`default`), `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`: the step through that mode
      of torch.compile; on a CPU ahead of time, with its weights packed, and kept in a cache for the next process
      (`cache_folder`).
    - `step-graph`: one CUDA graph of a step that reads its rows through a counter on the device, replayed.
    - `loop-graph`: one CUDA graph of the whole loop, `decode` included.
    - `step-graph+compile`, ...: a graph of either kind around a compiled step.
    - `auto`: on CUDA `loop-graph`, beyond 100 steps `step-graph`, or `eager` where it is faster: the first batch of a
      size is made some times more, to time both, and the faster is kept for its size; on a CPU `eager`, and `compile`
      from the first call on that is long enough to win the minute of compiling back. `reason` says why.

    Measured: benchmarks/GPU.md. A graph cannot be left inside: with `stop` or a callback `loop-graph` replays steps.

    What the caller changes afterwards is seen: before each batch the model's weights, buffers and modules and the
    scheduler's settings are compared, by content, with what the sampler was made from, and what is no longer true is
    made anew: a compiled step is compiled again. The caller's modules stay as they are, training or not. Threads may
    share a sampler: their batches take turns.

    Stopping early, sample by sample, `stop=`: `eps_norm` when the RMS of the model's output is below the threshold
    (paper 001; a noise prediction has RMS near 1 at every step, so 0.05 is hardly ever reached), `convergence` when
    that RMS changes by less than this fraction (paper 000), `x0_delta` when x0 moves by less than this, RMS. A sample
    that stopped is frozen and comes back as its x0.

    Args:
        model: a `UNet2D`, a diffusers or MONAI UNet, or any callable `(x, t) -> prediction`, x `[n, *shape]`, t the
            timestep `[1]`. A module runs in evaluation mode.
        scheduler: ours, diffusers', MONAI's or a `SolverTable`. One that no table describes is stepped as it is, with a
            warning, and counted in `stats()["fallbacks"]`.
        shape: of one sample, `(C, H, W)`, of a volume `(C, D, H, W)`.
        steps: for `set_timesteps`; a `SolverTable` brings its own.
        mode: one of the above.
        dtype: of the model's arithmetic, on a copy; norms compute in float32, the solver stays in it. None: as the
            model is.
        eta: of schedulers that take it, 0 deterministic to 1 the variance of DDPM; None: the scheduler's own default.
        decode: applied to the final latents; None: latents are returned.
        fuse: replace each GroupNorm + SiLU of a foreign model by `group_norm_silu`; `stats()["fused"]` says how many
            there were.
        stop, threshold: see above; a threshold of None is 0.05, 0.001, 0.01.
        check_every: steps between two looks at whether all samples have stopped.
        tf32: on CUDA, let float32 convolutions and matrix products round their inputs to 10 bits of mantissa, as
            PyTorch's convolutions do by default: the paper's UNet is off by 2e-4 then and 2.5 times as fast on an H200;
            float16 is off by 3e-4 and 4 times as fast.
        device: of a callable without parameters; others bring their own.

    Raises:
        ValueError: an argument that is not allowed, or a graph mode without CUDA.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,
        *,
        shape: Sequence[int],
        steps: int = 50,
        mode: str = "auto",
        dtype: torch.dtype | None = None,
        eta: float | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        fuse: bool = False,
        stop: str | None = None,
        threshold: float | None = None,
        check_every: int = 5,
        tf32: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        options = Options(tuple(shape), decode, fuse, stop, threshold, check_every, tf32)
        self._auto, self.reason = mode == "auto", "asked for"
        self._turn, self._loops, self.counts = Turn(), OrderedDict[Any, Loop](), Counter[str]()
        self.source = Source(model, scheduler, steps, eta, dtype, torch.device(device or "cpu"), options, mode)
        self._choose(1)
        self.source.note()

    @property
    def plan(self) -> Plan:
        """What a run is; a scheduler that no table describes has none, a `ValueError`."""
        return self.source.plan_from(0)

    @property
    def scheduler(self) -> Any:
        """What was given as such; it may be changed or replaced."""
        return self.source.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.source.scheduler = scheduler

    @property
    def table(self) -> SolverTable:
        """The solver's rows."""
        return self.plan.table

    @property
    def timesteps(self) -> list[float]:
        """The timestep of each step."""
        return self.source.timesteps

    @property
    def steps(self) -> int:
        """Model calls of a run."""
        return len(self.timesteps)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.source.options.shape

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.source.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's arithmetic."""
        return self.source.network.dtype

    @property
    def mode(self) -> str:
        """The mode that runs; where `auto` was asked for, the one that ran or was chosen last."""
        return str(next(reversed(self._loops.values()), self.source).mode)

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """Applied to the final latents; it may be replaced."""
        return self.source.options.decode

    @decode.setter
    def decode(self, decode: Callable[[Tensor], Tensor] | None) -> None:
        self._replan(replace(self.source.options, decode=decode), self.source.mode)

    def _replan(self, options: Options, mode: Mode) -> None:
        self._loops.clear()
        self.source.replan(options, mode)

    def __call__(
        self,
        n: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        indices: Sequence[int] | None = None,
        cond: Cond = None,
        uncond: Cond = None,
        guidance_scale: float | Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        extrapolate: bool = False,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Samples `[n, *shape]` in float32, or what `decode` makes of them.

        Args:
            n: how many; or give `noise` or `indices`.
            seed: one for all samples, or one for each.
            noise: the starting noise `[n, *shape]` of unit variance; `init_noise_sigma` is applied inside.
            indices: the samples' places in the noise of their seed; None: 0, 1, ... n - 1, and 0 under a list of
                seeds.
            cond: what the model is conditioned on, `[n, ...]`, or a mapping of such tensors that go in by name; of a
                `UNet2D` its covariates by name, a value for all samples or one for each, what is left out unknown.
            uncond: the same for the unconditional pass of guidance; None: zeros, and of covariates all unknown.
            guidance_scale: w of `m_u + w (m_c - m_u)`, a number or one per sample; None: no second pass.
            guidance_interval: the lowest and the highest timestep at which w is not 1 (Kynkäänniemi et al. 2024,
                arXiv:2404.07724); None: it never is.
            extrapolate: take, with a warning, numbers outside the range that the covariates were trained on.
            callback: called after each step with its number, its timestep and x, which is overwritten by the next step.
            batch_size: how many at a time, the last batch padded to it: one size is captured. None: all at once.

        Raises:
            ValueError: a wrong shape or count, a negative seed, or a model's output of another shape.
            FloatingPointError: NaN or infinity, with step and samples.
            MemoryError: out of memory, with the largest batch that fits.
        """
        given = Arguments(seed=seed, noise=noise, indices=indices, cond=cond, uncond=uncond, batch_size=batch_size)
        given |= {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "extrapolate": extrapolate}
        return torch.cat(list(self.stream(n, callback=callback, **given)))

    def stream(
        self, n: int | None = None, *, callback: Callback | None = None, **arguments: Unpack[Arguments]
    ) -> Iterator[Tensor]:
        """The samples of a call, batch by batch as they are made; arguments and errors as there."""
        request = SampleRequest(self.shape, self.device, n, model=self.source.network.model, **arguments)
        yield from self._stream(request, callback)

    def _stream(self, request: SampleRequest, callback: Callback | None, start: int = 0) -> Iterator[Tensor]:
        """The samples of a request, by a run that begins with step `start`."""
        request.refuse_interval_without(self.timesteps[start:])
        for batch in request.batches():
            with self.at_work(request.count):
                self.counts["samples"] += len(batch.places)
                self.counts["pads"] += request.size - len(batch.places)
                made = self._checked(batch, callback, start)[: len(batch.places)]
            yield made

    def trajectory(self, n: int, **arguments: Any) -> Tensor:
        """x after each step, `[steps, n, *shape]`, fewer if all samples stop; latents even with `decode`; arguments as
        in a call.

        Raises:
            ValueError: a `batch_size`: all samples of a trajectory are made at once; or a `callback`.
        """
        whys = {"batch_size": "a trajectory is of one batch", "callback": "a trajectory has one of its own"}
        for name, why in whys.items():
            if arguments.get(name) is not None:
                raise UserError(f"{name}: got {arguments[name]}, allowed is None: {why}")
        seen: list[Tensor] = []
        self(n, **arguments | {"callback": lambda i, t, x: seen.append(x.clone())})
        return torch.stack(seen)

    def interpolate(self, seeds: tuple[int, int], n: int, **arguments: Any) -> Tensor:
        """n samples, from that of one seed to that of another, along the arc between their noises (`noise_arc`);
        arguments as in a call.

        Raises:
            ValueError: not two seeds, n below 2, or a scheduler with noise in its steps, which would be of neither
                seed.
        """
        if len(seeds) != 2:
            raise UserError(f"seeds: got {len(seeds)}, allowed are two")
        with self.at_work():  # the scheduler as it is now
            deterministic = self.source.linear and not self.table.stochastic
        if not deterministic:
            raise UserError(
                "scheduler: got one with noise in its steps, allowed is a deterministic one, such as DDIM with eta 0"
            )
        first, last = (whole_number("seeds", seed, 0) for seed in seeds)
        return self(noise=noise_arc((first, last), whole_number("n", n, 2), self.shape, self.device), **arguments)

    def from_latents(
        self,
        z: Tensor,
        strength: float,
        *,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        callback: Callback | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Samples near `z` `[n, *shape]`: noise is added as far as the last `strength` of the steps can take away
        (img2img).

        Arguments as in a call. A solver with history starts anew, at first order, as diffusers' `set_begin_index` has
        it.

        Raises:
            ValueError: a strength that is not in (0, 1], or a run that cannot start in its middle.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength: got {strength}, allowed is above 0 up to 1")
        x, seeds = seeds_and_noise(self.shape, self.device, None, seed, z, indices)
        assert x is not None
        with self.at_work():
            start = self.source.start_for(strength)
            noise = noise_latents(self.source.plan_from(start), x, seeds)
        arguments |= {"model": self.source.network.model, "seed": seed, "indices": indices}
        request = SampleRequest(self.shape, self.device, noise=noise, **arguments)
        return torch.cat(list(self._stream(request, callback, start)))

    def invert(self, z: Tensor, *, cond: Cond = None, extrapolate: bool = False) -> Tensor:
        """The noise of unit variance from which a deterministic run would have come to `z`, both `[n, *shape]`, by
        fixed-point iteration backwards (`variations.invert`).

        Raises:
            ValueError: a solver with history, noise or clipping.
        """
        with self.at_work():
            if not self.source.linear:
                raise UserError("scheduler: got one with history or noise, allowed is a deterministic first-order one")
            x, _ = seeds_and_noise(self.shape, self.device, None, 0, z, None)
            assert x is not None
            network = self.source.network
            given = read_cond(network.model, cond, len(x), extrapolate=extrapolate)
            return invert(self.plan, x, network.condition(given))

    def stats(self) -> dict[str, int]:
        """Counts since construction.

        samples, pads, compiled, loaded, captures, timed, replays, evictions, fallbacks, stopped, steps_saved, fused;
        what is 0 is left out.
        """
        return {name: count for name, count in self.counts.items() if count}

    def _choose(self, n: int) -> None:
        """Where `auto` was asked for, choose the mode for n samples; what has been compiled stays."""
        if n and self._auto and self.source.linear and self.source.mode.compiled is None:
            name, self.reason = choose(self.device, n, self.steps)
            if (mode := parse_mode(name, self.device)) != self.source.mode:
                self._replan(self.source.options, mode)

    @contextmanager
    def at_work(self, n: int = 0) -> Iterator[None]:
        """Inside, one thread has the sampler, made anew where it has to be, and its model evaluates; `auto` chooses for
        n samples, if any."""
        with self._turn, torch.inference_mode(False):  # or buffers would be of it, and of no use outside
            self._choose(n)
            if self.source.refresh():
                self._loops.clear()
            before = self.counts["captures"], self.counts["timed"]
            with evaluating(self.source.network.model):
                yield
            # beside a graph the model's Python ran, and may have moved its counters
            if before != (self.counts["captures"], self.counts["timed"]) or self.mode != str(self.source.mode):
                self.source.note()

    def _checked(self, batch: Batch, callback: Callback | None, start: int) -> Tensor:
        """What becomes of a batch; and the two ways in which it can go wrong: memory, and numbers that are none."""
        sigma = self.source.init_noise_sigma(start)
        x = (batch.x * sigma).to(self.device)
        batch = replace(batch, x=x, seeds=batch.seeds.to(self.device), cond=self.source.network.condition(batch.cond))
        places, run = batch.places, partial(self._run, start=start)
        try:
            out = run(batch, callback)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # what the failed attempt still holds
            raise TooLarge(find_what_fits(self._loops.clear, run, self.decode, batch)) from error
        if bad := broken(out[: len(places)]):

            def name_step(i: int, t: float, x: Tensor) -> None:
                if at := broken(x[: len(places)]):
                    raise NotFinite(
                        f"model: NaN or infinity at step {i} (timestep {t:g}) in samples {[places[k] for k in at]}"
                    )

            run(batch, name_step)
            raise NotFinite(f"decode: NaN or infinity in samples {[places[k] for k in bad]}, whose latents are finite")
        return out

    def _run(self, batch: Batch, callback: Callback | None, start: int) -> Tensor:
        if not self.source.linear:
            self.counts["fallbacks"] += 1
            source = self.source
            with torch.no_grad(), float32_precision(self.device, source.options.tf32):
                x = step_through(source.network, source.scheduler, source.steps, source.eta, batch, callback)
                return x if self.decode is None else self.decode(x).clone()
        try:
            loop = self._loop(batch, start)
            out = loop.run(batch, callback)
            self.reason = loop.found or self.reason
            return out
        except ModeFailed as failure:
            if not self._auto:
                raise
            self._auto, self.reason = False, f"eager: {failure}"
            self._replan(self.source.options, Mode(None, None))
            return self._run(batch, callback, start)

    def _loop(self, batch: Batch, start: int) -> Loop:
        """The loop for batches of this size and conditioning, kept."""
        key = (start, torch.is_autocast_enabled(self.device.type), *batch.kind)
        if key not in self._loops:
            if len(self._loops) == MAX_LOOPS:
                self._loops.popitem(last=False)
                self.counts["evictions"] += 1
            loop = Loop(self.source.plan_from(start), batch, self.counts, key if self._auto else None)
            self._loops[key], self.reason = loop, self.reason + loop.remark
        self._loops.move_to_end(key)
        return self._loops[key]
