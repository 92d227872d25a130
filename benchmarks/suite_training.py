"""Training steps of the UNet: our loop beside a plain PyTorch loop of the same maths, eager and compiled, in one
interleaved run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor

from sbldm_fast import DDPMScheduler, UNet2D, preset
from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device, native_half
from sbldm_fast.models import SchedulerConfig
from sbldm_fast.training import Objective, TrainConfig
from sbldm_fast.training.stages import unet_loss
from sbldm_fast.training.step import Step

from .harness import Case, Timing, measure
from .rows import Row, head
from .timing import Output

# relative, of each loss of the warm-up: float32; in half precision what one of its numbers is rounded by
TOLERANCE = {"off": 1e-4, "fp16": 2.0**-11, "bf16": 2.0**-8}
CHECKED = 5  # steps of the warm-up; three of them warm a graph up
AMP = {"float32": "off", "float16": "fp16", "bfloat16": "bf16"}
NAMES = {v: k for k, v in AMP.items()}
PLAIN = "plain PyTorch float32"


def bench_training(
    *,
    preset_name: str = "paper",
    batch: int = 16,
    steps: int = 5,
    rounds: int = 7,
    seconds: float = math.inf,
    compiled: bool = True,
    dtypes: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider: seconds of `steps` steps of batch `batch` on random latents; what the preset
    predicts, AdamW, clipping, EMA, no dropout.

    The model is our UNet in every loop. `plain PyTorch`: F.group_norm, F.silu, torch.randn, mse_loss, torch.optim.AdamW
    and AveragedModel as they come, `loss.item()` each step; and the same through torch.compile, each in `dtypes` of
    autocast (none: float32 and the machine's native half precision). `sbldm_fast`: the loop of `train`, on CUDA as one
    graph, and beside it uncaptured. All start from the same weights, and in the warm-up get the same noise: a provider
    whose loss is not that of the plain float32 loop has no speed-up.

    Raises:
        ValueError: batch, steps or rounds below 1, or an unknown dtype.
    """
    if set(dtypes) - set(AMP):
        raise UserError(f"dtypes: got {', '.join(dtypes)}, allowed are {', '.join(AMP)}")
    if min(batch, steps, rounds) < 1:
        raise UserError(f"batch, steps, rounds: got {batch}, {steps}, {rounds}, allowed is 1 or more")
    device = default_device()
    torch.compiler.reset()
    half = native_half(device)
    # float32 is always there: the others are held against it
    precisions = list(
        dict.fromkeys(("off", *([AMP[name] for name in dtypes] or ([AMP[str(half)[6:]]] if half else []))))
    )
    cases, c = training_cases(preset_name, batch, steps, device, compiled, precisions), preset(preset_name).unet
    shape = [batch, *c.shape]
    common = head("training", preset=preset_name, batch=batch, steps=steps, device=str(device), shape=shape)
    for row in measure(cases, Timing(rounds, seconds), base=PLAIN, device=device, say=say):
        ms = 1e3 * row["median_s"] / steps if "median_s" in row else None
        yield (
            common
            | row
            | (
                {"ms_per_step": ms, "items_per_s": 1e3 * batch / ms, "minutes_per_100k_steps": ms * 1e5 / 6e4}
                if ms
                else {}
            )
        )


def training_cases(
    preset_name: str, batch: int, steps: int, device: torch.device, compiled: bool, precisions: Sequence[str] = ("off",)
) -> dict[str, Case]:
    """The loops on random latents, each from the same weights."""
    p = preset(preset_name)
    config = replace(p.unet, dropout=0.0)
    torch.manual_seed(0)
    weights = UNet2D(config).to(device)
    latents = torch.randn(CHECKED * batch, *config.shape, device=device)
    order = torch.arange(CHECKED * batch, device=device).roll(1).split(batch)
    cases: dict[str, Case] = {}
    for dtype in precisions:
        for through in ("", " torch.compile") if compiled else ("",):
            makers = {"plain PyTorch": _plain, "sbldm_fast": _ours}
            if device.type == "cuda" and not through:
                makers["sbldm_fast eager"] = _ours_eager
            for who, make in makers.items():
                loop = Loop(make, weights, latents, p.scheduler, dtype, bool(through), order, steps)
                plain = f"plain PyTorch {NAMES[dtype]}"
                about = {"family": "reference" if make is _plain else "ours", "prepares": bool(through)}
                cases[f"{who} {NAMES[dtype]}{through}"] = Case(
                    loop.build, PLAIN, TOLERANCE[dtype], plain, loop.curve, NAMES[dtype], about=about
                )
    return cases


class Loop:
    """A provider: a training step with its own copy of the weights, its first losses, and what is timed."""

    def __init__(
        self,
        make: Callable[..., tuple[Callable[[int, Tensor], None], Callable[[], float]]],
        weights: UNet2D,
        latents: Tensor,
        scheduler: SchedulerConfig,
        amp: str,
        compiled: bool,
        order: tuple[Tensor, ...],
        steps: int,
    ) -> None:
        self.make = lambda: make(copy.deepcopy(weights), latents, scheduler, amp, compiled, len(order[0]))
        self.order, self.steps = order, steps

    def build(self) -> Output:
        """`steps` training steps."""
        self.step, self.losses = self.make()

        def several() -> None:
            for i in range(self.steps):
                self.step(CHECKED + i, self.order[i % len(self.order)])

        return several

    def curve(self) -> list[Tensor]:
        """The losses of the first steps, each relative to itself."""
        found = []
        for number in range(CHECKED):
            self.step(number, self.order[number % len(self.order)])
            found.append(torch.tensor(self.losses()))
        return found


def _ours(model: UNet2D, latents: Tensor, scheduler: SchedulerConfig, amp: str, compiled: bool, batch: int) -> Any:
    o = TrainConfig(steps=10**6, batch_size=batch, lr=1e-4, ema_decay=0.999, amp=amp, compile=compiled)
    step = Step(model, unet_loss(latents, scheduler, Objective(), o.seed), o)
    model.train()

    def losses() -> float:
        total = step.total
        step.loss.zero_()
        return total

    return step, losses


def _ours_eager(
    model: UNet2D, latents: Tensor, scheduler: SchedulerConfig, amp: str, compiled: bool, batch: int
) -> Any:
    step, losses = _ours(model, latents, scheduler, amp, compiled, batch)
    step.run = step._work  # what is captured elsewhere
    return step, losses


def _plain(model: UNet2D, latents: Tensor, scheduler: SchedulerConfig, amp: str, compiled: bool, batch: int) -> Any:
    device = latents.device
    o = TrainConfig(steps=10**6, batch_size=1, lr=1e-4)
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
            target = ddpm.get_velocity(x0, noise, t) if scheduler.prediction_type == "v_prediction" else noise
            loss = F.mse_loss(forward(ddpm.add_noise(x0, noise, t), t).float(), target)
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

    return step, losses
