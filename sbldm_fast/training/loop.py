"""What both training stages share: precision, learning rate, EMA, the step without a wait, the loop that loses nothing.

A step never waits for the device: the loss, the gradient's norm and the first step that was not finite stay there and
are read every 50 steps. On CUDA the whole step is one graph; with deterministic convolutions and plain attention it is
to the bit what the step is without (a test, run on an H200). All randomness of a step is a function of the seed and of
its number, so that a run that was cut off and continued is the uninterrupted run, to the bit on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.files import recover
from sbldm_fast.machine import native_half

from ..errors import NotFinite, UserError
from . import checkpoint
from .board import Board
from .ranks import Ranks

AMP = ("auto", "off", "fp16", "bf16")
OURS = r"checkpoint-\w+-\d{8}|best-\w+|latents[\w.-]*|log\.jsonl|pipeline"  # what a run writes to its folder
SEEDS = 2**40  # below it seed * 1,000,003 + step is one of PyTorch's
READ_EVERY = 50  # steps between two looks at the device
ASK_EVERY = 10  # steps between two agreements of several processes on a signal
LossOf = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Stopped(Exception):
    """A signal asked for an end; the text names the checkpoint that was written."""


@dataclass(frozen=True)
class Optimisation:
    """How one stage is trained. Defaults of the stages: paper 001 section III.B. `keep`: how many checkpoints stay."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    weight_decay: float = 1e-5
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0: no EMA
    save_every: int = 1000
    keep: int = 3
    seed: int = 0
    amp: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        for name, least in (("lr", 0.0), ("clip_norm", 0.0)):
            if not getattr(self, name) > least:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is above 0")
        for name in ("weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: got {getattr(self, name)}, allowed is 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay: got {self.ema_decay}, allowed is 0 to below 1")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed: got {self.seed}, allowed is 0 to {SEEDS - 1}")
        if self.amp not in AMP:
            raise UserError(f"amp: got {self.amp!r}, allowed are {', '.join(AMP)}")

    def lr_at(self, step: int) -> float:
        """Linear warmup, then a cosine to zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * self.lr * (1 + math.cos(math.pi * done))


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that `name` means on `device`: `auto` is what it computes in natively, or none."""
    return native_half(device) if name == "auto" else {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def batches(count: int, batch_size: int, seed: int, start: int, device: torch.device | None = None) -> Iterator[Tensor]:
    """Index batches from step `start` on: a fresh permutation each epoch, a function of the seed and the step alone."""
    per_epoch = max(1, count // batch_size)
    step = start
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
        order = torch.randperm(count, generator=generator)
        if device is not None and device.type == "cuda":
            order = order.pin_memory().to(device, non_blocking=True)
        for i in range(step % per_epoch, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
            step += 1


@dataclass
class Step:
    """One step of the optimiser and what it leaves on the device: sums since the last look, the gradient's norm, the
    first bad step."""

    model: nn.Module
    loss_of: LossOf
    o: Optimisation
    ranks: Ranks = field(default_factory=Ranks)

    index: Tensor | None = None  # the items, always in the same memory

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.dtype = amp_dtype(self.o.amp, self.device)
        if self.device.type == "cpu" or self.dtype:  # cuDNN's float32 convolutions want the pixels side by side
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if self.o.ema_decay else None
        on_cuda = self.device.type == "cuda"
        parameters = list(self.model.parameters())
        lr = torch.zeros((), device=self.device)  # a tensor: a captured step reads what the loop wrote
        self.optimizer = torch.optim.AdamW(
            parameters, lr=lr, weight_decay=self.o.weight_decay, fused=True, capturable=on_cuda
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.first_bad = torch.full((1,), -1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.pull = torch.zeros((), device=self.device)  # of the EMA towards the weights
        self.scalars: dict[str, Tensor] = {}
        self.run = self._in_a_graph() if on_cuda and self.ranks.size == 1 else self._work
        self.forward: nn.Module = self.model
        if self.ranks.size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        if self.o.compile:
            self.forward.compile()

    def __call__(self, step: int, index: Tensor) -> None:
        """Train on the items `index` of the whole batch."""
        torch.manual_seed(self.o.seed * 1_000_003 + step)
        self.number.fill_(step)
        self.optimizer.param_groups[0]["lr"].fill_(self.o.lr_at(step))
        # a young average forgets faster, so that a short run is not an average with its random start
        self.pull.fill_(1 - min(self.o.ema_decay, (1 + step) / (10 + step)) if step else 1.0)
        self.index = index.clone() if self.index is None else self.index.copy_(index)
        self.run()

    def _work(self) -> None:
        autocast: AbstractContextManager[Any] = (
            torch.autocast(self.device.type, self.dtype, cache_enabled=self.device.type == "cpu")
            if self.dtype
            else nullcontext()
        )
        assert self.index is not None
        self.optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss, scalars = self.loss_of(self.forward, self.index, self.number)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.norm.copy_(nn.utils.clip_grad_norm_(self.model.parameters(), self.o.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            averaged, current = ([p.detach() for p in m.parameters()] for m in (self.ema, self.model))
            if self.device.type == "cpu":
                torch._foreach_lerp_(averaged, current, float(self.pull))
            else:  # what a captured step reads must be a tensor, and that lerp takes none
                difference = torch._foreach_sub(current, averaged)
                torch._foreach_mul_(difference, self.pull)
                torch._foreach_add_(averaged, difference)
        loss = loss.detach()
        self.loss += loss
        # a gradient that is not finite ruins the weights, except where the scaler leaves the step out
        good = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & self.norm.isfinite()
        self.first_bad.copy_(torch.where((self.first_bad < 0) & ~good, self.number, self.first_bad))
        self.scalars = {name: value.detach() for name, value in scalars.items()}

    def _in_a_graph(self) -> Callable[[], None]:
        """The step as one CUDA graph, after three that warm up on a stream of their own, as capturing wants it."""
        graph, side, done = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device), 0

        def run() -> None:
            nonlocal done
            with torch.cuda.device(self.device):
                if done < 3:
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        self._work()
                    torch.cuda.current_stream().wait_stream(side)
                else:
                    if done == 3:
                        with torch.cuda.graph(graph):  # records, does not run
                            self._work()
                    graph.replay()
            done += 1

        return run

    def read(self, steps: int) -> dict[str, float]:
        """The mean loss of the last `steps` steps and the last norm, waiting for the device; starts the next mean.

        Raises:
            FloatingPointError: a loss or gradient was not finite; its argument is the number of the first such step.
        """
        if self.ranks.any(self.is_bad):
            first = torch.where(self.first_bad < 0, 2**62, self.first_bad)
            if self.ranks.size > 1:
                dist.all_reduce(first, dist.ReduceOp.MIN)
            raise NotFinite(int(first))
        loss = self.total / steps
        self.loss.zero_()
        row = {"loss": loss, "grad_norm": float(self.norm)} | {
            k: float(self.ranks.mean(v.clone())) for k, v in self.scalars.items()
        }
        return row | ({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    @property
    def is_bad(self) -> bool:
        """Whether a step was not finite; waits for the device."""
        return bool(self.first_bad >= 0)

    @property
    def total(self) -> float:
        """The sum of the losses since the last look."""
        return float(self.ranks.mean(self.loss.clone()))

    @property
    def trained(self) -> nn.Module:
        """The model to keep: the EMA if there is one."""
        return self.model if self.ema is None else self.ema


def train(
    model: nn.Module,
    loss_of: LossOf,
    count: int,
    o: Optimisation,
    folder: Path,
    *,
    name: str,
    validate: Callable[[nn.Module], float] | None = None,
    pictures: Callable[[nn.Module], dict[str, Tensor]] | None = None,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train for `o.steps` steps, continuing from the newest `folder/checkpoint-<name>-<step>`; return the EMA (or
    `model`).

    With `validate` it is the one of the checkpoint with the lowest value, `folder/best-<name>`. SIGTERM and Ctrl-C end
    the run after a checkpoint.

    Args:
        loss_of: `loss_of(model, index, step)` gives the loss of this process's part of the items `index` and scalars to
            log; `step` is an int64 tensor `[1]` on the device.
        validate, pictures: called at each checkpoint with the model to keep; images `[N, 1, H, W]` in [-1, 1] go to
            TensorBoard.
        extra: what else a continued run must share with its checkpoint.

    Raises:
        ValueError: a checkpoint of another model, of other settings or of another number of items.
        FloatingPointError: a loss or gradient that is not finite, with the step, the items and the last good
            checkpoint.
        Stopped: on a signal.
    """
    ranks = Ranks.of_torchrun()
    folder.mkdir(parents=True, exist_ok=True)
    batch_size = min(o.batch_size, count)
    if batch_size % ranks.size:
        raise UserError(f"batch_size: got {batch_size}, allowed are multiples of the {ranks.size} processes")
    step_of = Step(model, loss_of, o, ranks)
    shared = {k: v for k, v in asdict(o).items() if k not in ("save_every", "keep", "compile")}
    settings = json.loads(json.dumps({"items": count, **shared, **(extra or {})}))  # as a checkpoint gives them back
    last = checkpoint.newest(folder, name)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": 0.0, "since": 0, "best": None}
    if last:
        state = checkpoint.load(last, settings, step_of.model, step_of.ema, step_of.optimizer)
        step_of.loss.fill_(state["loss"])
        if step_of.scaler.is_enabled():
            step_of.scaler.load_state_dict(state["scaler"])
    if ranks.rank == 0:
        recover(folder, OURS)
        checkpoint.rewind_log(folder, name, state["step"])
    since, best, began = state["since"], state["best"], time.monotonic() - state["seconds"]
    board = Board(folder / "tensorboard" / name, state["step"]) if ranks.rank == 0 else None
    log = (folder / "log.jsonl").open("a") if ranks.rank == 0 else None

    def write(row: dict[str, Any], step: int) -> None:
        if log and board:
            finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
            log.write(
                json.dumps({"stage": name, "step": step, **finite, "seconds": round(time.monotonic() - began, 1)})
                + "\n"
            )
            log.flush()
            board.scalars(name, row, step)

    def save(step: int) -> None:
        state = {
            "step": step,
            "seconds": time.monotonic() - began,
            "loss": step_of.total,
            "since": since,
            "best": best,
            "settings": settings,
            "scaler": step_of.scaler.state_dict(),
        }
        if ranks.rank == 0:
            checkpoint.save(folder, name, state, step_of.model, step_of.ema, step_of.optimizer, o.keep)

    def check(step: int) -> None:
        """A row; or the end, before what is not finite reaches a checkpoint."""
        try:
            row = step_of.read(since)
        except FloatingPointError as error:
            bad = int(error.args[0])
            items = next(batches(count, batch_size, o.seed, bad)).tolist()
            raise NotFinite(
                f"{name}: the loss or its gradient is not finite at step {bad}, items {items}; "
                f"last good checkpoint: {checkpoint.newest(folder, name) or 'none yet'}"
            ) from None
        rate = (step - looked[0]) * batch_size / max(time.monotonic() - looked[1], 1e-9)
        write(row | {"lr": o.lr_at(step - 1), "items_per_s": round(rate, 1)}, step)
        bar.set_postfix(
            {k: f"{row[k]:.4g}" for k in ("loss", "grad_norm", "loss_scale") if k in row} | {"items/s": f"{rate:.0f}"}
        )

    order = batches(count, batch_size, o.seed, state["step"], step_of.device)
    quiet = not progress or ranks.rank > 0
    bar = tqdm(
        range(state["step"], o.steps), initial=state["step"], total=o.steps, desc=name, unit="step", disable=quiet
    )
    looked = state["step"], time.monotonic()
    step_of.model.train()
    with bar, _signals() as asked:
        for step in bar:
            step_of(step, next(order))
            since += 1
            done, end = step + 1, step + 1 == o.steps
            saving = done % o.save_every == 0 or end
            # several processes must agree, and have 30 seconds to
            stop = bool(asked) if ranks.size == 1 else (done % ASK_EVERY == 0 or end) and ranks.any(bool(asked))
            if done % READ_EVERY == 0 or end:
                check(done)
                since, looked = 0, (done, time.monotonic())
            elif (saving or stop) and ranks.any(step_of.is_bad):  # else no row: rows stay those of an uninterrupted run
                check(done)
            if saving and validate:
                value = validate(step_of.trained)
                write({"val": value}, done)
                if math.isfinite(value) and (best is None or value < best):
                    best = value
                    if ranks.rank == 0:
                        checkpoint.save_best(folder, name, step_of.trained, done, value)
            if saving or stop:
                save(done)
            if saving and pictures and board:
                board.images(name, pictures(step_of.trained), done)
            step_of.model.train()
            if stop or (end and ranks.any(bool(asked))):
                raise Stopped(
                    f"{name}: stopped by {asked[0] if asked else 'another process'} at step {done}; "
                    f"{checkpoint.newest(folder, name)} goes on from there"
                )
    if ranks.size > 1:
        dist.barrier()
    if best is not None:
        checkpoint.load_best(folder, name, step_of.trained)
    if log and board:
        log.close()
        board.close()
    return step_of.trained.eval()


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that gets the name of SIGTERM or SIGINT when it comes; a second Ctrl-C acts as ever."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        if number == signal.SIGINT:  # a second SIGTERM is common: torchrun passes on what its processes got already
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for s in before:
        signal.signal(s, note)
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
