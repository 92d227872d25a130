"""Fifty-four images that the bundled weights are asked for: `python examples/sample.py`.

Expected: `samples.png`, nine rows of six heights: T1, T2 and FLAIR at 30 years, then at 55 and at 80:
`sbldm_fast/assets/demo/samples.png`, to the byte on the CPU that it was made on. Sulci are blurred. The images are
synthetic, not for diagnosis.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import torch

from sbldm_fast import Pipeline
from sbldm_fast.images import save_grid, to_uint8


def main(arguments: list[str] | None = None) -> None:
    """Ask for every combination and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ages", type=float, nargs="+", default=[30, 55, 80], help="years")
    parser.add_argument("--positions", type=float, nargs="+", default=[-40, -20, 0, 14, 30, 50], help="heights, mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="solver steps (default: 12 of UniPC)")
    parser.add_argument("--mode", default="auto", help="auto, eager, compile, step-graph or loop-graph")
    parser.add_argument("-o", "--out", type=Path, default=Path("samples.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained("demo").to(device)
    start = time.perf_counter()
    asked = list(product(options.ages, ("T1", "T2", "FLAIR"), options.positions))
    age, modality, position = zip(*asked, strict=True)
    cond = {"age": age, "modality": modality, "position": position}
    images = pipeline.sample(len(asked), seed=options.seed, steps=options.steps, mode=options.mode, cond=cond)
    seconds = time.perf_counter() - start
    save_grid(to_uint8(images), options.out, columns=len(options.positions))  # of [n, 1, 128, 128] in [-1, 1]
    print(f"{len(asked)} images in {seconds:.1f} s on {device}: {options.out}")


if __name__ == "__main__":
    main()
