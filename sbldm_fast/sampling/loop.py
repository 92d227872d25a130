"""The loop for one batch size: its buffers, its step, and the ways to run it (eager, compiled, captured)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sbldm_fast.kernels import solver_step
from sbldm_fast.models import UNet2D

from ..errors import UserError
from .ahead import NotTraceable, Unavailable, compiled_ahead, private_caches
from .content import behind, survey
from .model import Named, Predict, for_cpu, fused, predictor
from .modes import OWN_GRAPHS

if TYPE_CHECKING:
    from .sampler import FastSampler

Callback = Callable[[int, float, Tensor], None]
_COMPILING = threading.RLock()


class ModeFailed(UserError):
    """The mode cannot be had: a model that cannot be captured, no compiler, no folder for what is compiled; the message
    says why."""


class Turn:
    """A lock for those who share buffers; who has it already is told so, instead of waiting for ever."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise UserError(
                "sampler: got a call from its own callback, model or decode, allowed is another sampler: this one is at"
                " work"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()  # a copy of a sampler has its own


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


def make_step(
    predict: Predict,
    dtype: torch.dtype,
    layout: torch.memory_format,
    clip_range: float | None,
    stop: str | None,
    threshold: float,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Buffers, Named], Tensor]:
    """One step as a function of tensors alone, so that it can be compiled and captured."""

    def step(x: Tensor, row: Tensor, scale: Tensor | None, table: Tensor, b: Buffers, cond: Named) -> Tensor:
        # both at once, or cuDNN would turn it round
        h = (x if scale is None else x * scale).to(dtype, memory_format=layout)
        if b.guidance is not None:
            h = torch.cat([h, h])
        m = predict(h, row, cond)
        if m.shape != h.shape:
            raise UserError(
                f"model: got an output of shape {tuple(m.shape)}, allowed is that of its input, {tuple(h.shape)}"
            )
        if not (m.is_contiguous() or (m.dim() == 4 and m.is_contiguous(memory_format=torch.channels_last))):
            m = m.contiguous()
        x = solver_step(
            x,
            m,
            table,
            b.counter,
            guidance_scale=b.guidance,
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
    """The loop of a `FastSampler` for one batch size, with conditioning and guidance of one shape."""

    def __init__(self, sampler: FastSampler, n: int, cond: Named, guided: bool) -> None:
        s = self.sampler = sampler
        shape = (n, *s.shape)

        def zeros(*size: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Any:
            return torch.zeros(size, dtype=dtype, device=s.device) if wanted else None

        stops = s.stop is not None
        self.x: Tensor = zeros(*shape)
        self.buffers = Buffers(
            counter=zeros(2, dtype=torch.int32),
            seeds=zeros(n, 2, dtype=torch.int64, wanted=s.table.stochastic),
            history=zeros(s.table.history, 2, *shape, wanted=s.table.history > 0),
            guidance=zeros(n, wanted=guided),
            frozen=zeros(n, dtype=torch.bool, wanted=stops),
            x0=zeros(*shape, wanted=stops),
            statistics=zeros(n, 2, wanted=stops),
            last=zeros(n, wanted=stops),
        )
        self.cond = {k: v.clone() for k, v in cond.items()}
        predict, model = s.predict, s.model
        if s.compiled and s.device.type == "cpu" and isinstance(model, nn.Module):
            model = for_cpu(model)
            predict = predictor(model)
        if s.fuse:
            x = torch.cat([self.x] * (1 + guided)).to(s.dtype)
            predict, s.counts["fused"] = fused(predict, model, x, s.rows[:1], self.cond)
        self.step = make_step(predict, s.dtype, s.layout, s.table.clip_range, s.stop, s.threshold)
        # a trace would not show that a model writes into its input
        if (s.compiled or s.fuse) and not isinstance(model, UNet2D):
            with torch.no_grad():
                s.predict(torch.cat([self.x] * (1 + guided)).to(s.dtype), s.rows[:1], self.cond)
        self.traced = s.compiled is not None and (s.device.type != "cpu" or not self._ahead(model, s.compiled))
        if self.traced:
            # a graph break in our own model would be a defect; a foreign model may have its reasons
            self.step = torch.compile(self.step, fullgraph=isinstance(s.model, UNet2D), dynamic=False, mode=s.compiled)
        self.graphs: dict[str, Callable[[], Tensor]] = {}
        # a graph keeps addresses, not tensors: without this a model that moves away would leave it freed memory
        self.held = [t.data for part in (s.model, s.decode) for t in survey(*behind(part))[1]]

    def run(
        self, x: Tensor, seeds: Tensor, cond: Named, guidance: Tensor | None, real: int, callback: Callback | None
    ) -> Tensor:
        """From the first x to the last, or to what `decode` makes of it; `real` of the samples are not padding."""
        s, b = self.sampler, self.buffers
        whole = s.graph == "loop-graph" and callback is None and s.stop is None
        with (
            torch.no_grad(),
            float32_precision(s.device, s.tf32),
            compilation(s.device) if self.traced else nullcontext(),
        ):
            self.traced = False  # from its second run on there is nothing to compile
            replay = self._captured(whole) if s.graph else None
            self.x.copy_(x)
            self._rewind()
            pairs = [
                (b.seeds, seeds),
                (b.guidance, guidance),
                *((self.cond[name], given) for name, given in cond.items()),
            ]
            for mine, given in pairs:
                if mine is not None and given is not None:
                    mine.copy_(given)
            if whole and replay is not None:
                return replay().clone()
            x, looks = self.x, Looks(s.device)
            for i, t in enumerate(s.timesteps):
                x = self._advance(x, i) if replay is None else replay()
                if callback is not None:
                    callback(i, t, x)
                if b.frozen is not None and (i + 1) % s.check_every == 0 and looks.all_stopped(b.frozen):
                    s.counts["steps_saved"] += s.steps - i - 1
                    break
            if b.frozen is not None and b.x0 is not None:
                s.counts["stopped"] += int(b.frozen[:real].sum())
                x = torch.where(b.frozen.reshape(-1, *[1] * len(s.shape)), b.x0, x)
            x = x.clone()  # out of the memory of a graph, ours or torch.compile's
            return x if s.decode is None else s.decode(x).clone()  # out of the memory of a decoder that has its own

    def _advance(self, x: Tensor, i: int) -> Tensor:
        s = self.sampler
        scale = None if s.input_scale is None else s.input_scale[i]
        if s.compiled in OWN_GRAPHS and s.device.type == "cuda":
            # torch.compile's own graphs overwrite their last output
            torch.compiler.cudagraph_mark_step_begin()
            x = x.clone()
        out: Tensor = self.step(x, s.rows[i : i + 1], scale, s.numbers, self.buffers, self.cond)
        return out

    def _ahead(self, model: object, mode: str) -> bool:
        """Compile the step for the CPU ahead of time; False where torch.export cannot trace the model."""
        s, step = self.sampler, self.step

        def packed(x: Tensor, row: Tensor, tensors: dict[str, Tensor], cond: Named) -> Tensor:
            b = Buffers(**{name: tensors.get(name) for name in Buffers._fields})  # type: ignore[arg-type]
            return step(x, row, tensors.get("scale"), tensors["table"], b, cond)

        kept = {name: t for name, t in self.buffers._asdict().items() if t is not None} | {"table": s.numbers}
        scale = {} if s.input_scale is None else {"scale": s.input_scale[0]}
        try:
            with _COMPILING:
                call, found = compiled_ahead(packed, model, (self.x, s.rows[:1], kept | scale, self.cond), mode)
        except Unavailable as failure:
            raise ModeFailed(str(failure)) from failure
        except NotTraceable as failure:
            s.reason += f"; torch.compile, for it cannot be compiled ahead of time: {str(failure).splitlines()[0]}"
            return False
        s.counts["loaded" if found else "compiled"] += 1

        def ahead(x: Tensor, row: Tensor, scale: Tensor | None, table: Tensor, b: Buffers, cond: Named) -> Tensor:
            return call(x, row, kept if scale is None else kept | {"scale": scale}, cond)

        self.step = ahead
        return True

    def _rewind(self) -> None:
        for buffer in (self.buffers.counter, self.buffers.frozen, self.buffers.last):
            if buffer is not None:
                buffer.zero_()

    def _captured(self, whole: bool) -> Callable[[], Tensor]:
        s, name = self.sampler, "loop" if whole else "step"

        def loop() -> Tensor:
            x = self.x
            for i in range(s.steps):
                x = self._advance(x, i)
            return x if s.decode is None else s.decode(x)

        def step() -> Tensor:
            at = self.buffers.counter[:1]
            scale = None if s.input_scale is None else s.input_scale.index_select(0, at)
            self.x.copy_(self.step(self.x, s.rows.index_select(0, at), scale, s.numbers, self.buffers, self.cond))
            return self.x

        if name not in self.graphs:
            try:
                self.graphs[name] = capture(loop if whole else step, self._rewind, s.device, s.pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ModeFailed(
                    f"mode: got {s.graph!r}, and {type(s.model).__name__} or decode cannot be captured: {error}"
                ) from error
            s.counts["captures"] += 1
        s.counts["replays"] += 1
        return self.graphs[name]


class Looks:
    """Looks at whether every sample has stopped; on CUDA at a copy that was sent off at the look before, so that
    nothing waits."""

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
def float32_precision(device: torch.device, tf32: bool) -> Iterator[None]:
    """Inside, float32 convolutions and matrix products on CUDA are of float32, or with `tf32` of 10-bit mantissas on
    tensor cores.

    PyTorch's default is TF32 for convolutions and float32 for matrix products. What was set before comes back. The
    settings are of the process: threads that sample at the same time must ask for the same.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.cuda.matmul)
    try:
        before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer names: they must not be mixed
        older = False
        before = cudnn.conv.fp32_precision, matmul.fp32_precision
    else:
        older = True

    def use(convolutions: Any, products: Any) -> None:
        if older:  # not matmul.allow_tf32, after which Inductor could not ask for the precision
            cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)
        else:
            cudnn.conv.fp32_precision, matmul.fp32_precision = convolutions, products

    try:
        use(*((tf32, "high" if tf32 else "highest") if older else ["tf32" if tf32 else "ieee"] * 2))
        yield
    finally:
        use(*before)


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
