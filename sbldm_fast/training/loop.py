"""What both training stages share: precision, learning rate, EMA, checkpoints, the loop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.models.weights import load_tensors, read_tensors, write_tensors

AMP = ("auto", "off", "fp16", "bf16")


@dataclass(frozen=True)
class Optimisation:
    """How one stage is trained. Defaults of the stages: paper 001 section III.B."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    weight_decay: float = 1e-5
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0: no EMA
    save_every: int = 1000
    seed: int = 0
    amp: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, allowed is 1 or more")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, allowed is 1 or more")
        if self.amp not in AMP:
            raise ValueError(f"amp: got {self.amp!r}, allowed are {', '.join(AMP)}")

    def lr_at(self, step: int) -> float:
        """Linear warmup, then a cosine to zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * self.lr * (1 + math.cos(math.pi * done))


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that `name` means on `device`: bf16 where it is native, else fp16 on CUDA, else none."""
    if name != "auto":
        return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def batches(count: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Index batches from step `start` on: a fresh permutation each epoch, a function of the seed and the step alone."""
    per_epoch = max(1, count // batch_size)
    step = start
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
        order = torch.randperm(count, generator=generator)
        for i in range(step % per_epoch, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
            step += 1


def train(
    model: nn.Module, loss_of: Callable[[nn.Module, Tensor, int], tuple[Tensor, dict[str, float]]], count: int, o: Optimisation,
    folder: Path, *, name: str, progress: bool = True,
) -> nn.Module:  # fmt: skip
    """Train `model` for `o.steps` steps, continuing from the newest `folder/checkpoint-<name>-<step>`; return the EMA (or `model`).

    `loss_of(model, index, step)` gives the loss of the training items `index` and scalars to log. All randomness of a step
    comes from the seed and the step's number, so a resumed run repeats an uninterrupted one to the bit.

    Raises:
        ValueError: a checkpoint of another model, of other settings or of another number of items.
        FloatingPointError: a loss that is not finite, with the step, the items and the last good checkpoint.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_ema_update(o.ema_decay)) if o.ema_decay else None
    dtype = amp_dtype(o.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    settings = {"items": count, **{k: v for k, v in asdict(o).items() if k not in ("save_every", "compile")}}
    last = _newest(folder, name)
    start, seconds = _resume(last, settings, model, ema, optimizer, scaler) if last else (0, 0.0)
    if o.compile:
        model.compile()
    model.train()
    log = folder / "log.jsonl"
    began = time.monotonic() - seconds
    order = batches(count, o.batch_size, o.seed, start)
    bar = tqdm(range(start, o.steps), initial=start, total=o.steps, desc=name, unit="step", disable=not progress)
    recent: list[float] = []
    for step in bar:
        index = next(order)
        torch.manual_seed(o.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = o.lr_at(step)
        autocast: AbstractContextManager[Any] = torch.autocast(device.type, dtype) if dtype else nullcontext()
        with autocast:
            loss, scalars = loss_of(model, index, step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name}: the loss is {value} at step {step}, items {index.tolist()}; "
                f"last good checkpoint: {_newest(folder, name) or 'none yet'}"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm))
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.update_parameters(model)
        recent.append(value)
        if (step + 1) % 50 == 0 or step + 1 == o.steps:
            row = {"stage": name, "step": step + 1, "loss": sum(recent) / len(recent), "grad_norm": norm, **scalars,
                   "lr": o.lr_at(step), "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
            with log.open("a") as f:
                f.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            recent.clear()
        if (step + 1) % o.save_every == 0 or step + 1 == o.steps:
            state = {"step": step + 1, "seconds": round(time.monotonic() - began, 1), "settings": settings}
            last = _newest(folder, name)
            _save(folder / f"checkpoint-{name}-{step + 1:08d}", state, model, ema, optimizer, scaler)
            if last:
                shutil.rmtree(last)  # only now: a process that is killed at any point leaves a whole checkpoint
    trained: nn.Module = ema.module if ema is not None else model
    return trained.eval()


def _ema_update(decay: float) -> Callable[[Any, Any, Any], None]:
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        # a young average forgets faster, so that a short run is not an average with its random start
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - keep)

    return update


def _newest(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"checkpoint-{name}-*"), default=None)


def _save(
    path: Path, state: dict[str, Any], model: nn.Module, ema: nn.Module | None,
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
) -> None:  # fmt: skip
    moments = {f"{i}.{key}": value.contiguous() for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    with whole_folder(path) as folder:
        write_tensors({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        write_tensors(moments, folder / "optimizer.safetensors")
        if ema is not None:
            write_tensors({k: v.clone().contiguous() for k, v in ema.state_dict().items()}, folder / "ema.safetensors")
        write_json(folder / "state.json", {**state, "scaler": scaler.state_dict()})


def _resume(
    path: Path, settings: dict[str, Any], model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, float]:  # fmt: skip
    state = read_json(path / "state.json")
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise ValueError(f"{key}: got {value}, but {path} was made with {state['settings'].get(key)}; use that or another run folder")
    load_tensors(model, read_tensors(path / "model.safetensors"), str(path))
    if ema is not None:
        load_tensors(ema, read_tensors(path / "ema.safetensors"), str(path))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(path / "optimizer.safetensors").items():
        index, _, what = key.partition(".")
        moments.setdefault(int(index), {})[what] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return int(state["step"]), float(state["seconds"])
