"""What one step of the sampler launches on a GPU, by kernel: counted and timed by torch.profiler, where `counts` counts
operators.

python -m sbldm_fast.benchmarks.launches -o rows.jsonl [--batch 1,64] [--dtype float32,float16]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sbldm_fast import FastSampler

from .counts import step_work
from .rows import Row, append, head
from .setup import SamplingSetup
from .suite_sampling import DTYPES

NAME = 160  # letters of a kernel's name that are kept: templates go on for thousands
LONG, SHORT = 11, 1  # steps of two runs; their difference has nothing of what surrounds the loop


def kernels_of_a_step(problem: SamplingSetup, dtype: torch.dtype) -> Row:
    """Launches of each kernel in a step, and their microseconds on the device; the loop is run eagerly, as a graph
    holds the same."""
    counted: dict[int, Counter[str]] = {}
    spent: dict[int, Counter[str]] = {}
    for steps in (LONG, SHORT):
        sampler = FastSampler(*problem.ours, shape=problem.noise.shape[1:], steps=steps, mode="eager", dtype=dtype)
        for _ in range(2):
            sampler(noise=problem.noise)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            sampler(noise=problem.noise)
            torch.cuda.synchronize()
        counted[steps], spent[steps] = Counter(), Counter()
        for event in profiler.events():
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                name = event.name[:NAME]
                counted[steps][name] += 1
                spent[steps][name] += event.time_range.elapsed_us()
    per = LONG - SHORT
    kernels: dict[str, Any] = {
        name: {"launches": (n - counted[SHORT][name]) / per, "us": (spent[LONG][name] - spent[SHORT][name]) / per}
        for name, n in counted[LONG].most_common()
        if n > counted[SHORT][name]
    }
    return {
        "launches": sum(k["launches"] for k in kernels.values()),
        "us": sum(k["us"] for k in kernels.values()),
        "kernels": kernels,
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.benchmarks.launches")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--dtype", default="float32,float16")
    parser.add_argument("--preset", default="paper")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("launches: kernels are profiled on a CUDA device, and this PyTorch sees none", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False
    for batch in map(int, given.batch.split(",")):
        for name in given.dtype.split(","):
            problem = SamplingSetup(given.preset, LONG, batch, torch.device("cuda"))
            found = kernels_of_a_step(problem, DTYPES[name])
            row = head(
                "launches",
                preset=given.preset,
                batch=batch,
                dtype=name,
                modelled=step_work(given.preset, batch, DTYPES[name]),
            )
            append(given.out, [row | found])
            print(
                f"batch {batch}, {name}: {found['launches']:.1f} launches and {found['us']:.0f} us of kernels a step; "
                f"{row['modelled']['launches']} modelled"
            )
            for kernel, k in sorted(found["kernels"].items(), key=lambda item: -item[1]["us"])[:40]:
                print(f"  {k['launches']:6.1f} x {k['us'] / k['launches']:7.2f} us = {k['us']:7.1f} us  {kernel[:110]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
