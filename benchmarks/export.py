"""Latency of sampling from an exported folder: ONNX Runtime's two loops beside our PyTorch modes, in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sbldm_fast.export import ORTSampler, export
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import DDIMScheduler, FastSampler, UNet2D, preset

from .sampling import Case, timed
from .timing import machine

BASE = "FastSampler eager float32"


def bench_export(
    *, preset_name: str = "paper", steps: int = 50, batches: Sequence[int] = (1, 8), rounds: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each provider and batch: seconds for `batch` latents of `steps` DDIM steps, noise to latent, float32.

    Providers: `FastSampler` eager and compiled, `ORTSampler` in its modes `step` and `sampler` and, approximate and so
    without parity, with wide convolutions in int8, all on the same UNet; where ONNX Runtime has CUDA also `step` as a CUDA graph and with
    fused norms. Each is held against the eager run. The speed-up is over it.

    Raises:
        ValueError: steps, batches or rounds below 1.
    """
    if min(steps, rounds, *batches) < 1:
        raise ValueError(f"steps, batch, rounds: got {steps}, {list(batches)}, {rounds}, allowed is 1 or more")
    p = preset(preset_name)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, scheduler = UNet2D(p.unet).to(device).eval(), DDIMScheduler.from_config(p.scheduler)
    shape = (p.unet.in_channels, p.unet.sample_size, p.unet.sample_size)
    run, rows = datetime.now(UTC).isoformat(timespec="seconds"), []
    for batch in batches:
        say(f"exporting: batch {batch}")
        with tempfile.TemporaryDirectory() as folder:
            noise, out = philox_normal((batch, *shape), 0, device=device), Path(folder)
            for dtype in ("fp32", "int8"):
                export(unet, out / dtype, dtype=dtype, scheduler=scheduler, steps=steps, shape=shape, batch=batch)
            cases = _cases(unet, scheduler, out, noise, steps)
        common = {"target": "export", "run": run, "preset": preset_name, "steps": steps, "batch": batch, "env": machine()}
        made = timed(cases, noise, steps, rounds, say, BASE)
        rows += [common | row | ({"device": "cpu"} if " CPU" in row["provider"] else {}) for row in made]
    return rows


def _cases(unet: UNet2D, scheduler: Any, folder: Path, noise: Tensor, steps: int) -> dict[str, Case]:
    import onnxruntime

    def torch_mode(mode: str) -> Case:
        sampler = FastSampler(unet, scheduler, shape=noise.shape[1:], steps=steps, mode=mode)
        return Case(lambda: sampler(noise=noise), torch.float32, BASE, BASE)

    def graph(options: dict[str, Any], dtype: str = "fp32") -> Case:
        sampler, start = ORTSampler(folder / dtype, **options), noise.cpu()
        return Case(lambda: torch.from_numpy(sampler(noise=start)), torch.float32, BASE, BASE)

    cpu = {"providers": ["CPUExecutionProvider"]}
    cases = {BASE: torch_mode("eager"), "FastSampler compile float32": torch_mode("compile")}
    cases |= {f"ORTSampler {mode} CPU": graph({"mode": mode, **cpu}) for mode in ("step", "sampler")}
    cases["ORTSampler step CPU int8"] = graph({"mode": "step", **cpu}, "int8")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and noise.device.type == "cuda":
        cases |= {f"FastSampler {mode} float32": torch_mode(mode) for mode in ("step-graph", "loop-graph")}
        for title, options in (("step CUDA", {}), ("step CUDA graph", {"cuda_graph": True}), ("step CUDA fused", {"fuse": True})):
            cases[f"ORTSampler {title}"] = graph({"mode": "step", **options})
        cases["ORTSampler sampler CUDA"] = graph({"mode": "sampler"})
    return cases
