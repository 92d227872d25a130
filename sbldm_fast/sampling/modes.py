"""The ways to run a loop, by name, and which of them `auto` is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .ahead import Unavailable, cache_folder, require_compiler

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPHS = ("step-graph", "loop-graph")
COMPILE_PAYS = 5_000  # samples times steps of one call on a CPU that win the minute of compiling back
ENOUGH = 1.0  # seconds of timing after which nothing is timed again
WHOLE_LOOP = 100  # steps up to which `auto` puts the whole loop into one graph: the graph grows with them
OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # torch.compile modes that capture CUDA graphs of their own


class Mode(NamedTuple):
    """The graph around the loop or its step, and the torch.compile mode of the step; None for neither."""

    graph: str | None
    compiled: str | None

    def __str__(self) -> str:
        compiled = "compile" if self.compiled == "default" else self.compiled
        return "+".join(filter(None, (self.graph, compiled))) or "eager"


def choose(device: torch.device, n: int, steps: int) -> tuple[str, str]:
    """The mode that `auto` is for n samples before anything is timed, and why."""
    if device.type == "cuda":
        whole = steps <= WHOLE_LOOP
        why = f"CUDA device, {steps} steps: one launch a {'run' if whole else 'step'}"
        return "loop-graph" if whole else "step-graph", why
    if n * steps >= COMPILE_PAYS:
        try:
            require_compiler()
            cache_folder()
        except Unavailable as why:
            return "eager", f"{n} samples of {steps} steps would win the minute of compiling back, but {why}"
        return "compile", f"{n} samples of {steps} steps win the minute of compiling back"
    short = f"{device.type} has no CUDA graphs, and a few images take less than compiling"
    return "eager", f"{short}; mode='compile' is faster after it"


def time_in_turns(runs: Mapping[Mode, Callable[[], Any]], device: torch.device) -> dict[Mode, float]:
    """Seconds that each of some runs takes on a CUDA device: the least of three, of fewer where `ENOUGH` has passed;
    the first is their warm-up."""
    seconds = dict.fromkeys(runs, math.inf)
    began = time.perf_counter()
    for _ in range(3):
        for mode, run in runs.items():
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            seconds[mode] = min(seconds[mode], time.perf_counter() - start)
        if time.perf_counter() - began > ENOUGH:
            break
    return seconds


def parse_mode(mode: str, device: torch.device) -> Mode:
    """The mode of a name, such as `"step-graph+compile"`; `"auto"` is none yet, and so eager.

    Raises:
        ValueError: an unknown mode, a graph without CUDA, or a graph around a compile mode that captures its own.
    """
    names = ("eager", "compile", *COMPILE_MODES, *GRAPHS, "auto")
    parts = mode.split("+")
    graphs = [p for p in parts if p in GRAPHS]
    compiles = ["default" if p == "compile" else p for p in parts if p == "compile" or p in COMPILE_MODES]
    if (
        set(parts) - set(names)
        or len(graphs) > 1
        or len(compiles) > 1
        or (len(parts) > 1 and len(graphs) + len(compiles) < 2)
    ):
        raise UserError(f"mode: got {mode!r}, allowed are {', '.join(names)}, and a graph + a compile mode")
    if graphs and compiles and compiles[0] in OWN_GRAPHS:
        raise UserError(
            f"mode: got {mode!r}, allowed in a graph are compile, max-autotune-no-cudagraphs: the others capture"
            " their own"
        )
    if graphs and device.type != "cuda":
        raise UserError(
            f"mode: got {mode!r}, which needs CUDA, and the model is on {device}; allowed here are eager, compile modes"
        )
    return Mode(next(iter(graphs), None), next(iter(compiles), None))
