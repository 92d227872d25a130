"""Latency of sampling from an exported folder: ONNX Runtime's two loops beside our PyTorch modes, in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sbldm_fast.export import ORTSampler, export

from .harness import Absent, Case, Output, measure
from .providers import FLOAT, TOLERANCE, Ours, Problem
from .rows import Row, head
from .sampling import per_image

BASE = "FastSampler eager float32"


def bench_export(
    *, preset_name: str = "paper", steps: int = 50, batches: Sequence[int] = (1, 8), rounds: int = 5, compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:  # fmt: skip
    """One row for each provider and batch: seconds for `batch` latents of `steps` DDIM steps, noise to latent, float32.

    Providers: `FastSampler`, and `ORTSampler` on the same UNet in its modes `step` and `sampler` and, approximate and so without parity,
    with wide convolutions in int8; where ONNX Runtime has CUDA also `step` as a CUDA graph and with fused norms. Each is held against
    the eager run. The speed-up is over it.

    Raises:
        ValueError: steps, batches or rounds below 1.
    """
    if min(steps, rounds, *batches) < 1:
        raise ValueError(f"steps, batch, rounds: got {steps}, {list(batches)}, {rounds}, allowed is 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for batch in batches:
        say(f"exporting: batch {batch}")
        with tempfile.TemporaryDirectory() as folder:
            problem = Problem(preset_name, steps, batch, device)
            cases = export_cases(problem, Path(folder), compiled)
            common = head("export", preset=preset_name, steps=steps, batch=batch, shape=list(problem.noise.shape), device=str(device))
            for row in measure(cases, rounds=rounds, base=BASE, device=device, say=say):
                on = {"device": "cpu"} if " CPU" in row["provider"] else {}
                # int8 is another function, by design: not to agree is no failure of it
                yield common | row | per_image(row, steps, batch) | on | ({"approximate": True} if "int8" in row["provider"] else {})


def export_cases(p: Problem, folder: Path, compiled: bool) -> dict[str, Case]:
    """The providers of the suite; graphs are written to `folder` when they are first needed."""
    unet, scheduler = p.ours
    shape = (p.noise.shape[1], p.noise.shape[2], p.noise.shape[3])

    def ort(dtype: str = "fp32", /, **options: Any) -> Case:
        def build() -> Output:
            import onnxruntime

            wanted = options.get("providers", ["CUDAExecutionProvider"])[0]
            if wanted not in onnxruntime.get_available_providers() or (wanted[:4] == "CUDA" and p.device.type != "cuda"):
                raise Absent(f"this ONNX Runtime has no {wanted} here")
            if not (folder / dtype).exists():
                export(
                    unet,
                    folder / dtype,
                    dtype=dtype,
                    scheduler=scheduler,
                    steps=p.steps,
                    shape=shape,
                    batch=len(p.noise),
                )
            sampler, start = ORTSampler(folder / dtype, **options), p.noise.cpu()
            return lambda: torch.from_numpy(sampler(noise=start))

        return Case(build, BASE, TOLERANCE)

    modes = ["eager", *["compile"] * compiled, *["step-graph", "loop-graph"] * (p.device.type == "cuda")]
    ours = [Ours(FLOAT, mode=mode) for mode in modes]
    cpu: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
    cases = {one.name: Case(lambda one=one: one.build(p), BASE, TOLERANCE) for one in ours}  # type: ignore[misc]  # mypy cannot type a default in a lambda
    cases |= {f"ORTSampler {mode} CPU": ort(mode=mode, **cpu) for mode in ("step", "sampler")}
    cases["ORTSampler step CPU int8"] = ort("int8", mode="step", **cpu)
    cases["ORTSampler step CUDA"] = ort(mode="step")
    cases["ORTSampler step CUDA graph"] = ort(mode="step", cuda_graph=True)
    cases["ORTSampler step CUDA fused"] = ort(mode="step", fuse=True)
    cases["ORTSampler sampler CUDA"] = ort(mode="sampler")
    return cases
