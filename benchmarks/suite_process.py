"""What a fresh process costs: to the first image, in memory, for n images, on several processes. Each figure has a
process of its own.

The child is this file: python -m sbldm_fast.benchmarks.suite_process '{"provider": ..., "started": ...}'
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sbldm_fast.errors import UserError

from .rows import Row, head
from .timing import summary, turns

COUNTS = (1, 10, 100, 1000, 10_000)  # images whose cost is stated
PATIENCE = 900  # seconds that a child may take beyond its box


def bench_startup(
    *,
    preset_name: str = "paper",
    steps: int = 50,
    rounds: int = 3,
    compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider: seconds from the start of a process to its first decoded image, and what they went
    into.

    Compiled providers find what an earlier process has compiled; `cold_cache_s` is the first time of this run, which
    may have compiled. Every process imports this library, the peers' too, beside its own; the imports are a part of
    their own.

    Raises:
        ValueError: steps or rounds below 1.
    """
    _positive(steps=steps, rounds=rounds)
    names, device = _names(compiled)
    common = head("startup", preset=preset_name, steps=steps, batch=1, device=device)
    found: dict[str, list[Row]] = {name: [] for name in names}
    for name in (*names, *turns(names, rounds)):
        if not any("absent" in r or "failed" in r for r in found[name]):
            say(f"a fresh process: {name}")
            found[name].append(_child(name, preset_name, steps, 1))
    for name, children in found.items():
        if "first_s" not in children[-1]:
            yield common | children[-1] | {"family": names[name]}
            continue
        warm = children[1:]
        parts = {key: summary([c[key] for c in warm])["median_s"] for key in ("import_s", "build_s", "run_s")}
        yield (
            common
            | summary([c["first_s"] for c in warm])
            | {
                "provider": name,
                "family": names[name],
                "cold_cache_s": children[0]["first_s"],
                "parts": parts,
            }
        )


def bench_memory(
    *,
    preset_name: str = "paper",
    steps: int = 10,
    batches: Sequence[int] = (1, 16),
    compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider and batch: `peak_bytes` of sampling and decoding a batch; tensors on CUDA, on a CPU the
    process beyond its imports.

    Raises:
        ValueError: steps or batches below 1.
    """
    _positive(steps=steps, batch=min(batches))
    names, device = _names(compiled)
    for batch in batches:
        common = head("memory", preset=preset_name, steps=steps, batch=batch, device=device)
        for name in names:
            say(f"batch {batch}, a fresh process: {name}")
            child = _child(name, preset_name, steps, batch)
            keys = ("provider", "peak_bytes", "absent", "failed")
            yield common | {"family": names[name]} | {key: child[key] for key in keys if key in child}


def bench_scaling(
    *,
    preset_name: str = "paper",
    steps: int = 50,
    batch: int = 16,
    processes: Sequence[int] = (),
    seconds: float = 20.0,
    compiled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Cost against the number of images, and images/s against the number of processes; each process works for
    `seconds`.

    The first rows have `cost`: seconds of a whole fresh process for 1 to 10 000 images, `extrapolated` by the median
    batch beyond what was made in the time. The others have `images_per_s` of 1 and more processes under torchrun (gloo,
    or a GPU each), who share the processor's threads and begin together.

    Raises:
        ValueError: steps, batch, processes or seconds below 1.
    """
    import torch

    processes = processes or (1, torch.cuda.device_count() or 2)
    _positive(steps=steps, batch=batch, processes=min(processes), seconds=seconds)
    names, device = _names(compiled)
    own = next(name for name, family in names.items() if family == "ours")
    common = head("scaling", preset=preset_name, steps=steps, batch=batch, device=device)
    for name in (n for n, family in names.items() if family == "ours" or n == "diffusers"):
        say(f"{seconds:.0f} s of images: {name}")
        one = _child(name, preset_name, steps, 1)
        many = _child(name, preset_name, steps, batch, seconds) if "first_s" in one else one
        ends = many.pop("ends", None)
        yield (
            common
            | {"processes": 1, "family": names[name]}
            | many
            | ({"cost": cost(one["first_s"], ends, batch)} if many is not one and ends else {})
        )
    for number in dict.fromkeys(processes):
        if number > (torch.cuda.device_count() or os.cpu_count() or 1):
            yield common | {
                "processes": number,
                "provider": "torchrun",
                "family": "ours",
                "absent": "more processes than devices",
            }
            continue
        say(f"{number} processes, {seconds:.0f} s each: {own}")
        child = _child(own, preset_name, steps, batch, seconds, processes=number)
        rate = {"images_per_s": child["images"] / child["together_s"]} if "images" in child else {}
        keep = {key: child[key] for key in ("images", "together_s", "absent", "failed") if key in child}
        yield common | {"processes": number, "provider": f"torchrun {own}", "family": "ours"} | keep | rate


def cost(one: float, ends: Sequence[float], batch: int) -> list[Row]:
    """Seconds for n images: `one`, or by the ends of the batches since the process began, or beyond what was made by
    the median batch."""
    gaps = [b - a for a, b in itertools.pairwise(ends)]
    each = summary(gaps)["median_s"] if gaps else ends[0]
    found = [{"images": 1, "seconds": one, "ms_per_image": 1e3 * one, "extrapolated": False}]
    for n in COUNTS[1:]:
        needed = -(-n // batch)
        extrapolated = needed > len(ends)
        seconds = ends[-1] + (needed - len(ends)) * each if extrapolated else ends[needed - 1]
        found.append({"images": n, "seconds": seconds, "ms_per_image": 1e3 * seconds / n, "extrapolated": extrapolated})
    return found


def _positive(**values: float) -> None:
    if min(values.values()) < 1:
        raise UserError(f"{', '.join(values)}: got {', '.join(str(v) for v in values.values())}, allowed is 1 or more")


def _names(compiled: bool) -> tuple[dict[str, str], str]:
    """The providers that are timed and the family of each, our fastest first; and the device."""
    import torch

    on_cuda = torch.cuda.is_available()
    names = {"FastSampler eager float32": "ours", "diffusers": "peer", "MONAI": "peer"}
    if on_cuda:
        names = {"FastSampler loop-graph float32": "ours"} | names
    elif compiled:
        names = {"FastSampler compile float32": "ours"} | names
    if compiled:
        names["diffusers torch.compile"] = "peer"
    return names, "cuda" if on_cuda else "cpu"


def _child(name: str, preset_name: str, steps: int, batch: int, seconds: float = 0.0, processes: int = 1) -> Row:
    """What the process prints, or why it did not."""
    import torch

    job = {
        "provider": name,
        "preset": preset_name,
        "steps": steps,
        "batch": batch,
        "seconds": seconds,
        "started": time.time(),
    }
    module = ["-m", __name__, json.dumps(job)]
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
        if processes > 1
        else module
    )
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    try:
        done = subprocess.run(
            [sys.executable, *launch],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | threads,
            timeout=PATIENCE + seconds,
        )
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        return {"provider": name, "failed": f"took more than {error.timeout:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        said = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        return {"provider": name, "failed": f"the process ended with {done.returncode}: {said[:160]}"}
    return row


def main(job: Row) -> Row:
    """The child: import, build, sample and decode once, then go on for the time that was given."""
    import torch

    from sbldm_fast import AutoencoderKL, preset
    from sbldm_fast.training.ranks import Ranks, torchrun

    from .harness import why_not
    from .providers import FLOAT, providers
    from .setup import SamplingSetup
    from .timing import wait

    with torchrun() as device, torch.no_grad():
        ranks = Ranks.of_torchrun()
        who = next(p for p in providers(device, [FLOAT]) if p.name == job["provider"])
        torch.backends.cudnn.allow_tf32 = False
        try:
            for module in who.needs:
                importlib.import_module(module)
            imported = time.time()
            before = _peak(device)
            problem = SamplingSetup(job["preset"], job["steps"], job["batch"], device)
            torch.manual_seed(0)
            vae = AutoencoderKL(preset(job["preset"]).vae).to(device).eval()
            run = who.build(problem)
            built = time.time()
            vae.decode(run())
            wait(device)
        except Exception as error:  # a row that says so, as in a run with others
            return {"provider": who.name, "rank": ranks.rank} | why_not(error)
        ends = [time.time() - job["started"]]
        if ranks.size > 1:
            torch.distributed.barrier()
        begun, made = time.time(), 0
        while time.time() - begun < job["seconds"]:
            vae.decode(run())
            wait(device)
            ends.append(time.time() - job["started"])
            made += job["batch"]
        # all processes' images over the time of the slowest
        total = torch.tensor(float(made), dtype=torch.float64)
        slowest = torch.tensor(time.time() - begun, dtype=torch.float64)
        if ranks.size > 1:
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        peak = _peak(device) - before
    return {
        "provider": who.name,
        "first_s": ends[0],
        "import_s": imported - job["started"],
        "build_s": built - imported,
        "run_s": ends[0] - (built - job["started"]),
        "peak_bytes": peak,
        "ends": ends,
        "images": int(total),
        "together_s": float(slowest),
        "rank": ranks.rank,
    }


def _peak(device: Any) -> int:
    """Bytes: of tensors at their most on CUDA, elsewhere of this process at its most (a parent's peak is not in
    VmHWM)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


if __name__ == "__main__":
    made = main(json.loads(sys.argv[1]))
    if not made.pop("rank", 0):
        print(json.dumps(made))
