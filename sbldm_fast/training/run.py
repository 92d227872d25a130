"""The training of a stage: log, validation, checkpoints and signals, so that nothing is lost.

A run that was cut off and goes on is the uninterrupted run, to the bit on a CPU: all randomness of a step is a function
of the seed and of the step's number.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.errors import NotFinite
from sbldm_fast.files import recover

from . import checkpoint
from .board import Board
from .config import TrainConfig
from .ranks import Ranks
from .step import LossOf, Step

OURS = r"checkpoint-\w+-\d{8}|best-\w+|latents[\w.-]*|log\.jsonl|pipeline"  # what a run writes to its folder
VALIDATION = 512  # slices or latents that the validation loss is taken on, at most
SHOWN = 8  # images in a grid
READ_EVERY = 50  # steps between two readings of the device
ASK_EVERY = 10  # steps between two agreements of several processes on a signal


class Stopped(Exception):
    """A signal asked for an end; the text names the checkpoint that was written."""


@dataclass(frozen=True)
class Stage:
    """What is trained.

    Args:
        name: of its checkpoints and of its rows in the log.
        model: trained in place.
        loss_of: as of `Step`.
        items: how many items there are to train on.
        validate: gives the validation loss of the model to keep, at each checkpoint.
        pictures: gives images `[N, 1, H, W]` in [-1, 1] for TensorBoard, at each checkpoint.
        settings: what a resumed run must share with its checkpoint, beside the `TrainConfig`.
    """

    name: str
    model: nn.Module
    loss_of: LossOf
    items: int
    validate: Callable[[nn.Module], float] | None = None
    pictures: Callable[[nn.Module], dict[str, Tensor]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What the stages of a run share: its folder, its processes, settings that a resumed run must have, the bar."""

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    settings: dict[str, Any] = field(default_factory=dict)
    progress: bool = True


def train(stage: Stage, config: TrainConfig, context: Context) -> nn.Module:
    """Train from the newest `checkpoint-<name>-<step>` of the folder on; return the EMA, or the model without one.

    With `stage.validate` the result is that of the checkpoint with the lowest value, `best-<name>`. SIGTERM and Ctrl-C
    end the run after a checkpoint.

    Raises:
        UserError: a checkpoint of another model, of other settings or of another number of items.
        NotFinite: a loss or gradient that is not finite, with the step, the items and the last good checkpoint.
        Stopped: on a signal.
    """
    run = Run(stage, config, context)
    try:
        run.train()
    finally:
        run.close()
    return run.load_best().eval()


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


class Run:
    """A stage in training: how far it is, and what it writes to its folder."""

    def __init__(self, stage: Stage, config: TrainConfig, context: Context) -> None:
        self.stage, self.config, self.folder, self.ranks = stage, config, context.folder, context.ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        self.batch_size = min(config.batch_size, stage.items)
        self.ranks.check_batch_size(self.batch_size)
        self.step = Step(stage.model, stage.loss_of, config, self.ranks)
        shared = {k: v for k, v in asdict(config).items() if k not in ("save_every", "keep", "compile")}
        settings = {"items": stage.items, **shared, **stage.settings, **context.settings}
        self.settings = json.loads(json.dumps(settings))  # as a checkpoint gives them back
        self.done, self.unread, self.began = 0, 0, time.monotonic()
        self.best: float | None = None
        self._resume()
        self.read_at = self.done, time.monotonic()
        self.quiet = not context.progress or self.ranks.rank > 0
        self.board = self.log = None
        if self.ranks.rank == 0:
            recover(self.folder, OURS)
            checkpoint.rewind_log(self.folder, stage.name, self.done)
            self.board = Board(self.folder / "tensorboard" / stage.name, self.done)
            self.log = (self.folder / "log.jsonl").open("a")

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = checkpoint.newest(self.folder, self.stage.name)
        if newest is None:
            return
        state = checkpoint.load(newest, self.settings, self.step.model, self.step.ema, self.step.optimizer)
        self.done, self.unread, self.best = state["step"], state["since"], state["best"]
        self.began -= state["seconds"]
        self.step.loss.fill_(state["loss"])
        if self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])

    def train(self) -> None:
        """Take the steps that are left; see the function `train`."""
        steps, start = self.config.steps, self.done
        order = batches(self.stage.items, self.batch_size, self.config.seed, start, self.step.device)
        bar = tqdm(range(start, steps), self.stage.name, steps, initial=start, unit="step", disable=self.quiet)
        self.step.model.train()
        with bar, _signals() as signals:
            for number in bar:
                self.step(number, next(order))
                self.done, self.unread = number + 1, self.unread + 1
                last = self.done == steps
                saving = last or self.done % self.config.save_every == 0
                stop = self._agree_to_stop(signals, last)
                if last or self.done % READ_EVERY == 0:
                    self._report(bar)
                    self.unread, self.read_at = 0, (self.done, time.monotonic())
                elif (saving or stop) and self.ranks.any(self.step.is_bad):
                    # A good step has no row here, so that the log equals that of an uninterrupted run.
                    self._report(bar)
                if saving:
                    self._validate()
                if saving or stop:
                    self._save()
                if saving and self.stage.pictures and self.board:
                    self.board.images(self.stage.name, self.stage.pictures(self.step.trained), self.done)
                self.step.model.train()
                if stop or (last and self.ranks.any(bool(signals))):
                    raise Stopped(
                        f"{self.stage.name}: stopped by {signals[0] if signals else 'another process'} at step"
                        f" {self.done}; {checkpoint.newest(self.folder, self.stage.name)} goes on from there"
                    )
        if self.ranks.size > 1:
            dist.barrier()

    def _agree_to_stop(self, signals: list[str], last: bool) -> bool:
        """Whether a process got a signal. Several processes must agree, and have 30 seconds to."""
        if self.ranks.size == 1:
            return bool(signals)
        return (last or self.done % ASK_EVERY == 0) and self.ranks.any(bool(signals))

    def _report(self, bar: Any) -> None:
        """Log what the steps left on the device, or end before what is not finite reaches a checkpoint."""
        try:
            row = self.step.read(self.unread)
        except NotFinite as error:
            bad = int(error.args[0])
            items = next(batches(self.stage.items, self.batch_size, self.config.seed, bad)).tolist()
            raise NotFinite(
                f"{self.stage.name}: the loss or its gradient is not finite at step {bad}, items {items}; "
                f"last good checkpoint: {checkpoint.newest(self.folder, self.stage.name) or 'none yet'}"
            ) from None
        step, moment = self.read_at
        rate = (self.done - step) * self.batch_size / max(time.monotonic() - moment, 1e-9)
        self._write(row | {"lr": self.config.lr_at(self.done - 1), "items_per_s": round(rate, 1)})
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "grad_norm", "loss_scale") if k in row}
        bar.set_postfix(shown | {"items/s": f"{rate:.0f}"})

    def _write(self, row: dict[str, float]) -> None:
        if self.log and self.board:
            finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
            seconds = round(time.monotonic() - self.began, 1)
            line = {"stage": self.stage.name, "step": self.done, **finite, "seconds": seconds}
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
            self.board.scalars(self.stage.name, row, self.done)

    def _validate(self) -> None:
        """Log the validation loss, and keep the weights with the lowest."""
        if self.stage.validate is None:
            return
        value = self.stage.validate(self.step.trained)
        self._write({"val": value})
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best = value
            if self.ranks.rank == 0:
                checkpoint.save_best(self.folder, self.stage.name, self.step.trained, self.done, value)

    def _save(self) -> None:
        state = {
            "step": self.done,
            "seconds": time.monotonic() - self.began,
            "loss": self.step.total,
            "since": self.unread,
            "best": self.best,
            "settings": self.settings,
            "scaler": self.step.scaler.state_dict(),
        }
        if self.ranks.rank == 0:
            step = self.step
            checkpoint.save(self.folder, self.stage.name, state, step.model, step.ema, step.optimizer, self.config.keep)

    def load_best(self) -> nn.Module:
        """The model to keep, with the weights of the lowest validation loss where there was a validation."""
        if self.best is not None:
            checkpoint.load_best(self.folder, self.stage.name, self.step.trained)
        return self.step.trained

    def close(self) -> None:
        """Close the log and TensorBoard's files."""
        if self.log and self.board:
            self.log.close()
            self.board.close()


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that gets the name of SIGTERM or SIGINT when it comes; a second Ctrl-C acts as ever."""
    signals: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: FrameType | None) -> None:
        signals.append(signal.Signals(number).name)
        if number == signal.SIGINT:  # a second SIGTERM is common: torchrun passes on what its processes got already
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for s in before:
        signal.signal(s, note)
    try:
        yield signals
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
