"""Latency of sampling: our reference, our modes, and diffusers with a UNet of the same size, in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler, FastSampler, UNet2D, preset
from sbldm_fast.models import UNetConfig
from sbldm_fast.training.loop import amp_dtype

from .timing import interleaved, machine, summary

TOLERANCE = 1e-4  # float32, relative to the largest value, after all steps
PEER = "diffusers"


def bench_sampling(
    *, preset_name: str = "paper", steps: int = 50, batches: Sequence[int] = (1, 8), rounds: int = 5, modes: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each provider and batch: seconds for `batch` latents of `steps` DDIM steps, noise to latent.

    Providers: `reference` (UNet and scheduler stepped as in a textbook), `FastSampler` in each mode that this machine has, in
    float32 and in its native half precision, diffusers' own UNet2DModel and DDIMScheduler in diffusers' own loop, that loop
    with the UNet through torch.compile, and the same diffusers objects under `FastSampler`. Each row holds its error against
    its own float32 reference and gets no speed-up where that is too large. A provider that is absent is a row that says why.

    Raises:
        ValueError: steps, batches or rounds below 1.
    """
    if min(steps, rounds, *batches) < 1:
        raise ValueError(f"steps, batch, rounds: got {steps}, {list(batches)}, {rounds}, allowed is 1 or more")
    p = preset(preset_name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = modes or (("eager", "compile", "step-graph", "loop-graph") if device.type == "cuda" else ("eager", "compile"))
    torch.manual_seed(0)
    unet = UNet2D(p.unet).to(device).eval()
    scheduler = DDIMScheduler.from_config(p.scheduler)
    shape = (p.unet.in_channels, p.unet.sample_size, p.unet.sample_size)
    peer, absence = _diffusers(p.unet, p.scheduler.to_dict(), device)
    noises = [philox_normal((batch, *shape), 0, device=device) for batch in batches]
    return [row for noise in noises for row in _one_batch(noise, unet, scheduler, peer, absence, preset_name, steps, rounds, modes, say)]


def _one_batch(
    noise: Tensor, unet: UNet2D, scheduler: DDIMScheduler, peer: tuple[nn.Module, Any] | None, absence: str,
    preset_name: str, steps: int, rounds: int, modes: Sequence[str], say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    batch, device, half = noise.shape[0], noise.device, amp_dtype("auto", noise.device)
    # name: what runs, in which precision, and whose output it must equal
    cases: dict[str, tuple[Callable[[], Tensor], torch.dtype, str]] = {
        "reference": (lambda: stepped(unet, scheduler, steps, noise), torch.float32, "reference")
    }

    def add(name: str, model: nn.Module, sched: Any, mode: str, dtype: torch.dtype, against: str) -> None:
        sampler = FastSampler(model, sched, shape=noise.shape[1:], steps=steps, mode=mode, dtype=dtype)
        cases[name] = (lambda: sampler(noise=noise), dtype, against)

    for dtype in (torch.float32, half):
        for mode in modes if dtype else ():
            add(f"FastSampler {mode} {str(dtype)[6:]}", unet, scheduler, mode, dtype or torch.float32, "reference")
    if peer is not None:
        model, sched = peer
        compiled = torch.compile(model, dynamic=False)
        cases[PEER] = (lambda: stepped(lambda x, t: model(x, t).sample, sched, steps, noise), torch.float32, PEER)
        cases[f"{PEER} torch.compile"] = (
            lambda: stepped(lambda x, t: compiled(x, t, return_dict=False)[0], sched, steps, noise),
            torch.float32,
            PEER,
        )
        add(f"{PEER} under FastSampler {modes[-1]}", model, sched, modes[-1], torch.float32, PEER)

    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for name, (run, _, _) in cases.items():
        say(f"warming up: batch {batch}, {name}")
        start = time.perf_counter()
        with torch.no_grad():
            outputs[name] = run().float().cpu()
        first[name] = time.perf_counter() - start
    allowed = {torch.float32: TOLERANCE}
    if half is not None:
        # the three-way rule: twice what the plain loop in that precision loses
        with backend("torch"):
            plain = FastSampler(unet, scheduler, shape=noise.shape[1:], steps=steps, mode="eager", dtype=half)(noise=noise)
        allowed[half] = 2 * _relative(plain.float().cpu(), outputs["reference"]) + TOLERANCE

    say(f"timing: batch {batch}, {rounds} rounds of {len(cases)} providers")
    with torch.no_grad():
        seconds = interleaved({name: run for name, (run, _, _) in cases.items()}, rounds)
    common = {"target": "sampling", "preset": preset_name, "steps": steps, "batch": batch, "device": str(device), "env": machine()}
    base = summary(seconds[PEER])["median_s"] if peer is not None else None
    rows: list[dict[str, Any]] = []
    for name, (_, dtype, against) in cases.items():
        s = summary(seconds[name])
        error = _relative(outputs[name], outputs[against])
        ok = error <= allowed[dtype]
        rows.append(
            common
            | s
            | {
                "provider": name,
                "shape": list(noise.shape),
                "dtype": str(dtype)[6:],
                "ms_per_step": 1e3 * s["median_s"] / steps,
                "ms_per_image": 1e3 * s["median_s"] / batch,
                "first_call_s": first[name],
                "parity": {"against": against, "error": error, "allowed": allowed[dtype], "ok": ok},
                "speedup": {"over": PEER, "factor": base / s["median_s"]} if base and ok else None,
            }
        )
    if peer is None:
        rows.append(common | {"provider": PEER, "absent": absence})
    return rows


def stepped(model: Callable[[Tensor, Tensor], Tensor], scheduler: Any, steps: int, noise: Tensor) -> Tensor:
    """The textbook loop: the model, then `scheduler.step`, for each timestep."""
    scheduler.set_timesteps(steps, device=noise.device)
    x: Tensor = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _diffusers(c: UNetConfig, scheduler: dict[str, Any], device: torch.device) -> tuple[tuple[nn.Module, Any] | None, str]:
    """diffusers' UNet2DModel of the same widths, blocks and attention, and its DDIMScheduler on the same betas."""
    try:
        import diffusers
    except ImportError as error:
        return None, f"diffusers is not installed ({error})"
    attends = [c.sample_size >> i in c.attention_resolutions for i in range(len(c.block_out_channels))]
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=c.sample_size, in_channels=c.in_channels, out_channels=c.out_channels, layers_per_block=c.layers_per_block,
        block_out_channels=c.block_out_channels, norm_num_groups=c.norm_num_groups, attention_head_dim=c.attention_head_dim,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    )  # fmt: skip
    own = DDIMScheduler(**{k: v for k, v in scheduler.items() if not k.startswith("_")})
    sched = diffusers.DDIMScheduler(
        trained_betas=own.betas.numpy(), clip_sample=own.config.clip_sample, prediction_type=own.config.prediction_type
    )
    return (model.to(device).eval(), sched), ""
