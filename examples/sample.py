"""Sixteen images from the bundled weights: `python examples/sample.py`.

Expected: `samples.png`, a sheet of four by four axial slices: `sbldm_fast/assets/demo/samples.png`, to the byte on the
CPU that it was measured on. Most are brains without a skull, some are heads with one; sulci are blurred. One core of an
AMD EPYC took 3 s for sampling, and 5 to 8 s in all. The images are synthetic, not for diagnosis.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sbldm_fast import Pipeline
from sbldm_fast.images import save_grid, to_uint8


def main(arguments: list[str] | None = None) -> None:
    """Sample and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="solver steps")
    parser.add_argument("--mode", default="auto", help="auto, eager, compile, step-graph or loop-graph")
    parser.add_argument("-o", "--out", type=Path, default=Path("samples.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained("demo").to(device)
    start = time.perf_counter()
    images = pipeline.sample(options.n, seed=options.seed, steps=options.steps, mode=options.mode)  # [n, 1, 128, 128]
    seconds = time.perf_counter() - start
    save_grid(to_uint8(images), options.out)
    print(f"{options.n} images in {seconds:.1f} s on {device}: {options.out}")


if __name__ == "__main__":
    main()
