"""The benchmark of `make gpu`: every suite on the CUDA device, in the order of what is asked first, within a time.

Each suite is a process of its own, so that one that dies takes nothing with it. Rows are written as they are made. What a run had no
time for, or did not finish, the next one does: `gpu.jsonl` beside the rows records what was finished with these sources.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from .kernels import OPS
from .rows import Row, append, head, machine, machine_name, read_rows, source

MINUTES = 6.0  # of the 8 that `make gpu` may take; parity takes the rest
PLAN = (
    "sampling --batch 1 --rounds 10 --no-compile",
    *(f"kernels --op {op} --no-large --rounds 5" for op in OPS),
    "sampling --batch 16 --rounds 10 --no-compile",
    "training --steps 20 --no-compile",
    "solvers --rounds 3",
    "startup --rounds 2 --no-compile",
    "memory --no-compile",
    "scaling --seconds 8 --no-compile",
    "export --batch 1 --rounds 5 --no-compile",
    "sampling --batch 1 --rounds 10",
    *(f"kernels --op {op} --rounds 5" for op in OPS),
    "training --steps 20",
)


def main(results: str = "benchmarks/results", minutes: float = MINUTES) -> int:
    """Run what is not done yet; 0 if all of it is done and right, 1 if something failed or time ran out, 2 without CUDA."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this PyTorch sees none", file=sys.stderr)
        return 2
    folder = Path(results) / machine_name(machine())
    return run_plan(PLAN, folder, time.monotonic() + 60 * minutes)


def run_plan(plan: tuple[str, ...], folder: Path, deadline: float) -> int:
    """The lines of `plan` that `folder` does not record as done, until `deadline`."""
    done = {r["line"] for r in _record(folder) if r["source"] == source()}
    failed, left = [], []
    for line in (line for line in plan if line not in done):
        suite = line.split()[0]
        rest = deadline - time.monotonic()
        if rest <= 0:
            left.append(line)
            continue
        print(f"\n$ sbldm-fast bench {line}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "sbldm_fast", "bench", *line.split(), "-o", str(folder / f"{suite}.jsonl")]
        try:
            code = subprocess.run(command, timeout=rest, check=False).returncode
        except subprocess.TimeoutExpired:
            left.append(line)
            continue
        append(folder / "gpu.jsonl", [head("gpu", line=line, code=code, seconds=round(time.monotonic() - start, 1), source=source())])
        failed += [line] if code else []
    print(f"\nrows in {folder}; {len(plan) - len(left)} of {len(plan)} parts done")
    for why, lines in (("failed, or without parity", failed), ("no time, the same command goes on", left)):
        for line in lines:
            print(f"{why}: {line}")
    return 1 if failed or left else 0


def _record(folder: Path) -> list[Row]:
    path = folder / "gpu.jsonl"
    return read_rows(path)[0] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results"))
