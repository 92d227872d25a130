"""Latency of sampling: our reference, our modes, diffusers, MONAI and the runtimes for CPUs, in one interleaved run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from sbldm_fast.errors import UserError
from sbldm_fast.machine import native_half

from .counts import step_work
from .harness import interrupted, measure
from .providers import FLOAT, Ours, Provider, Reference, brief, providers
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
    precision); without `compiled` those that compile nothing; with `short` those of `brief`, which also decode; with
    `energy` the joules of a run on CUDA. The speed-up is over `base`, eager float32 diffusers, or where it is not
    installed over our textbook loop. `seconds`: after which a problem's rounds end.

    Raises:
        ValueError: steps, batches or rounds below 1, or an unknown dtype.
    """
    if set(dtypes) - set(DTYPES):
        raise UserError(f"dtypes: got {', '.join(dtypes)}, allowed are {', '.join(DTYPES)}")
    if min(rounds, *steps, *batches) < 1:
        raise UserError(f"steps, batch, rounds: got {list(steps)}, {list(batches)}, {rounds}, allowed is 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = native_half(device)
    # float32 is always there: the others are held against it
    precisions = list(dict.fromkeys((FLOAT, *([DTYPES[name] for name in dtypes] or ([native] if native else [])))))
    who = list(who or (brief(device, precisions, compiled) if short else providers(device, precisions, compiled)))
    base = base if importlib.util.find_spec(base) else "reference"
    for count, batch in ((s, b) for s in steps for b in batches):
        # Dynamo counts versions of a function over the whole process; each problem starts afresh
        torch.compiler.reset()
        problem = SamplingSetup(preset_name, count, batch, device)
        common = head(
            target, preset=preset_name, steps=count, batch=batch, shape=list(problem.noise.shape), device=str(device)
        )
        cases = {p.name: p.case(problem) for p in who}
        works = {
            p.name: {"work": step_work(preset_name, batch, p.dtype)}
            for p in who
            if p.family == "ours" and isinstance(p, Ours) and not p.images
        }
        say(f"{count} steps, batch {batch}")
        rows = measure(cases, rounds=rounds, base=base, device=device, seconds=seconds, energy=energy, say=say)
        common["parameters"] = problem.parameters()
        images = next(
            (r["median_s"] for r in rows if r["provider"] == Reference(images=True).name and "median_s" in r), None
        )
        for row in rows:
            if row.get("speedup") and row["decodes"]:  # decoding is in both
                row["speedup"] = images and {"over": Reference(images=True).name, "factor": images / row["median_s"]}
            yield (
                common
                | row
                | per_image(row, count, batch)
                | (works.get(row["provider"], {}) if "median_s" in row else {})
            )
        if interrupted(rows):
            return


def per_image(row: Row, steps: int, batch: int) -> Row:
    """The figures that people ask for, from the median."""
    if "median_s" not in row:
        return {}
    s = row["median_s"]
    return {"ms_per_step": 1e3 * s / steps, "ms_per_image": 1e3 * s / batch, "images_per_s": batch / s}
