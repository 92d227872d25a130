"""ONNX graphs of a pipeline, and images from them: `python examples/export_and_run.py` (extra `onnx`).

The export runs each graph in ONNX Runtime and compares it with PyTorch before the folder appears; for `demo` that took
37 s of one core of an AMD EPYC. `ORTSampler` then takes the arguments and the seeds of `FastSampler`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from sbldm_fast.export import ORTSampler, check, export

from sbldm_fast import Pipeline
from sbldm_fast.images import save_grid, to_uint8


def main(arguments: list[str] | None = None) -> None:
    """Export, check, sample in ONNX Runtime, and compare with PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", nargs="?", default="demo", help="a pipeline folder, or demo")
    parser.add_argument("-n", type=int, default=4, help="how many images")
    parser.add_argument("--steps", type=int, help="solver steps (default: 12 of UniPC)")
    parser.add_argument("-o", "--out", type=Path, help="folder for the graphs (default: a temporary one)")
    options = parser.parse_args(arguments)

    pipeline = Pipeline.from_pretrained(options.pipeline)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "onnx"
        manifest = export(pipeline, folder, steps=options.steps)
        for name, graph in manifest["graphs"].items():
            parity = graph["parity"]
            print(f"{name}.onnx: error {parity['error']:.1e}, allowed {parity['allowed']:.1e}")
        failures = check(folder, pipeline)["failures"]
        if failures:
            raise SystemExit(f"FAILED: {failures[0]}")
        images = torch.as_tensor(ORTSampler(folder, mode="sampler")(options.n, seed=0))
    expected = pipeline.sample(options.n, seed=0, steps=options.steps)
    save_grid(to_uint8(images), "onnx.png")
    print(f"onnx.png; largest difference from PyTorch {float((images - expected).abs().max()):.1e}")


if __name__ == "__main__":
    main()
