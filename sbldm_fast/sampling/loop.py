"""The loop for one batch size: its buffers, its step, and the ways to run it (eager, compiled, captured)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbldm_fast.kernels import solver_step
from sbldm_fast.kernels._arguments import is_dense
from sbldm_fast.models import UNet2D

from ..errors import UserError
from .ahead import NotTraceable, Unavailable, compile_ahead, private_caches
from .content import parts_of, survey
from .model import Predict, TensorDict, for_cpu, fuse_norms, predictor
from .modes import OWN_GRAPHS, Mode, time_in_turns
from .plan import Plan
from .precision import float32_precision
from .request import Batch

Callback = Callable[[int, float, Tensor], None]
_COMPILING = threading.RLock()


class ModeFailed(UserError):
    """The mode cannot be had: a model that cannot be captured, no compiler, no folder for what is compiled; the message
    says why."""


def broken(x: Tensor) -> list[int]:
    """The samples of a batch with NaN or infinity."""
    return (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


class Buffers(NamedTuple):
    """What `solver_step` keeps between steps, None where the run has no use for it, and the norms that stopping
    compares."""

    counter: Tensor
    seeds: Tensor | None
    history: Tensor | None
    guidance: Tensor | None
    frozen: Tensor | None
    x0: Tensor | None
    statistics: Tensor | None
    last: Tensor | None


def make_buffers(plan: Plan, n: int, guided: bool, interval: bool = False) -> Buffers:
    """Those of a batch of n samples, all zero; guidance in an `interval` has a row for each step."""
    shape = (n, *plan.options.shape)
    history, stops = plan.table.history, plan.options.stop is not None

    def zeros(wanted: bool, *size: int, dtype: torch.dtype = torch.float32) -> Any:
        return torch.zeros(size, dtype=dtype, device=plan.network.device) if wanted else None

    return Buffers(
        counter=zeros(True, 2, dtype=torch.int32),
        seeds=zeros(plan.table.stochastic, n, 2, dtype=torch.int64),
        history=zeros(history > 0, history, 2, *shape),
        guidance=zeros(guided, *([len(plan.timesteps)] if interval else []), n),
        frozen=zeros(stops, n, dtype=torch.bool),
        x0=zeros(stops, *shape),
        statistics=zeros(stops, n, 2),
        last=zeros(stops, n),
    )


def make_step(
    predict: Predict,
    dtype: torch.dtype,
    layout: torch.memory_format,
    clip_range: float | None,
    stop: str | None,
    threshold: float,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Buffers, TensorDict], Tensor]:
    """One step as a function of tensors alone, so that it can be compiled and captured."""

    def step(x: Tensor, row: Tensor, scale: Tensor | None, table: Tensor, b: Buffers, cond: TensorDict) -> Tensor:
        # both at once, or cuDNN would turn it round
        h = (x if scale is None else x * scale).to(dtype, memory_format=layout)
        if b.guidance is not None:
            h = torch.cat([h, h])
        guidance = b.guidance
        if guidance is not None and guidance.dim() == 2:  # a row for each step: no branch in a graph
            guidance = guidance.index_select(0, b.counter[:1])[0]
        m = predict(h, row, cond)
        if m.shape != h.shape:
            raise UserError(
                f"model: got an output of shape {tuple(m.shape)}, allowed is that of its input, {tuple(h.shape)}"
            )
        if not is_dense(m):
            m = m.contiguous()
        x = solver_step(
            x,
            m,
            table,
            b.counter,
            guidance_scale=guidance,
            history=b.history,
            seeds=b.seeds,
            frozen=b.frozen,
            x0=b.x0,
            statistics=b.statistics,
            clip_range=clip_range,
        )
        if b.statistics is not None and b.frozen is not None and b.last is not None:
            output, moved = (b.statistics / x[0].numel()).sqrt().unbind(1)
            if stop == "eps_norm":
                hit = output < threshold
            elif stop == "convergence":
                hit = (output - b.last).abs() < threshold * b.last
            else:  # x0_delta; before the first step there is no x0 to compare with
                hit = (moved < threshold) & (b.counter[:1] > 1)
            b.last.copy_(output)
            b.frozen.logical_or_(hit)
        return x

    return step


class Loop:
    """A plan for one batch size, with conditioning and guidance of one shape: buffers, a step, and its graphs.

    Args:
        key: under which `auto` keeps what it times; None: the mode was asked for, and nothing is timed.

    Attributes:
        mode: that of the plan, or the one that was faster.
        found: what was timed, in words; empty: nothing yet.
        remark: what became of the mode that was asked for, if anything did.
    """

    def __init__(self, plan: Plan, batch: Batch, counts: Counter[str], key: Any = None) -> None:
        n, cond, guided = len(batch.x), batch.cond, batch.guidance is not None
        self.plan, self.counts, self.remark, self.key = plan, counts, "", key
        self.mode, self.found = plan.faster.get(key, (plan.mode, ""))
        network, options, compiled = plan.network, plan.options, plan.mode.compiled
        self.x = torch.zeros(n, *options.shape, device=network.device)
        self.buffers = make_buffers(plan, n, guided, batch.interval is not None)
        self.cond = {k: v.clone() for k, v in cond.items()}
        predict, model = network.predict, network.model
        if compiled and network.device.type == "cpu" and isinstance(model, nn.Module):
            model = for_cpu(model)
            predict = predictor(model)
        example = torch.cat([self.x] * (1 + guided)).to(network.dtype), plan.time_rows[:1], self.cond
        holder: object = model  # of the weights
        if options.fuse:
            predict, counts["fused"] = fuse_norms(predict, model, *example)
            holder = predict
        self.step = make_step(
            predict, network.dtype, network.layout, plan.table.clip_range, options.stop, options.threshold or 0.0
        )
        # a trace would not show that a model writes into its input
        if (compiled or options.fuse) and not isinstance(model, UNet2D):
            with torch.no_grad():
                network.predict(*example)
        self.traced = compiled is not None and (network.device.type != "cpu" or not self._ahead(holder, compiled))
        if self.traced:
            # a graph break in our own model would be a defect; a foreign model may have its reasons
            whole = isinstance(network.model, UNet2D)
            self.step = torch.compile(self.step, fullgraph=whole, dynamic=False, mode=compiled)
        self.graphs: dict[str, Callable[[], Tensor]] = {}
        # a graph keeps addresses, not tensors: without this a model that moves away would leave it freed memory
        parts = (network.model, options.decode)
        self.held = [t.data for part in parts for t in survey(*parts_of(part))[1]]

    def run(self, batch: Batch, callback: Callback | None) -> Tensor:
        """From the first x to the last `[N, *shape]`, or to what `decode` makes of it."""
        device = self.plan.network.device
        with (
            torch.no_grad(),
            float32_precision(device, self.plan.options.tf32),
            compilation(device) if self.traced else nullcontext(),
        ):
            self.traced = False  # from its second run on there is nothing to compile
            out = self._make(batch, callback, self.mode)
            if self.key is not None and self.mode.graph and callback is None and not self.found:
                self._settle(batch)
            return out

    def _make(self, batch: Batch, callback: Callback | None, mode: Mode) -> Tensor:
        whole = mode.graph == "loop-graph" and callback is None and self.plan.options.stop is None
        replay = self._captured(whole) if mode.graph else None
        self._load(batch)
        if whole and replay is not None:
            return replay().clone()
        x = self._steps(replay, callback)
        if (frozen := self.buffers.frozen) is not None and self.buffers.x0 is not None:
            self.counts["stopped"] += int(frozen[: len(batch.places)].sum())
            x = torch.where(frozen.reshape(-1, *[1] * (x.dim() - 1)), self.buffers.x0, x)
        x = x.clone()  # out of the memory of a graph, ours or torch.compile's
        decode = self.plan.options.decode
        return x if decode is None else decode(x).clone()  # out of the memory of a decoder that has its own

    def _settle(self, batch: Batch) -> None:
        """Time the graph and the eager loop, and keep the faster; a graph that loses gives its memory back."""
        graph, eager = self.mode, Mode(None, None)
        counts, self.counts = self.counts, Counter()  # nobody asked for these samples
        try:
            runs = {mode: partial(self._make, batch, None, mode) for mode in (graph, eager)}
            seconds = time_in_turns(runs, self.plan.network.device)
            told = ", ".join(f"{mode} {1e3 * t:.1f} ms" for mode, t in seconds.items())
            self.mode = min(seconds, key=lambda mode: seconds[mode])
        except RuntimeError:  # no memory for both, or whatever a second run meets: what ran goes on
            told = f"{graph}, beside which eager does not run,"
        finally:
            self.counts = counts
        counts["timed"] += 1
        self.found = f"{told} for batches of {len(self.x)}"
        self.plan.faster[self.key] = self.mode, self.found
        if self.mode == eager:
            self.graphs.clear()
            torch.cuda.empty_cache()

    def _load(self, batch: Batch) -> None:
        """Put what a batch is made of into the buffers, and the counter at the first step."""
        self.x.copy_(batch.x)
        self._rewind()
        guidance = batch.guidance
        if guidance is not None and batch.interval is not None:
            inside = torch.tensor([batch.guides(t) for t in self.plan.timesteps], device=guidance.device)
            guidance = torch.where(inside[:, None], guidance, 1.0)
        pairs = [(self.buffers.seeds, batch.seeds), (self.buffers.guidance, guidance)]
        for mine, given in [*pairs, *((self.cond[name], value) for name, value in batch.cond.items())]:
            if mine is not None and given is not None:
                mine.copy_(given)

    def _steps(self, replay: Callable[[], Tensor] | None, callback: Callback | None) -> Tensor:
        x, frozen, options = self.x, self.buffers.frozen, self.plan.options
        poll = StopPoll(self.plan.network.device)
        for i, t in enumerate(self.plan.timesteps):
            x = self._advance(x, i) if replay is None else replay()
            if callback is not None:
                callback(i, t, x)
            if frozen is not None and (i + 1) % options.check_every == 0 and poll.all_stopped(frozen):
                self.counts["steps_saved"] += len(self.plan.timesteps) - i - 1
                break
        return x

    def _advance(self, x: Tensor, i: int) -> Tensor:
        plan = self.plan
        scale = None if plan.input_scale is None else plan.input_scale[i]
        if plan.mode.compiled in OWN_GRAPHS and plan.network.device.type == "cuda":
            # torch.compile's own graphs overwrite their last output
            torch.compiler.cudagraph_mark_step_begin()
            x = x.clone()
        out: Tensor = self.step(x, plan.time_rows[i : i + 1], scale, plan.solver_rows, self.buffers, self.cond)
        return out

    def _ahead(self, model: object, mode: str) -> bool:
        """Compile the step for the CPU ahead of time; False where torch.export cannot trace the model."""
        plan, step = self.plan, self.step

        def packed(x: Tensor, row: Tensor, tensors: dict[str, Tensor], cond: TensorDict) -> Tensor:
            b = Buffers(**{name: tensors.get(name) for name in Buffers._fields})  # type: ignore[arg-type]
            return step(x, row, tensors.get("scale"), tensors["table"], b, cond)

        kept = {name: t for name, t in self.buffers._asdict().items() if t is not None} | {"table": plan.solver_rows}
        scale = {} if plan.input_scale is None else {"scale": plan.input_scale[0]}
        try:
            with _COMPILING:
                example = self.x, plan.time_rows[:1], kept | scale, self.cond
                call, found = compile_ahead(packed, model, example, mode)
        except Unavailable as failure:
            raise ModeFailed(str(failure)) from failure
        except NotTraceable as failure:
            why = str(failure).splitlines()[0]
            self.remark = f"; torch.compile, for it cannot be compiled ahead of time: {why}"
            return False
        self.counts["loaded" if found else "compiled"] += 1

        def ahead(x: Tensor, row: Tensor, scale: Tensor | None, table: Tensor, b: Buffers, cond: TensorDict) -> Tensor:
            return call(x, row, kept if scale is None else kept | {"scale": scale}, cond)

        self.step = ahead
        return True

    def _rewind(self) -> None:
        for buffer in (self.buffers.counter, self.buffers.frozen, self.buffers.last):
            if buffer is not None:
                buffer.zero_()

    def _captured(self, whole: bool) -> Callable[[], Tensor]:
        """The replay of the whole loop or of a step, recorded the first time."""
        plan, name = self.plan, "loop" if whole else "step"

        def loop() -> Tensor:
            x = self.x
            for i in range(len(plan.timesteps)):
                x = self._advance(x, i)
            return x if plan.options.decode is None else plan.options.decode(x)

        def step() -> Tensor:
            at = self.buffers.counter[:1]
            scale = None if plan.input_scale is None else plan.input_scale.index_select(0, at)
            row = plan.time_rows.index_select(0, at)
            self.x.copy_(self.step(self.x, row, scale, plan.solver_rows, self.buffers, self.cond))
            return self.x

        if name not in self.graphs:
            pool = plan.pool if self.key is None else None
            try:
                self.graphs[name] = capture(loop if whole else step, self._rewind, plan.network.device, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                who = f"{type(plan.network.model).__name__} or decode"
                raise ModeFailed(f"mode: got {plan.mode.graph!r}, and {who} cannot be captured: {error}") from error
            self.counts["captures"] += 1
        self.counts["replays"] += 1
        return self.graphs[name]


class StopPoll:
    """Asks whether every sample has stopped; on CUDA a copy that was sent off when it asked before, so that nothing
    waits."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.sent: Tensor | None = None

    def all_stopped(self, frozen: Tensor) -> bool:
        if self.event is None:
            return bool(frozen.all())
        stopped = self.sent is not None and self.event.query() and bool(self.sent)
        if self.sent is None:
            self.sent = torch.zeros((), dtype=torch.bool, pin_memory=True)
        if self.event.query():
            self.sent.copy_(frozen.all(), non_blocking=True)
            self.event.record()
        return stopped


@contextmanager
def compilation(device: torch.device) -> Iterator[None]:
    """How a step is compiled: on a CPU with frozen weights, which Inductor packs for oneDNN; on CUDA that would gain
    nothing.

    Freezing must be set while Dynamo traces: as an option of torch.compile it leaves the weights unpacked. Every
    sampler and every batch size is a version of one step, so Dynamo's limit of 8, made for accidents, is lifted. The
    settings are of the process: one thread compiles at a time.

    Raises:
        ModeFailed: there is no C++ compiler for a CPU, or no folder for what it makes.
    """
    from torch._inductor import config, exc  # half a second that only this mode pays

    try:
        with (
            _COMPILING,
            private_caches(device),
            config.patch(freezing=device.type == "cpu"),
            torch._dynamo.config.patch(recompile_limit=256),
        ):
            yield
    except Unavailable as failure:
        raise ModeFailed(str(failure)) from failure
    except exc.InductorError as failure:  # a compiler that is there and fails
        raise ModeFailed(f"mode: the step cannot be compiled: {str(failure).strip().splitlines()[0]}") from failure


def capture(
    work: Callable[[], Tensor], reset: Callable[[], Any], device: torch.device, pool: Any
) -> Callable[[], Tensor]:
    """Record `work` into a CUDA graph; the function returned replays it and gives its static output.

    `reset` undoes what a run of `work` leaves behind, so that the warm-up runs, which plan cuDNN and compile Triton
    before the capture, do not walk the counter off the table.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                reset()
                work()
        torch.cuda.current_stream().wait_stream(stream)
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = work()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay
