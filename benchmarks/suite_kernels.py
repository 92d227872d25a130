"""The fused ops against eager PyTorch, torch.compile and, where installed, Liger-Kernel, in GB/s beside a copy of the
same bytes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend
from sbldm_fast.kernels._backend import obstacle

from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device

from .harness import Absent, Case, Timing, interrupted, measure
from .rows import Row, head

OPS = (
    "group_norm_silu",
    "ddim_step",
    "solver_step",
    "frequency_loss",
    "spectral_mse",
    "philox_normal",
    "diffuse",
    "mix_slices",
)
PARTS = ("ceilings", *OPS)
# of the largest value: what an op's own rounding leaves
RELATIVE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
Providers = dict[str, Callable[[], Any]]


class OpCase(NamedTuple):
    """One problem: what must be moved and computed at the least, and who computes it; `reference` is what the others
    must equal."""

    shape: str
    dtype: torch.dtype
    layout: str
    moved: int  # bytes
    flops: int
    launches: int  # of our op
    providers: Providers
    again: int = 0  # bytes that our op reads a second time
    own_stream: tuple[str, ...] = ()  # providers of other random numbers, which nothing can be compared with


def problems(op: str, device: torch.device, large: bool) -> Iterator[OpCase]:
    """The problems of `bench_<op>.py`: what the presets run, and with `large` one of 64 MB or more."""
    found: Iterator[OpCase] = importlib.import_module(f"{__package__}.bench_{op}").problems(device, large)
    return found


def on_device(device: torch.device) -> Sequence[torch.dtype]:
    """The dtypes worth timing: float32, and float16 but on a CPU."""
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16)


def ours(call: Callable[[], Any]) -> Providers:
    """`call`, an op, in its two implementations."""

    def run(name: str) -> Any:
        with backend(name):
            return call()

    return {"reference": partial(run, "torch"), "ours": partial(run, "triton")}


def bench_kernels(
    ops: Sequence[str] = PARTS,
    *,
    rounds: int = 10,
    seconds: float = math.inf,
    large: bool = True,
    compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each op, problem and provider: seconds a call, warm and with its caches flushed, GB/s of the bytes
    that must move.

    On CUDA a warm call is one of a captured graph. `of_copy` is the part of the rate of a copy of the same bytes. The
    speed-up is over eager PyTorch. Op `ceilings` is what the machine can do at most. `seconds`: after which the rounds
    of a problem end.

    Raises:
        ValueError: an unknown op, or rounds below 1.
    """
    if rounds < 1 or set(ops) - set(PARTS):
        raise UserError(f"ops, rounds: got {', '.join(ops)}, {rounds}, allowed are {', '.join(PARTS)}, and 1 or more")
    device = default_device()
    for op in ops:
        if op == "ceilings":
            yield from ceilings(device, rounds, seconds)
            continue
        for problem in problems(op, device, large):
            say(f"{op} {problem.shape} {problem.layout} {str(problem.dtype)[6:]}")
            work = {
                "moved": problem.moved,
                "again": problem.again,
                "flops": problem.flops,
                "launches": problem.launches,
            }
            common = head("kernels", op=op, shape=problem.shape, layout=problem.layout, device=str(device), **work)
            rows = timed(problem, device, rounds, compiled, seconds)
            yield from (common | row for row in rows)
            if interrupted(rows):
                return


def timed(
    problem: OpCase, device: torch.device, rounds: int, compiled: bool = True, seconds: float = math.inf
) -> list[Row]:
    """A row for each provider of a problem, and for a copy of the bytes that must move."""
    # the problems of an op share the function that torch.compile is given: counted together, its ninth version would
    # run eagerly
    torch._dynamo.reset()
    timing = Timing(rounds, seconds, bundle=True, cold=True)
    rows = measure(cases(problem, device, compiled), timing, base="eager", device=device)
    copy = next((r["median_s"] for r in rows if r["provider"] == "copy" and "median_s" in r), None)
    return [
        (
            r | {"gb_s": problem.moved / r["median_s"] / 1e9, "of_copy": copy and copy / r["median_s"]}
            if "median_s" in r
            else r
        )
        for r in rows
    ]


def cases(problem: OpCase, device: torch.device, compiled: bool = True) -> dict[str, Case]:
    """The providers of a problem, and a copy, for the harness."""
    source = torch.zeros(max(1, problem.moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {}
    for name, call in (dict(problem.providers) | {"copy": lambda: target.copy_(source)}).items():
        if name == "torch.compile" and not compiled:
            continue
        reference = None if name == "copy" or name in problem.own_stream else "reference"
        build = partial(_where_it_runs if name == "ours" else _as_it_is, call, device)
        about = {"family": {"ours": "ours", "reference": "reference", "copy": "machine"}.get(name, "peer")}
        found[name] = Case(build, reference, RELATIVE[problem.dtype], dtype=str(problem.dtype)[6:], about=about)
    return found


def _as_it_is(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    return call


def _where_it_runs(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    if why := obstacle(device):
        raise Absent(why)
    return call


def ceilings(device: torch.device, rounds: int, seconds: float = math.inf) -> Iterator[Row]:
    """What this machine can do at most: bytes/s of a large copy, operations/s of matrix product and convolution,
    smallest operations/s."""
    on_gpu = device.type == "cuda"
    side, small = 4096 if on_gpu else 1536, torch.zeros(1, device=device)
    source = torch.ones(2**28 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[Callable[[], Any], float, str]] = {
        "copy": (lambda: target.copy_(source), 2.0 * source.numel(), "bytes/s"),
        "launch": (lambda: small.add_(1), 1.0, "launches/s"),
    }
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, device=device, dtype=dtype)
        calls[f"matmul {str(dtype)[6:]}"] = (partial(torch.matmul, a, a), 2.0 * side**3, "operations/s")
        # of a width that no model here has; on a processor another library than matmul's
        x, w = (
            torch.ones(64 if on_gpu else 8, 256, 32, 32, device=device, dtype=dtype),
            torch.ones(256, 256, 3, 3, device=device, dtype=dtype),
        )
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        operations = 2.0 * 9 * 256 * x.numel()
        calls[f"convolution {str(dtype)[6:]}"] = (partial(torch.conv2d, x, w, padding=1), operations, "operations/s")
    about = {"family": "machine"}
    found = {
        name: Case(partial(_as_it_is, call, device), None, 0.0, about=about) for name, (call, _, _) in calls.items()
    }
    common = head("kernels", op="ceilings", shape="", layout="", device=str(device))
    for row in measure(found, Timing(rounds, seconds, bundle=True), base="", device=device):
        _, amount, unit = calls[row["provider"]]
        yield common | row | ({"rate": amount / row["median_s"], "unit": unit} if "median_s" in row else {})
