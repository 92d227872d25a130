"""The benchmark of `make gpu`: every suite on the CUDA device, in the order of what is asked first, within a time.

Each line of the plan is a process of its own, so that one that dies takes nothing with it. The rows of a problem are written when it is
done. What a run had no time for, the next one does: `gpu.jsonl` beside the rows records what this machine has finished with these sources.
What torch.compile had made until it was cut off is in its cache then. Not run on CUDA yet.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from .kernels import OPS
from .rows import Row, append, head, machine, machine_id, machine_name, read_rows

MINUTES = 6.0  # of the 8 that `make gpu` may take; parity takes the rest
PLAN = (
    "sampling --batch 1 --rounds 10 --no-compile",
    "kernels --op ceilings --rounds 10",
    "kernels --op group_norm_silu --no-large --rounds 6",
    "kernels " + " ".join(f"--op {op}" for op in OPS[1:]) + " --no-large --rounds 6",
    "sampling --batch 16 --rounds 10 --no-compile",
    "training --steps 20 --rounds 6 --no-compile",
    "solvers --rounds 6",
    "startup --rounds 2 --no-compile",
    "memory --no-compile",
    "scaling --seconds 8 --no-compile",
    "export --batch 1 --rounds 6 --no-compile",
    "sampling --batch 1 --rounds 10 --no-half",
    "sampling --batch 1 --rounds 10",
    *(f"kernels --op {op} --rounds 6" for op in OPS),
    "training --steps 20 --rounds 6",
)


def main(results: str = "benchmarks/results") -> int:
    """Run what is not done yet; 0 if all of it is done and right, 1 if something failed or time ran out, 2 without CUDA."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this PyTorch sees none", file=sys.stderr)
        return 2
    folder = Path(results) / machine_name(machine())
    return run_plan(PLAN, folder, time.monotonic() + 60 * MINUTES)


def run_plan(plan: tuple[str, ...], folder: Path, deadline: float) -> int:
    """The lines of `plan` that `folder` does not record as finished on this machine with these sources, until `deadline`.

    A line that ended in failure is finished and goes on failing; one that was killed is run again.
    """
    here = machine()
    finished = {r["line"]: r["code"] for r in _record(folder) if _same(r["env"], here)}
    left = []
    for line in (line for line in plan if finished.get(line, -1) < 0):
        rest = deadline - time.monotonic()
        code = _run(line, folder, rest) if rest > 0 else None
        if code is None:
            left.append(line)
            continue
        finished[line] = code
        append(folder / "gpu.jsonl", [head("gpu", line=line, code=code)])
    failed = [line for line in plan if finished.get(line)]
    print(f"\nrows in {folder}; {len(plan) - len(left)} of {len(plan)} parts done")
    for why, lines in (("failed, or without parity", failed), ("no time, the same command goes on", left)):
        for line in lines:
            print(f"{why}: {line}")
    return 1 if failed or left else 0


def _run(line: str, folder: Path, seconds: float) -> int | None:
    """The exit code of a line, or None when its time was over; what it had started goes with it."""
    print(f"\n$ sbldm-fast bench {line}", flush=True)
    command = [sys.executable, "-m", "sbldm_fast", "bench", *line.split(), "-o", str(folder / f"{line.split()[0]}.jsonl")]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def _same(a: Row, b: Row) -> bool:
    return all(of(a) == of(b) for of in (machine_id, lambda e: e["source"], lambda e: e["packages"]["torch"]))


def _record(folder: Path) -> list[Row]:
    path = folder / "gpu.jsonl"
    return read_rows(path)[0] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results"))
