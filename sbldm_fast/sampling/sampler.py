"""The fast sampler: any model, any linear scheduler, in several ways that compute the same thing."""

from __future__ import annotations

import copy
import traceback
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.diffusion.table import NotLinear, SolverTable, prepared

from ..errors import NotFinite, TooLarge, UserError
from . import variations
from .content import addresses, behind, digest, fingerprint, survey
from .loop import Callback, Loop, ModeFailed, Turn, broken, float32_precision
from .memory import out_of_memory, what_fits
from .model import Cond, evaluating, ours, predictor, ready
from .modes import choose, parse_mode
from .noise import Parts, Request, whole
from .stepped import stepped

STOPS = {"eps_norm": 0.05, "convergence": 1e-3, "x0_delta": 0.01}  # with the threshold of each
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
    - `auto`: on CUDA `loop-graph`, beyond 100 steps `step-graph`; on a CPU `eager`, and `compile` from the first call
      on that is long enough to win the minute of compiling back. `reason` says why.

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
        shape: of one sample, `(C, H, W)`.
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
        # a pipeline, an inferer
        if not callable(model) or (hasattr(model, "scheduler") and not isinstance(model, nn.Module)):
            inside = next((f", its .{name}" for name in ("unet", "transformer", "prior") if hasattr(model, name)), "")
            raise UserError(
                f"model: got {type(model).__name__}, allowed is the network that it runs{inside}, or a function of x"
                " and t"
            )
        if stop is not None and stop not in STOPS:
            raise UserError(f"stop: got {stop!r}, allowed are {', '.join(STOPS)} and None")
        if check_every < 1:
            raise UserError(f"check_every: got {check_every}, allowed is 1 or more")
        if threshold is not None and (stop is None or not threshold > 0):
            raise UserError(
                f"threshold: got {threshold}, allowed is above 0" + " and, without stop, None" * (stop is None)
            )
        self.stop, self.check_every, self.tf32 = stop, check_every, tf32
        self.threshold = threshold if threshold is not None else STOPS[stop] if stop else 0.0
        self.shape, self.eta, self.decode, self.fuse = tuple(whole("shape", s, 1) for s in shape), eta, decode, fuse
        if not self.shape:
            raise UserError("shape: got (), allowed is that of one sample, (C, H, W)")
        self.counts, self.reason, self._captures = Counter[str](), "asked for", True
        self.scheduler, self._asked, self._start = scheduler, steps, 0
        self._mode, self._auto, self._dtype, self._device = mode, mode == "auto", dtype, torch.device(device or "cpu")
        parameter = _first(model)
        self.graph, self.compiled = parse_mode(mode, self._device if parameter is None else parameter.device)
        # in half precision the sampler has weights of its own, and the caller's need not live
        own = parameter is not None and dtype not in (None, parameter.dtype)
        self._given: Callable[[], Any] = weakref.ref(model) if own else lambda: model
        self._turn, self._loops, self._tails = Turn(), OrderedDict[Any, Loop](), OrderedDict[int, FastSampler]()
        self._read(model)
        self._made_of = self._content(model)

    def _read(self, model: Any) -> None:
        """Make what a run needs of the model and the scheduler, as they are now."""
        parameter = _first(model)
        self.device = self._device if parameter is None else parameter.device
        self.dtype = self._dtype or (torch.float32 if parameter is None else parameter.dtype)
        parse_mode(self._mode, self.device)  # a graph stays on CUDA
        if ours(model) and self.shape[:-2] != (channels := model.config.in_channels,):
            raise UserError(f"shape: got {self.shape}, allowed for this model is ({channels}, H, W)")
        self._solve()
        self.model, self.layout = ready(model, self.dtype, self.device, len(self.shape))
        self.predict = predictor(self.model)
        self._load()
        self._settings = fingerprint(self.scheduler)

    def _solve(self) -> None:
        """The scheduler's numbers: its table, or without one its timesteps."""
        scheduler, table = self.scheduler, None
        name = type(scheduler).__name__
        if isinstance(scheduler, SolverTable):
            if self.eta:
                raise UserError(f"eta: got {self.eta}, allowed is 0 with a SolverTable, which has its own")
            table = scheduler.from_step(self._start)
        else:
            try:
                table = SolverTable.from_scheduler(scheduler, self._asked, eta=self.eta, start=self._start)
            except NotLinear as why:
                warnings.warn(f"{name} is stepped as it is, without a table: {why}", stacklevel=4)
                if self.stop is not None or self._mode not in ("auto", "eager"):
                    raise UserError(
                        f"mode, stop: got {self._mode!r}, {self.stop!r}, allowed for {name} are 'eager', None"
                    ) from why
                self.timesteps: list[float] = prepared(scheduler, self._asked, self.eta).timesteps.tolist()
                self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        if table is not None:
            self.table = table
        self.linear, self._solved = table is not None, fingerprint(table)

    def _load(self) -> None:
        """Put the table's numbers on the device."""
        self._loops.clear()
        if not self.linear:
            self._loaded = self._solved
            return
        table = self.table
        if self.stop is not None and not table.rows[:, :2].isfinite().all():
            raise UserError(f"stop: got {self.stop!r}, allowed is None: this scheduler does not tell what x0 is")
        self.timesteps, self.init_noise_sigma = table.timesteps.tolist(), table.init_noise_sigma
        self.numbers = table.rows.to(self.device, torch.float32)
        self.input_scale = (
            None if bool((table.input_scale == 1).all()) else table.input_scale.to(self.device, torch.float32)
        )
        self.rows = self._rows()
        # one pool for all batch sizes: replays follow on one another, and outputs are copied out before the next
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._loaded = self._solved

    def _rows(self) -> Tensor:
        """What the model is given of time at each step."""
        times = self.table.timesteps.to(
            self.device, torch.float32 if self.table.timesteps.is_floating_point() else torch.int64
        )
        plain = torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), plain, float32_precision(self.device, self.tf32):
            return self.model.time_rows(times).to(self.dtype) if ours(self.model) else times

    def _content(self, model: Any) -> tuple[Any, ...]:
        """What the sampler holds copies, addresses or traces of, as it is now; nothing where it calls the caller's
        module itself."""
        copied = self.compiled is not None or self.model is not model
        if not (copied or self.graph or self.fuse):
            first = _first(model)
            return () if first is None else (first.device, first.dtype)
        found, tensors = survey(*behind(model))
        read = addresses([*tensors, *survey(*behind(self.decode))[1]]) if self.graph or self.fuse else []
        return found, read, digest(tensors) if copied else 0

    def _refresh(self) -> None:
        """Make anew what was made of weights, modules or settings that have been changed since."""
        if fingerprint(self.scheduler) != self._settings:
            self._settings = ""
            self._solve()  # a run of the caller's own moves a scheduler's counters: its table is what it was
            if self._loaded != self._solved:
                self._tails.clear()
                self._load()
            self._settings = fingerprint(self.scheduler)  # last: what is refused is refused again
        model = self._given()
        if model is None:  # nobody can change it
            return
        now = self._content(model)
        if now == self._made_of:
            return
        self._tails.clear()
        if len(now) == len(self._made_of) == 3 and self.graph and not self.compiled and now[:2] == self._made_of[:2]:
            # a graph goes on reading where it read when it was recorded: what is a copy is written there again
            anew = ready(model, self.dtype, self.device, len(self.shape))[0]
            with torch.no_grad():
                for mine, fresh in zip(survey([self.model])[1], survey([anew])[1], strict=True):
                    mine.copy_(fresh)
                self.rows.copy_(self._rows())
        else:
            self._read(model)
        self._made_of = self._content(model)

    @property
    def steps(self) -> int:
        """Model calls of a run."""
        return len(self.timesteps)

    @property
    def mode(self) -> str:
        """The mode that runs, also where `auto` was asked for."""
        if self._auto and self.reason == "asked for" and self.linear:  # nothing has chosen yet
            self._choose(1)
        return (
            "+".join(filter(None, (self.graph, "compile" if self.compiled == "default" else self.compiled))) or "eager"
        )

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
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Samples `[n, *shape]` in float32, or what `decode` makes of them.

        Args:
            n: how many; or give `noise` or `indices`.
            seed: one for all samples, or one for each.
            noise: the starting noise `[n, *shape]` of unit variance; `init_noise_sigma` is applied inside.
            indices: the samples' numbers in the noise of their seed; None: 0, 1, ... n - 1, and 0 under a list of
                seeds.
            cond: what the model is conditioned on, `[n, ...]`, or a mapping of such tensors that go in by name.
            uncond: the same for the unconditional pass of guidance; None: zeros.
            guidance_scale: w of `m_u + w (m_c - m_u)`, a number or one per sample; None: no second pass.
            callback: called after each step with its number, its timestep and x, which is overwritten by the next step.
            batch_size: how many at a time, the last batch padded to it: one size is captured. None: all at once.

        Raises:
            ValueError: a wrong shape or count, a negative seed, or a model's output of another shape.
            FloatingPointError: NaN or infinity, with step and samples.
            MemoryError: out of memory, with the largest batch that fits.
        """
        return torch.cat(
            list(
                self.stream(
                    n,
                    seed=seed,
                    noise=noise,
                    indices=indices,
                    cond=cond,
                    uncond=uncond,
                    guidance_scale=guidance_scale,
                    callback=callback,
                    batch_size=batch_size,
                )
            )
        )

    def stream(
        self,
        n: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        indices: Sequence[int] | None = None,
        cond: Cond = None,
        uncond: Cond = None,
        guidance_scale: float | Tensor | None = None,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Tensor]:
        """The samples of a call, batch by batch as they are made; arguments and errors as there."""
        asked = Request(
            self.shape,
            self.device,
            n=n,
            seed=seed,
            noise=noise,
            indices=indices,
            cond=cond,
            uncond=uncond,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        )
        if asked.conds and ours(self.model):
            raise UserError("cond: got a value, allowed is None: this model is unconditional")
        for numbers, parts in asked.batches(1.0):
            with self.at_work(asked.count):
                self.counts["samples"] += len(numbers)
                self.counts["pads"] += asked.size - len(numbers)
                made = self._batch(numbers, parts, callback)[: len(numbers)]
            yield made

    def trajectory(self, n: int, **arguments: Any) -> Tensor:
        """x after each step, `[steps, n, *shape]`, fewer if all samples stop; latents even with `decode`; arguments as
        in a call.

        Raises:
            ValueError: a `batch_size`: all samples of a trajectory are made at once; or a `callback`.
        """
        return variations.trajectory(self, n, arguments)

    def interpolate(self, seeds: tuple[int, int], n: int, **arguments: Any) -> Tensor:
        """n samples, from that of one seed to that of another, along the arc between their noises; arguments as in a
        call.

        `z(p) = (sin((1 - p) w) z_a + sin(p w) z_b) / sin w`, w the angle between z_a and z_b, p from 0 to 1.
        Source: Shoemake 1985, doi:10.1145/325334.325242.

        Raises:
            ValueError: not two seeds, n below 2, or a scheduler with noise in its steps, which would be of neither
                seed.
        """
        return variations.interpolate(self, seeds, n, arguments)

    def from_latents(
        self,
        z: Tensor,
        strength: float,
        *,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Samples near `z` `[n, *shape]`: noise is added as far as the last `strength` of the steps can take away
        (img2img).

        Arguments as in a call. A solver with history starts anew, at first order, as diffusers' `set_begin_index` has
        it.

        Raises:
            ValueError: a strength that is not in (0, 1], or a run that cannot start in its middle.
        """
        return variations.from_latents(self, z, strength, seed, indices, arguments)

    def invert(self, z: Tensor, *, cond: Cond = None) -> Tensor:
        """The noise of unit variance from which a deterministic run would have come to `z`, both `[n, *shape]`.

        Step i backwards solves `x' = a_0 x + b_0 model(x, t_i)` for x by fixed-point iteration from x = x'. Source:
        Song et al. 2021, arXiv:2010.02502, section 4.3; Pan et al. 2023, arXiv:2309.04907 for the iteration.

        Raises:
            ValueError: a solver with history, noise or clipping.
        """
        return variations.invert(self, z, cond)

    def stats(self) -> dict[str, int]:
        """Counts since construction.

        samples, pads, compiled, loaded, captures, replays, evictions, fallbacks, stopped, steps_saved, fused; what is 0
        is left out.
        """
        return {name: count for name, count in self.counts.items() if count}

    def _choose(self, n: int) -> None:
        if self.compiled is None and self._captures:
            mode, self.reason = choose(self.device, n, self.steps)
            self.graph, self.compiled = parse_mode(mode, self.device)
            if self.compiled is not None:
                self._loops.clear()

    @contextmanager
    def at_work(self, n: int = 1) -> Iterator[None]:
        """Inside, one thread has the sampler, made anew where it has to be, and its model evaluates; `auto` chooses for
        n samples."""
        with self._turn, torch.inference_mode(False):  # or buffers would be of it, and of no use outside
            if self._auto and self.linear:
                self._choose(n)
            self._refresh()
            captures = self.counts["captures"]
            with evaluating(self.model):
                yield
            if captures != self.counts["captures"]:  # which ran the model's Python, and may have moved its counters
                self._made_of = self._content(self._given())

    def tail(self, strength: float) -> FastSampler:
        """The sampler of the last `strength` of the steps, kept; it shares the model and the turn."""
        with self.at_work():
            asked = self.steps if isinstance(self.scheduler, SolverTable) else self._asked
            start = (asked - max(int(asked * strength), 1)) * getattr(self.scheduler, "order", 1)
            if start not in self._tails:
                tail = copy.copy(self)
                tail._start, tail._loops, tail._tails = start, OrderedDict(), OrderedDict()
                if tail.linear:
                    tail._solve()
                if not tail.linear or not (tail.table.alpha[0] + tail.table.sigma[0]).isfinite():
                    name = type(self.scheduler).__name__
                    raise UserError(
                        f"scheduler: got {name}, allowed to start from latents is one with add_noise and a table"
                    )
                tail._load()
                if len(self._tails) == MAX_LOOPS:
                    self._tails.popitem(last=False)
                self._tails[start] = tail
            self._tails[start].decode = self.decode
            return self._tails[start]

    def cast(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """A conditioning where the model is, numbers that are not whole in its dtype."""
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in cond.items()}

    def _batch(self, numbers: range, parts: Parts, callback: Callback | None) -> Tensor:
        """One batch, the samples `numbers` of the call and padding; and the two ways in which it can go wrong."""
        x, seeds, cond, guidance = parts
        parts = (x * self.init_noise_sigma).to(self.device), seeds.to(self.device), self.cast(cond), guidance
        try:
            out = self._made(parts, len(numbers), callback)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # what the failed attempt still holds
            raise TooLarge(what_fits(self._loops.clear, self._made, self.decode, parts)) from error
        if bad := broken(out[: len(numbers)]):

            def name(i: int, t: float, x: Tensor) -> None:
                if at := broken(x[: len(numbers)]):
                    raise NotFinite(
                        f"model: NaN or infinity at step {i} (timestep {t:g}) in samples {[numbers[k] for k in at]}"
                    )

            self._made(parts, len(numbers), name)
            raise NotFinite(f"decode: NaN or infinity in samples {[numbers[k] for k in bad]}, whose latents are finite")
        return out

    def _made(self, parts: Parts, real: int, callback: Callback | None) -> Tensor:
        x, seeds, cond, guidance = parts
        if not self.linear:
            self.counts["fallbacks"] += 1
            with torch.no_grad(), float32_precision(self.device, self.tf32):
                x = stepped(self._predict_at, self.scheduler, self._asked, self.eta, parts, callback)
                return x if self.decode is None else self.decode(x).clone()
        autocast = torch.is_autocast_enabled(self.device.type)
        key = (len(x), guidance is not None, autocast, *((name, tuple(v.shape), v.dtype) for name, v in cond.items()))
        if key not in self._loops and len(self._loops) == MAX_LOOPS:
            self._loops.popitem(last=False)
            self.counts["evictions"] += 1
        try:
            if key not in self._loops:
                self._loops[key] = Loop(self, len(x), cond, guidance is not None)
            self._loops.move_to_end(key)
            return self._loops[key].run(x, seeds, cond, guidance, real, callback)
        except ModeFailed as failure:
            if not self._auto:
                raise
            self.graph, self.compiled, self.reason, self._captures = None, None, f"eager: {failure}", False
            self._loops.clear()
            return self._made(parts, real, callback)

    def _predict_at(self, h: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        row = self.model.time_rows(t).to(self.dtype) if ours(self.model) else t
        return self.predict(h.to(self.dtype), row, cond).float()


def _first(model: Any) -> Tensor | None:
    return next(model.parameters(), None) if isinstance(model, nn.Module) else None
