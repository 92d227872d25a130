"""Steps against error: how far each solver is from the converged image, and what it costs; the bundled weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sbldm_fast import Pipeline
from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device

from .harness import Case, Timing, measure
from .rows import Row, head
from .suite_sampling import per_image

CONVERGED = 1000  # steps of DDIM, all that the models were trained on: the limit of every solver here


def bench_solvers(
    *,
    batch: int = 4,
    steps: Sequence[int] = (5, 10, 20, 50, 100),
    rounds: int = 6,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each solver and number of steps: seconds for `batch` images, and `rms`, the root mean square
    difference of the images in [-1, 1] from those of DDIM with 1000 steps and the same noise.

    Raises:
        ValueError: batch, steps or rounds below 1.
    """
    if min(batch, rounds, *steps) < 1:
        raise UserError(f"batch, steps, rounds: got {batch}, {list(steps)}, {rounds}, allowed is 1 or more")
    device = default_device()
    pipe = Pipeline.from_pretrained("demo").to(device)
    say(f"the converged images: {CONVERGED} steps")
    wanted = pipe.sampler(CONVERGED)(batch, seed=0)
    images: dict[str, Tensor] = {}

    def build(name: str, solver: str, count: int) -> Callable[[], Any]:
        if solver != "ddim":
            importlib.import_module("diffusers")  # whose arithmetic it is; absent without
        sampler = pipe.sampler(count, scheduler=solver)

        def run() -> Tensor:
            images[name] = sampler(batch, seed=0)
            return images[name]

        return run

    what = {f"{solver} {count}": (solver, count) for solver in ("ddim", "dpm", "unipc") for count in steps}
    cases = {name: Case(partial(build, name, *of), None, 0.0) for name, of in what.items()}
    common = head("solvers", preset="demo", batch=batch, shape=list(wanted.shape), device=str(device))
    for row in measure(cases, Timing(rounds), base="", device=device, say=say):
        solver, count = what[row["provider"]]
        name = row["provider"]
        error = {"rms": float((images[name] - wanted).square().mean().sqrt())} if name in images else {}
        yield common | {"solver": solver, "steps": count} | row | error | per_image(row, count, batch)
