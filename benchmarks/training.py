"""Training steps of the UNet: our loop beside a plain PyTorch loop of the same maths, eager and compiled, in one interleaved run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor

from sbldm_fast import DDPMScheduler, UNet2D, preset
from sbldm_fast.models import SchedulerConfig
from sbldm_fast.training import Objective, Optimisation
from sbldm_fast.training.loop import Step
from sbldm_fast.training.stages import unet_loss

from .timing import interleaved, machine, summary

# relative, of each loss of the warm-up: float32; in half precision what one of its numbers is rounded by
TOLERANCE = {"off": 1e-4, "fp16": 2.0**-11, "bf16": 2.0**-8}
CHECKED = 5  # steps of the warm-up; three of them warm a graph up
NAMES = {"off": "float32", "fp16": "float16", "bf16": "bfloat16"}
PLAIN = "plain PyTorch float32"


class Loop(NamedTuple):
    """A provider: one training step, the sum of the losses since it was last asked for, the precision, and the plain loop in it."""

    step: Callable[[int, Tensor], None]
    losses: Callable[[], float]
    dtype: str
    plain: str


def bench_training(
    *, preset_name: str = "paper", batch: int = 16, steps: int = 5, rounds: int = 5, compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each provider: seconds of `steps` steps of batch `batch` on random latents; epsilon, AdamW, clipping, EMA, no dropout.

    The model is our UNet in every loop. `plain PyTorch`: F.group_norm, F.silu, torch.randn, mse_loss, torch.optim.AdamW and AveragedModel
    as they come, `loss.item()` each step; and the same with autocast in the machine's half precision, and through torch.compile.
    `sbldm_fast`: the loop of `train`, on CUDA as one graph. All start from the same weights, and in the warm-up get the same noise: a
    provider whose loss is not that of the plain float32 loop has no speed-up.

    Raises:
        ValueError: batch, steps or rounds below 1.
    """
    if min(batch, steps, rounds) < 1:
        raise ValueError(f"batch, steps, rounds: got {batch}, {steps}, {rounds}, allowed is 1 or more")
    p = preset(preset_name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(p.unet, dropout=0.0)
    torch.manual_seed(0)
    weights = UNet2D(config).to(device)
    latents = torch.randn(CHECKED * batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    half = _half(device)
    torch.compiler.reset()
    loops: dict[str, Loop] = {}
    for dtype in ("off", *([half] if half else [])):
        name = NAMES[dtype]
        for through in ("", " torch.compile") if compiled else ("",):
            loops[f"plain PyTorch {name}{through}"] = _plain(copy.deepcopy(weights), latents, p.scheduler, dtype, bool(through))
            loops[f"sbldm_fast {name}{through}"] = _ours(copy.deepcopy(weights), latents, p.scheduler, dtype, bool(through), batch)
    run = datetime.now(UTC).isoformat(timespec="seconds")
    common = {"target": "training", "run": run, "preset": preset_name, "batch": batch, "steps": steps, "device": str(device),
              "shape": [batch, *latents.shape[1:]], "env": machine()}  # fmt: skip
    return [common | row for row in _timed(loops, batch, steps, rounds, device, say)]


def _half(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def _ours(model: UNet2D, latents: Tensor, scheduler: SchedulerConfig, amp: str, compiled: bool, batch: int) -> Loop:
    o = Optimisation(steps=10**6, batch_size=batch, lr=1e-4, ema_decay=0.999, amp=amp, compile=compiled)
    step = Step(model, unet_loss(latents, scheduler, Objective(), o.seed), o)
    model.train()

    def losses() -> float:
        total = step.total
        step.loss.zero_()
        return total

    return Loop(step, losses, amp, f"plain PyTorch {NAMES[amp]}")


def _plain(model: UNet2D, latents: Tensor, scheduler: SchedulerConfig, amp: str, compiled: bool) -> Loop:
    device = latents.device
    o = Optimisation(steps=10**6, batch_size=1, lr=1e-4)
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    ddpm = DDPMScheduler.from_config(scheduler)
    ddpm.alphas_cumprod = ddpm.alphas_cumprod.to(device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    model.train()
    sums = [0.0]

    def step(number: int, index: Tensor) -> None:
        torch.manual_seed(number)
        x0 = latents[index]
        t = torch.randint(scheduler.num_train_timesteps, (len(x0),), device=device)
        # the first steps prove that the maths is the same, so they draw what ours draws
        noise = philox_normal(x0.shape, 0, stream=number, device=device) if number < CHECKED else torch.randn_like(x0)
        autocast: AbstractContextManager[Any] = torch.autocast(device.type, dtype) if dtype else nullcontext()
        with backend("torch"), autocast:
            loss = F.mse_loss(forward(ddpm.add_noise(x0, noise, t), t).float(), noise)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = o.lr_at(number)
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(model)
        sums[0] += loss.item()

    def losses() -> float:
        total, sums[0] = sums[0], 0.0
        return total

    return Loop(step, losses, amp, f"plain PyTorch {NAMES[amp]}")


def _timed(
    loops: dict[str, Loop], batch: int, steps: int, rounds: int, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    order = torch.arange(CHECKED * batch, device=device).roll(1).split(batch)
    curves: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    memory: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, loop in list(loops.items()):
        say(f"warming up: {name}")
        before = _allocated(device)
        start = time.perf_counter()
        try:
            curves[name] = []
            for number in range(CHECKED):
                loop.step(number, order[number % len(order)])
                curves[name].append(loop.losses())
                first.setdefault(name, time.perf_counter() - start)
        except Exception as failure:  # one provider's failure is its row, not the end of the others
            rows.append({"provider": name, "absent": f"failed: {type(failure).__name__}: {str(failure).strip().splitlines()[0][:160]}"})
            del loops[name]
            continue
        memory[name] = _allocated(device, peak=True) - before

    def run(loop: Loop) -> Callable[[], None]:
        def several() -> None:
            for i in range(steps):
                loop.step(CHECKED + i, order[i % len(order)])

        return several

    say(f"timing: {rounds} rounds of {len(loops)} providers, {steps} steps each")
    seconds = interleaved({name: run(loop) for name, loop in loops.items()}, rounds)
    base = summary(seconds[PLAIN])["median_s"] if PLAIN in loops else None
    for name, loop in loops.items():
        s = summary(seconds[name])
        error = _distance(curves[name], curves.get(PLAIN))
        allowed = TOLERANCE[loop.dtype] + 2 * (_distance(curves[loop.plain], curves.get(PLAIN)) if loop.plain in curves else 0.0)
        ms = 1e3 * s["median_s"] / steps
        rows.append(s | {
            "provider": name, "dtype": loop.dtype, "ms_per_step": ms, "items_per_s": 1e3 * batch / ms,
            "minutes_per_100k_steps": ms * 1e5 / 6e4, "first_call_s": first[name],
            "peak_bytes": memory[name] if device.type == "cuda" else None,
            "parity": {"against": PLAIN, "error": error, "allowed": allowed, "ok": error <= allowed},
            "speedup": {"over": PLAIN, "factor": base / s["median_s"]} if base and error <= allowed else None,
        })  # fmt: skip
    return rows


def _allocated(device: torch.device, peak: bool = False) -> float:
    if device.type != "cuda":
        return 0.0
    if peak:
        return float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def _distance(curve: Sequence[float], plain: Sequence[float] | None) -> float:
    """The largest difference of two loss curves, relative to the plain one."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, plain, strict=True)) if plain else math.inf
