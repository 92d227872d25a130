"""Latency of sampling: our reference, our modes, diffusers, MONAI and the runtimes for CPUs, in one interleaved run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device, native_half

from .counts import step_work
from .harness import Timing, interrupted, measure
from .providers import FLOAT, Ours, Provider, Reference, brief_providers, providers
from .rows import Row, head
from .setup import SamplingSetup

BASE = "diffusers"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bench_sampling(
    *,
    preset_name: str = "paper",
    steps: Sequence[int] = (50,),
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    seconds: float = math.inf,
    compiled: bool = True,
    dtypes: Sequence[str] = (),
    short: bool = False,
    energy: bool = False,
    who: Sequence[Provider] | None = None,
    target: str = "sampling",
    base: str = BASE,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider, batch and number of steps: seconds for `batch` latents of DDIM, noise to latent.

    The providers are those of `providers` (or `who`), in `dtypes` (none: float32 and the machine's native half
    precision); without `compiled` those that compile nothing; with `short` those of `brief_providers`, which also
    decode; with `energy` the joules of a run on CUDA. The speed-up is over `base`, eager float32 diffusers, or where it
    is not installed over our textbook loop. `seconds`: after which a problem's rounds end.

    Raises:
        ValueError: steps, batches or rounds below 1, or an unknown dtype.
    """
    if set(dtypes) - set(DTYPES):
        raise UserError(f"dtypes: got {', '.join(dtypes)}, allowed are {', '.join(DTYPES)}")
    if min(rounds, *steps, *batches) < 1:
        raise UserError(f"steps, batch, rounds: got {list(steps)}, {list(batches)}, {rounds}, allowed is 1 or more")
    device = default_device()
    native = native_half(device)
    # float32 is always there: the others are held against it
    precisions = list(dict.fromkeys((FLOAT, *([DTYPES[name] for name in dtypes] or ([native] if native else [])))))
    listed = brief_providers if short else providers
    who = list(who or listed(device, precisions, compiled))
    base = base if importlib.util.find_spec(base) else "reference"
    for count, size in ((s, b) for s in steps for b in batches):
        # Dynamo counts versions of a function over the whole process; each problem starts afresh
        torch.compiler.reset()
        setup = SamplingSetup(preset_name, count, size, device)
        what = {"preset": preset_name, "steps": count, "batch": size}
        common = head(target, **what, shape=list(setup.noise.shape), device=str(device))
        say(f"{count} steps, batch {size}")
        cases, timing = {p.name: p.case(setup) for p in who}, Timing(rounds, seconds, energy=energy)
        rows = measure(cases, timing, base=base, device=device, say=say)
        common["parameters"] = setup.parameters()
        yield from (common | row for row in _with_figures(rows, who, preset_name, count, size))
        if interrupted(rows):
            return


def _with_figures(rows: Sequence[Row], who: Sequence[Provider], preset: str, steps: int, batch: int) -> Iterator[Row]:
    """The rows with the figures of an image, and of our loops what a step does."""
    images = Reference(images=True).name
    seconds = next((r["median_s"] for r in rows if r["provider"] == images and "median_s" in r), None)
    by_name = {provider.name: provider for provider in who}
    for row in rows:
        provider = by_name[row["provider"]]
        if row.get("speedup") and row["decodes"]:  # decoding is in both
            row["speedup"] = seconds and {"over": images, "factor": seconds / row["median_s"]}
        counted = provider.family == "ours" and isinstance(provider, Ours) and not provider.images
        work = {"work": step_work(preset, batch, provider.dtype)} if counted and "median_s" in row else {}
        yield row | per_image(row, steps, batch) | work


def per_image(row: Row, steps: int, batch: int) -> Row:
    """The figures that people ask for, from the median."""
    if "median_s" not in row:
        return {}
    s = row["median_s"]
    return {"ms_per_step": 1e3 * s / steps, "ms_per_image": 1e3 * s / batch, "images_per_s": batch / s}
