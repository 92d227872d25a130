"""The benchmark of `make gpu`: kernels, sampling in every mode, training, on the CUDA device, written where results are committed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .kernels import OPS, bench_kernels, kernels_table
from .sampling import bench_sampling
from .table import sampling_table, training_table
from .timing import append, machine, machine_name
from .training import bench_training


def main(results: str = "benchmarks/results") -> int:
    """Run and write `<results>/<machine>/kernels.jsonl`, `sampling.jsonl`, `training.jsonl`; 1 if a provider is wrong, 2 without CUDA."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and this PyTorch sees none", file=sys.stderr)
        return 2
    folder = Path(results) / machine_name(machine())
    wrong: list[str] = []
    for op in OPS:
        # written after each op and batch: a run that is cut off keeps what it has measured
        rows = bench_kernels([op], rounds=7)
        append(folder / "kernels.jsonl", rows)
        print(kernels_table(rows), flush=True)
        wrong += [f"{r['op']} {r['provider']}" for r in rows if r.get("parity") and not r["parity"]["ok"]]
    for batch in (1, 16):
        rows = bench_sampling(batches=(batch,), rounds=10, say=lambda text: print(text, flush=True))
        append(folder / "sampling.jsonl", rows)
        print(sampling_table(rows))
        wrong += [r["provider"] for r in rows if not r.get("parity", {"ok": True})["ok"]]
    # compiling four loops takes minutes, which `bench training` has
    rows = bench_training(steps=20, compiled=False, say=lambda text: print(text, flush=True))
    append(folder / "training.jsonl", rows)
    print(training_table(rows))
    wrong += [r["provider"] for r in rows if not r.get("parity", {"ok": True})["ok"]]
    print(f"rows appended in {folder}" + (f"; WITHOUT PARITY: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
