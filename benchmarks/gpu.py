"""The benchmark of `make gpu`: sampling in every mode on the CUDA device, written where results are committed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .sampling import bench_sampling
from .table import sampling_table
from .timing import append, machine, machine_name


def main(results: str = "benchmarks/results") -> int:
    """Run and write `<results>/<machine>/sampling.jsonl`; 1 if a provider is wrong, 2 without CUDA."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this PyTorch sees none", file=sys.stderr)
        return 2
    path = Path(results) / machine_name(machine()) / "sampling.jsonl"
    wrong: list[str] = []
    for batch in (1, 16):
        # written after each batch: a run that is cut off keeps what it has measured
        rows = bench_sampling(batches=(batch,), rounds=10, say=lambda text: print(text, flush=True))
        append(path, rows)
        print(sampling_table(rows))
        wrong += [r["provider"] for r in rows if not r.get("parity", {"ok": True})["ok"]]
    print(f"rows appended to {path}" + (f"; WITHOUT PARITY: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
