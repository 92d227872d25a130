"""The sampling loop, in five ways that compute the same thing."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.diffusion.table import ddim_table
from sbldm_fast.kernels import ddim_step, philox_normal
from sbldm_fast.models import UNet2D

MODES = ("eager", "compile", "step-graph", "loop-graph", "auto")
MAX_GRAPHS = 4  # batch sizes kept captured at a time


class FastSampler:
    """A model and a scheduler, turned into a function from seeds to samples.

    Before the loop: timesteps, alphas_cumprod and, for a `UNet2D`, the scale and shift of every block at every step are put
    into tables on the device. In the loop: one model call and one `ddim_step` a step, no transfer, no synchronisation.

    | mode         | what runs                                                                                |
    |--------------|------------------------------------------------------------------------------------------|
    | `eager`      | the loop in Python                                                                       |
    | `compile`    | the loop in Python, the step through torch.compile (on a CPU with frozen weights)        |
    | `step-graph` | one CUDA graph of a step that reads its row through a counter on the device, replayed    |
    | `loop-graph` | one CUDA graph of the whole loop, `decode` included                                      |
    | `auto`       | `loop-graph` on CUDA, else `eager`; `reason` says why                                    |

    The graph modes are compiled, not run: no CUDA machine has measured them yet.

    Args:
        model: a `UNet2D`, a diffusers UNet, or any callable `(x, t) -> prediction`, t a scalar tensor. A module is put in
            evaluation mode; after moving or retraining it, build a new sampler.
        scheduler: `DDIMScheduler` or `DDPMScheduler`, ours or diffusers'.
        shape: of one sample, `(C, H, W)`.
        steps: solver steps, 1 to num_train_timesteps.
        mode: see the table.
        dtype: of the model's arithmetic, on a copy of it; the solver stays in float32. None: as the model is.
        eta: 0 deterministic, 1 the variance of DDPM.
        decode: applied to the final latents, inside the captured loop; None: latents are returned.
        device: of a callable without parameters; others bring their own.

    Raises:
        ValueError: an argument that is not allowed, a graph mode without CUDA, or a scheduler that is not DDIM or DDPM.
    """

    def __init__(
        self, model: Callable[..., Any], scheduler: Any, *, shape: Sequence[int], steps: int = 50, mode: str = "auto",
        dtype: torch.dtype | None = None, eta: float = 0.0, decode: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, allowed are {', '.join(MODES)}")
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = parameter.device if parameter is not None else torch.device(device or "cpu")
        if mode.endswith("graph") and self.device.type != "cuda":
            raise ValueError(f"mode: got {mode!r}, which needs CUDA, and the model is on {self.device}; allowed here are eager, compile")
        self.mode, self.reason = _choose(mode, self.device)
        self.shape, self.steps = tuple(shape), steps
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        self.decode = decode
        table = ddim_table(scheduler, steps, eta)
        self.timesteps, self.eta = table.timesteps, table.eta
        self._prediction_type, self._clip_range = table.prediction_type, table.clip_range
        # row i of `_bars`: alphas_cumprod at step i and one step earlier
        self._bars = torch.stack([table.alpha_bar, table.alpha_bar_prev], dim=1).to(self.device, torch.float32)
        times = torch.tensor(table.timesteps, device=self.device)
        with torch.no_grad():
            self._rows = model.time_rows(times).to(self.dtype) if isinstance(model, UNet2D) else times
        if parameter is not None and self.dtype != parameter.dtype:
            # half-precision convolutions want the channels side by side, on tensor cores as on AMX
            model = copy.deepcopy(model).to(self.dtype, memory_format=torch.channels_last)  # type: ignore[attr-defined]  # it has parameters
        self._model = model.eval() if isinstance(model, nn.Module) else model
        self._step = self._compiled() if self.mode == "compile" else self._step_eager
        self._graphs: OrderedDict[int, _Captured] = OrderedDict()
        # one pool for all batch sizes: replays follow on one another, and outputs are copied out before the next
        self._pool = torch.cuda.graph_pool_handle() if self.mode.endswith("graph") else None
        self._counts: Counter[str] = Counter()

    def __call__(self, n: int | None = None, *, seed: int | Sequence[int] = 0, noise: Tensor | None = None, first_index: int = 0) -> Tensor:
        """Samples `[n, *shape]` in float32, or what `decode` makes of them.

        Args:
            n: how many; or give `noise`.
            seed: one for the batch, whose samples then are numbers `first_index`, `first_index + 1`, … of it; or one for each
                sample, which then is number 0 of its own seed.
            noise: the starting noise `[n, *shape]` of unit variance instead of n.

        Raises:
            ValueError: neither or both of `n` and `noise`, a wrong shape or count, or a negative seed.
        """
        x, seeds = self._start(n, seed, noise, first_index)
        with torch.no_grad():
            z = self._solver_noise(seeds)
            self._counts["samples"] += x.shape[0]
            if self.mode.endswith("graph"):
                return self._captured(x.shape[0]).run(x, z)
            with compilation(self.device) if self.mode == "compile" else nullcontext():
                for i in range(self.steps):
                    x = self._step(x, self._rows[i : i + 1], self._bars[i], None if z is None else z[i])
            return x if self.decode is None else self.decode(x)

    def stats(self) -> dict[str, int]:
        """Counts since construction: samples, captures, replays, evictions."""
        return dict(self._counts)

    def _step_eager(self, x: Tensor, row: Tensor, bars: Tensor, noise: Tensor | None) -> Tensor:
        h = x.to(self.dtype)
        m = self._model.forward_rows(h, row) if isinstance(self._model, UNet2D) else _tensor(self._model(h, row[0]))
        return ddim_step(
            x, m.to(x.dtype).contiguous(), bars[0], bars[1],
            eta=self.eta, noise=noise, prediction_type=self._prediction_type, clip_range=self._clip_range,
        )  # fmt: skip

    def _compiled(self) -> Callable[..., Tensor]:
        # a graph break in our own model would be a defect; a foreign model may have its reasons
        own = isinstance(self._model, UNet2D)
        compiled: Callable[..., Tensor] = torch.compile(self._step_eager, fullgraph=own, dynamic=False)
        return compiled

    def _start(
        self, n: int | None, seed: int | Sequence[int], noise: Tensor | None, first_index: int
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        if (n is None) == (noise is None):
            raise ValueError("n, noise: give one of the two, the number of samples or their starting noise")
        if noise is not None and tuple(noise.shape[1:]) != self.shape:
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is [n, {', '.join(map(str, self.shape))}]")
        count = int(noise.shape[0]) if noise is not None else int(n or 0)
        if count < 1:
            raise ValueError(f"n: got {count}, allowed is 1 or more")
        if isinstance(seed, int):
            seeds = [(seed, first_index, count)]
        else:
            seeds = [(s, 0, 1) for s in seed]
            if len(seeds) != count:
                raise ValueError(f"seed: got {len(seeds)} seeds for {count} samples, allowed is one seed or one for each sample")
        x = self._draw(seeds, stream=0) if noise is None else noise.to(self.device, torch.float32).contiguous()
        return x, seeds

    def _draw(self, seeds: list[tuple[int, int, int]], stream: int) -> Tensor:
        parts = [philox_normal((count, *self.shape), s, first_index=first, stream=stream, device=self.device) for s, first, count in seeds]
        return torch.cat(parts)

    def _solver_noise(self, seeds: list[tuple[int, int, int]]) -> Tensor | None:
        if self.eta == 0:
            return None
        return torch.stack([self._draw(seeds, stream=i + 1) for i in range(self.steps)])

    def _captured(self, n: int) -> _Captured:
        if n not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
                self._counts["evictions"] += 1
            self._counts["captures"] += 1
            self._graphs[n] = _Captured(self, n)
        self._graphs.move_to_end(n)
        self._counts["replays"] += 1
        return self._graphs[n]


class _Captured:
    """The loop for one batch size with its static buffers, captured once."""

    def __init__(self, sampler: FastSampler, n: int) -> None:
        s = sampler
        self.x = torch.zeros(n, *s.shape, device=s.device)
        self.noise = torch.zeros(s.steps, n, *s.shape, device=s.device) if s.eta else None
        self.counter = torch.zeros(1, dtype=torch.int64, device=s.device)
        self.whole = s.mode == "loop-graph"
        self.steps, self.decode = s.steps, s.decode

        def loop() -> Tensor:
            x = self.x
            for i in range(s.steps):
                x = s._step(x, s._rows[i : i + 1], s._bars[i], None if self.noise is None else self.noise[i])
            return x if s.decode is None else s.decode(x)

        def step() -> Tensor:
            row, bars = s._rows.index_select(0, self.counter), s._bars.index_select(0, self.counter)[0]
            noise = None if self.noise is None else self.noise.index_select(0, self.counter)[0]
            self.x.copy_(s._step(self.x, row, bars, noise))
            self.counter.add_(1)
            return self.x

        # a graph keeps addresses, not tensors: without this a model that moves away would leave it freed memory
        self.held = [p.data for p in s._model.parameters()] if isinstance(s._model, nn.Module) else []
        self.replay = capture(loop if self.whole else step, reset=self.counter.zero_, device=s.device, pool=s._pool)

    def run(self, x: Tensor, noise: Tensor | None) -> Tensor:
        self.x.copy_(x)
        if self.noise is not None and noise is not None:
            self.noise.copy_(noise)
        if self.whole:
            return self.replay().clone()
        self.counter.zero_()
        for _ in range(self.steps):
            out = self.replay()
        return out.clone() if self.decode is None else self.decode(out.clone())


@contextmanager
def compilation(device: torch.device) -> Iterator[None]:
    """How a step is compiled: on a CPU with frozen weights, which Inductor packs for oneDNN; on CUDA that would gain nothing.

    Freezing must be set while Dynamo traces: as an option of torch.compile it leaves the weights unpacked. Every sampler and
    every batch size is a version of one step, so Dynamo's limit of 8, made for accidents, is lifted.
    """
    from torch._inductor import config  # half a second that only this mode pays

    with config.patch(freezing=device.type == "cpu"), torch._dynamo.config.patch(recompile_limit=256):
        yield


def capture(work: Callable[[], Tensor], reset: Callable[[], Any], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Record `work` into a CUDA graph; the function returned replays it and gives its static output.

    `reset` undoes what a run of `work` leaves behind, so that the warm-up runs, which plan cuDNN and compile Triton before
    the capture, do not walk the counter off the table.
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


def _choose(mode: str, device: torch.device) -> tuple[str, str]:
    if mode != "auto":
        return mode, "asked for"
    if device.type == "cuda":
        return "loop-graph", "CUDA device: the whole loop is one launch"
    return (
        "eager",
        f"{device.type} has no CUDA graphs, and compilation takes longer than a few images do; mode='compile' is faster after it",
    )


def _tensor(output: Any) -> Tensor:
    # diffusers wraps its prediction in an output object, or in a tuple with return_dict=False
    out: Tensor = output if isinstance(output, Tensor) else output.sample if hasattr(output, "sample") else output[0]
    return out
