"""Latency of sampling from an exported folder: ONNX Runtime's two loops beside our PyTorch modes, in one interleaved
run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sbldm_fast.machine import default_device

from .providers import export_providers
from .rows import Row
from .suite_sampling import bench_sampling


def bench_export(
    *,
    preset_name: str = "paper",
    steps: Sequence[int] = (50,),
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider, batch and number of steps: seconds for `batch` latents of DDIM, noise to latent,
    float32.

    Providers: the textbook's loop, `FastSampler`, and `ORTSampler` on the same UNet in its modes `step` and `sampler`
    and, approximate and so without parity, with wide convolutions in int8; where ONNX Runtime has CUDA also `step` as a
    CUDA graph and with fused norms. The speed-up is over the textbook's loop.

    Raises:
        ValueError: steps, batches or rounds below 1.
    """
    who = list(export_providers(default_device(), compiled))
    options = {"preset_name": preset_name, "steps": steps, "batches": batches, "rounds": rounds, "say": say}
    yield from bench_sampling(**options, who=who, target="export", base="reference")  # type: ignore[arg-type]
