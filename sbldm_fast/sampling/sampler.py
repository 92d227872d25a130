"""The fast sampler: any model, any linear scheduler, in several ways that compute the same thing."""

from __future__ import annotations

import copy
import inspect
import math
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.diffusion.table import NotLinear, SolverTable, prepared, scaled_input, scheduler_step
from sbldm_fast.models import UNet2D
from sbldm_fast.models.layers import added_by_norms

from .loop import Callback, CaptureFailed, Loop, float32_precision
from .model import Cond, half, merged_biases, named, phase_upsampling, predictor
from .modes import choose, parse_mode
from .noise import Parts, Request, draw, numbered

STOPS = {"eps_norm": 0.05, "convergence": 1e-3, "x0_delta": 0.01}  # with the threshold of each
MAX_LOOPS = 4  # batch sizes kept captured at a time
INVERSIONS = 3  # fixed-point iterations of a step backwards; one is the usual DDIM inversion


class FastSampler:
    """A model and a scheduler, turned into a function from seeds to samples.

    Before the loop: the scheduler becomes a `SolverTable` and, for a `UNet2D`, time becomes a table of the scale and shift of every
    block. In the loop: one model call and one `solver_step` a step, no transfer, no synchronisation.

    - `eager`: the loop in Python.
    - `compile` (`default`), `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`: the step through that mode of
      torch.compile; on a CPU ahead of time, with its weights packed, and kept in a cache for the next process (`cache_folder`).
    - `step-graph`: one CUDA graph of a step that reads its rows through a counter on the device, replayed.
    - `loop-graph`: one CUDA graph of the whole loop, `decode` included.
    - `step-graph+compile`, ...: a graph of either kind around a compiled step.
    - `auto`: on CUDA `loop-graph`, beyond 100 steps `step-graph`; on a CPU `eager`, and `compile` from the first call on that is
      long enough to win the minute of compiling back. `reason` says why.

    Measured: benchmarks/GPU.md. A graph cannot be left inside: with `stop` or a callback `loop-graph` replays steps.

    Stopping early, sample by sample, `stop=`: `eps_norm` when the RMS of the model's output is below the threshold (paper 001; a
    noise prediction has RMS near 1 at every step, so 0.05 is hardly ever reached), `convergence` when that RMS changes by less than
    this fraction (paper 000), `x0_delta` when x0 moves by less than this, RMS. A sample that stopped is frozen and comes back as its x0.

    Args:
        model: a `UNet2D`, a diffusers or MONAI UNet, or any callable `(x, t) -> prediction`. A module is put in evaluation mode;
            after moving or retraining it, build a new sampler.
        scheduler: ours, diffusers', MONAI's or a `SolverTable`. One that no table describes is stepped as it is, with a warning, and
            counted in `stats()["fallbacks"]`; its noise is each sample's own only if its `step` takes `variance_noise`.
        shape: of one sample, `(C, H, W)`.
        steps: for `set_timesteps`; a `SolverTable` brings its own.
        mode: one of the above.
        dtype: of the model's arithmetic, on a copy; norms compute in float32, the solver stays in it. None: as the model is.
        eta: of schedulers that take it, 0 deterministic to 1 the variance of DDPM.
        decode: applied to the final latents; None: latents are returned.
        fuse: replace each GroupNorm + SiLU of a foreign model by `group_norm_silu`; `stats()["fused"]` says how many there were.
        stop, threshold: see above; a threshold of None is 0.05, 0.001, 0.01.
        check_every: steps between two looks at whether all samples have stopped.
        tf32: on CUDA, let float32 convolutions and matrix products round their inputs to 10 bits of mantissa, as PyTorch's convolutions do
            by default: the paper's UNet is off by 2e-4 then and 2.5 times as fast on an H200; float16 is off by 3e-4 and 4 times as fast.
        device: of a callable without parameters; others bring their own.

    Raises:
        ValueError: an argument that is not allowed, or a graph mode without CUDA.
    """

    def __init__(
        self, model: Callable[..., Any], scheduler: Any, *, shape: Sequence[int], steps: int = 50, mode: str = "auto",
        dtype: torch.dtype | None = None, eta: float = 0.0, decode: Callable[[Tensor], Tensor] | None = None, fuse: bool = False,
        stop: str | None = None, threshold: float | None = None, check_every: int = 5, tf32: bool = False,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = parameter.device if parameter is not None else torch.device(device or "cpu")
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        self.graph, self.compiled = parse_mode(mode, self.device)
        self._auto, self._captures, self.reason = mode == "auto", True, "asked for"
        if stop is not None and stop not in STOPS:
            raise ValueError(f"stop: got {stop!r}, allowed are {', '.join(STOPS)} and None")
        if check_every < 1:
            raise ValueError(f"check_every: got {check_every}, allowed is 1 or more")
        self.stop, self.check_every, self.tf32 = stop, check_every, tf32
        self.threshold = threshold if threshold is not None else STOPS[stop] if stop else 0.0
        self.shape, self.eta, self.decode, self.fuse, self.counts = tuple(shape), eta, decode, fuse, Counter[str]()
        self._scheduler, self._asked = scheduler, steps
        self.table: SolverTable
        self._linear = True
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold: got {threshold}, allowed is above 0")
        if isinstance(model, UNet2D) and (len(self.shape) != 3 or self.shape[0] != model.config.in_channels):
            raise ValueError(f"shape: got {self.shape}, allowed for this model is ({model.config.in_channels}, H, W)")
        if isinstance(scheduler, SolverTable):
            if eta:
                raise ValueError(f"eta: got {eta}, allowed is 0 with a SolverTable, which has its own")
            self.table = scheduler
        else:
            try:
                self.table = SolverTable.from_scheduler(scheduler, steps, eta=eta)
            except NotLinear as why:
                warnings.warn(f"{type(scheduler).__name__} is stepped as it is, without a table: {why}", stacklevel=2)
                self._linear = False
                if stop is not None or mode not in ("auto", "eager"):
                    raise ValueError(
                        f"mode, stop: got {mode!r}, {stop!r}, allowed for {type(scheduler).__name__} are 'eager', None"
                    ) from why
        if isinstance(model, UNet2D):
            model = merged_biases(phase_upsampling(model)) if added_by_norms(self.device) else phase_upsampling(model)
        self.layout = torch.preserve_format
        if isinstance(model, nn.Module) and parameter is not None and self.dtype != parameter.dtype:
            model, self.layout = half(model, self.dtype, len(self.shape))
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.predict = predictor(self.model)
        self._tails: OrderedDict[int, FastSampler] = OrderedDict()
        if self._linear:
            self._load()
        else:
            self.timesteps: list[float] = prepared(scheduler, steps, eta).timesteps.tolist()
            self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))

    def _load(self) -> None:
        """Put the table's numbers on the device."""
        table = self.table
        if self.stop is not None and not table.rows[:, :2].isfinite().all():
            raise ValueError(f"stop: got {self.stop!r}, allowed is None: this scheduler does not tell what x0 is")
        self.timesteps, self.init_noise_sigma = table.timesteps.tolist(), table.init_noise_sigma
        self.numbers = table.rows.to(self.device, torch.float32)
        scale = table.input_scale.to(self.device, torch.float32)
        self.input_scale = None if bool((scale == 1).all()) else scale
        times = table.timesteps.to(self.device)
        times = times.float() if times.is_floating_point() else times
        with torch.no_grad(), float32_precision(self.device, self.tf32):
            self.rows = self.model.time_rows(times).to(self.dtype) if isinstance(self.model, UNet2D) else times
        self._loops: OrderedDict[Any, Loop] = OrderedDict()
        # one pool for all batch sizes: replays follow on one another, and outputs are copied out before the next
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @property
    def steps(self) -> int:
        """Model calls of a run."""
        return len(self.timesteps)

    @property
    def mode(self) -> str:
        """The mode that runs, also where `auto` was asked for."""
        if self._auto and self.compiled is None and self._linear:
            self._choose(1)
        return "+".join(filter(None, (self.graph, "compile" if self.compiled == "default" else self.compiled))) or "eager"

    def __call__(
        self, n: int | None = None, *, seed: int | Sequence[int] = 0, noise: Tensor | None = None, indices: Sequence[int] | None = None,
        cond: Cond = None, uncond: Cond = None, guidance_scale: float | Tensor | None = None, callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples `[n, *shape]` in float32, or what `decode` makes of them.

        Args:
            n: how many; or give `noise` or `indices`.
            seed: one for all samples, or one for each.
            noise: the starting noise `[n, *shape]` of unit variance; `init_noise_sigma` is applied inside.
            indices: the samples' numbers in the noise of their seed; None: 0, 1, ... n - 1, and 0 under a list of seeds.
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
        return torch.cat(list(self.stream(
            n, seed=seed, noise=noise, indices=indices, cond=cond, uncond=uncond, guidance_scale=guidance_scale, callback=callback,
            batch_size=batch_size,
        )))  # fmt: skip

    def stream(
        self, n: int | None = None, *, seed: int | Sequence[int] = 0, noise: Tensor | None = None, indices: Sequence[int] | None = None,
        cond: Cond = None, uncond: Cond = None, guidance_scale: float | Tensor | None = None, callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The samples of a call, batch by batch as they are made; arguments and errors as there."""
        asked = Request(self.shape, self.device, n=n, seed=seed, noise=noise, indices=indices, cond=cond, uncond=uncond,
                        guidance_scale=guidance_scale, batch_size=batch_size)  # fmt: skip
        if asked.conds and isinstance(self.model, UNet2D):
            raise ValueError("cond: got a value, allowed is None: this model is unconditional")
        if self._auto and self._linear:
            self._choose(asked.count)
        for numbers, parts in asked.batches(self.init_noise_sigma):
            self.counts["samples"] += len(numbers)
            self.counts["pads"] += asked.size - len(numbers)
            yield self._batch(numbers, parts, callback)[: len(numbers)]

    def trajectory(self, n: int, **arguments: Any) -> Tensor:
        """x after each step, `[steps, n, *shape]`, fewer if all samples stop; latents even with `decode`; arguments as in a call.

        Raises:
            ValueError: a `batch_size`: all samples of a trajectory are made at once.
        """
        if arguments.get("batch_size") is not None:
            raise ValueError(f"batch_size: got {arguments['batch_size']}, allowed is None: a trajectory is of one batch")
        seen: list[Tensor] = []
        self(n, **arguments, callback=lambda i, t, x: seen.append(x.clone()))
        return torch.stack(seen)

    def interpolate(self, seeds: tuple[int, int], n: int, **arguments: Any) -> Tensor:
        """n samples, from that of one seed to that of another, along the arc between their noises.

        `z(p) = (sin((1 - p) w) z_a + sin(p w) z_b) / sin w`, w the angle between z_a and z_b, p from 0 to 1.
        Source: Shoemake 1985, doi:10.1145/325334.325242.
        """
        a, b = (draw(torch.tensor([[s, 0]]), self.shape, self.device) for s in seeds)
        w = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        p = torch.linspace(0, 1, n, device=self.device).reshape(-1, *[1] * len(self.shape))
        arc = (torch.sin((1 - p) * w) * a + torch.sin(p * w) * b) / torch.sin(w)
        return self(noise=arc if w > 1e-3 else a.expand(n, *self.shape), **arguments)

    def from_latents(
        self, z: Tensor, strength: float, *, seed: int | Sequence[int] = 0, indices: Sequence[int] | None = None, **arguments: Any
    ) -> Tensor:
        """Samples near `z` `[n, *shape]`: noise is added as far as the last `strength` of the steps can take away (img2img).

        Arguments as in a call. A solver with history starts anew, at first order, as diffusers' `set_begin_index` has it.

        Raises:
            ValueError: a strength that is not in (0, 1], or a run that cannot start in its middle.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}, allowed is above 0 up to 1")
        x, seeds = numbered(self.shape, self.device, None, seed, z, indices)
        assert x is not None
        asked = self.steps if isinstance(self._scheduler, SolverTable) else self._asked
        start = (asked - max(int(asked * strength), 1)) * getattr(self._scheduler, "order", 1)
        if start not in self._tails:
            if len(self._tails) == MAX_LOOPS:
                self._tails.popitem(last=False)
            self._tails[start] = self._tail(start)
        tail = self._tails[start]
        noised = tail.table.alpha[0].item() * x + tail.table.sigma[0].item() * draw(seeds, self.shape, self.device)
        return tail(noise=noised / tail.init_noise_sigma, seed=seed, indices=indices, **arguments)

    def invert(self, z: Tensor, *, cond: Cond = None) -> Tensor:
        """The noise of unit variance from which a deterministic run would have come to `z`, both `[n, *shape]`.

        Step i backwards solves `x' = a_0 x + b_0 model(x, t_i)` for x by fixed-point iteration from x = x'. Source: Song et al.
        2021, arXiv:2010.02502, section 4.3; Pan et al. 2023, arXiv:2309.04907 for the iteration.

        Raises:
            ValueError: a solver with history, noise or clipping.
        """
        if not self._linear or self.table.history or self.table.stochastic or self.table.clip_range is not None:
            raise ValueError("scheduler: got one with history, noise or clipping, allowed is a deterministic first-order one, such as DDIM")
        if bool((self.table.rows[:, 4].abs() < 1e-6).any()):
            raise ValueError("scheduler: got one with a step that forgets x, as x0 prediction does, allowed is one that can be led back")
        x, _ = numbered(self.shape, self.device, None, 0, z, None)
        assert x is not None
        with torch.no_grad(), float32_precision(self.device, self.tf32):
            for i in reversed(range(self.steps)):
                a, b = self.table.rows[i, 4:6].tolist()
                after = x
                for _ in range(INVERSIONS):
                    h = x if self.input_scale is None else x * self.input_scale[i]
                    x = (after - b * self.predict(h.to(self.dtype), self.rows[i : i + 1], named(cond)).float()) / a
        if not x.isfinite().all():
            raise FloatingPointError(f"model: NaN or infinity while inverting samples {_broken(x)}")
        return x / self.init_noise_sigma

    def stats(self) -> dict[str, int]:
        """Counts since construction.

        samples, pads, compiled, loaded, captures, replays, evictions, fallbacks, stopped, steps_saved, fused; what is 0 is left out.
        """
        return dict(self.counts)

    def _choose(self, n: int) -> None:
        if self.compiled is None and self._captures:
            mode, self.reason = choose(self.device, n, self.steps)
            self.graph, self.compiled = parse_mode(mode, self.device)
            if self.compiled is not None:
                self._loops.clear()

    def _tail(self, start: int) -> FastSampler:
        tail = copy.copy(self)
        if isinstance(self._scheduler, SolverTable):
            tail.table = self.table.from_step(start)
        elif self._linear:
            tail.table = SolverTable.from_scheduler(self._scheduler, self._asked, eta=self.eta, start=start)
        if not self._linear or not math.isfinite(tail.table.alpha[0].item() + tail.table.sigma[0].item()):
            raise ValueError(
                f"scheduler: got {type(self._scheduler).__name__}, allowed to start from latents is one with add_noise and a table"
            )
        tail._load()
        return tail

    def _batch(self, numbers: range, parts: Parts, callback: Callback | None) -> Tensor:
        """One batch, the samples `numbers` of the call and padding; and the two ways in which it can go wrong."""
        try:
            out = self._made(parts, len(numbers), callback)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # what the failed attempt still holds
            raise MemoryError(self._what_fits(parts)) from error
        if broken := _broken(out[: len(numbers)]):

            def name(i: int, t: float, x: Tensor) -> None:
                if at := _broken(x[: len(numbers)]):
                    raise FloatingPointError(f"model: NaN or infinity at step {i} (timestep {t:g}) in samples {[numbers[k] for k in at]}")

            self._made(parts, len(numbers), name)
            raise FloatingPointError(f"decode: NaN or infinity in samples {[numbers[k] for k in broken]}, whose latents are finite")
        return out

    def _made(self, parts: Parts, real: int, callback: Callback | None) -> Tensor:
        x, seeds, cond, guidance = parts
        if not self._linear:
            return self._stepped(parts, callback)
        key = (len(x), guidance is not None, *((name, tuple(v.shape), v.dtype) for name, v in cond.items()))
        if key not in self._loops:
            if len(self._loops) == MAX_LOOPS:
                self._loops.popitem(last=False)
                self.counts["evictions"] += 1
            self._loops[key] = Loop(self, len(x), cond, guidance is not None)
        self._loops.move_to_end(key)
        try:
            return self._loops[key].run(x, seeds, cond, guidance, real, callback)
        except CaptureFailed as failure:
            if not self._auto:
                raise
            self.graph, self.reason, self._captures = None, f"eager: {failure}", False
            self._loops.clear()
            return self._made(parts, real, callback)

    def _stepped(self, parts: Parts, callback: Callback | None) -> Tensor:
        """The scheduler's own loop, for what no table describes."""
        x, seeds, cond, guidance = parts
        self.counts["fallbacks"] += 1
        scheduler = prepared(self._scheduler, self._asked, self.eta)
        # a step that takes its noise gets that of each sample; one that draws gets a generator of the first
        takes = "variance_noise" in inspect.signature(scheduler.step).parameters
        generator = torch.Generator(self.device).manual_seed(int(seeds[0, 0]) ^ int(seeds[0, 1]) << 32)
        times = scheduler.timesteps.to(self.device)
        with torch.no_grad(), float32_precision(self.device, self.tf32):
            for i, t in enumerate(scheduler.timesteps):
                h = scaled_input(scheduler, x, t).to(self.dtype)
                if guidance is None:
                    m = self.predict(h, self._row(times[i]), cond).float()
                else:
                    m_u, m_c = self.predict(torch.cat([h, h]), self._row(times[i]), cond).float().chunk(2)
                    m = m_u + guidance.to(self.device).reshape(-1, *[1] * len(self.shape)) * (m_c - m_u)
                noise = draw(seeds.cpu(), self.shape, self.device, i + 1) if takes else generator
                x, _ = scheduler_step(scheduler, m, i, x, self.eta, noise)
                if callback is not None:
                    callback(i, float(t), x)
            return x if self.decode is None else self.decode(x)

    def _row(self, t: Tensor) -> Tensor:
        return self.model.time_rows(t[None]).to(self.dtype) if isinstance(self.model, UNet2D) else t[None]

    def _what_fits(self, parts: Parts) -> str:
        """The largest half, quarter, ... of a batch whose first step and decoding run when tried now, one after another."""
        x, seeds, cond, guidance = parts
        n = len(x)
        while n > 1:
            n //= 2
            self._loops.clear()
            some = {k: v[: n * (1 if guidance is None else 2)] for k, v in cond.items()}
            try:
                try:
                    self._made((x[:n], seeds[:n], some, None if guidance is None else guidance[:n]), n, _first_only)
                except StopIteration:
                    if self.decode is not None:
                        with torch.no_grad():
                            self.decode(x[:n])
                    return f"n: {len(x)} at a time do not fit into memory; {n} do, a step of them ran just now: give a batch size of {n}"
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
        return f"n: {len(x)} at a time do not fit into memory, nor does a single one, which was tried just now"


def _first_only(i: int, t: float, x: Tensor) -> None:
    raise StopIteration


def _out_of_memory(error: RuntimeError) -> bool:
    # a CPU's allocator has no type of its own
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _broken(x: Tensor) -> list[int]:
    return (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
