"""From scans to images: `python examples/train_on_your_scans.py SCANS... -o run` (extra `data`).

SCANS are NIfTI files, folders of NIfTI, DICOM or PNG, or `synthetic:8` to try it without any. The default of 60 steps
shows that everything works; its images are noise. The bundled weights took 2,400 steps of the VAE and 20,000 of the
UNet (`sbldm_fast/assets/demo/README.md`). The same command goes on where a run was cut off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sbldm_fast import Pipeline, preset
from sbldm_fast.data import prepare
from sbldm_fast.images import save_grid, to_uint8
from sbldm_fast.training import Objective, TrainConfig, train_pipeline


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train both stages, sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scans", nargs="+", help="files or folders, or synthetic:COUNT")
    parser.add_argument("-o", "--out", type=Path, default=Path("run"), help="folder for slices, checkpoints, pipeline")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each stage")
    parser.add_argument("-n", type=int, default=16, help="images to sample at the end")
    parser.add_argument("--batch-size", type=int, default=16, help="slices and latents a step")
    options = parser.parse_args(arguments)

    data, run = options.out / "data", options.out / "run"
    if not data.exists():
        manifest = prepare(options.scans, data)
        print(f"{len(manifest['slices'])} slices, {len(manifest['skipped'])} skipped: {data / 'contact_sheet.png'}")
    steps, warmup = options.steps, options.steps // 10
    result = train_pipeline(
        preset("demo"),
        data,
        run,
        vae=TrainConfig(steps=steps, batch_size=options.batch_size, lr=1e-3, warmup=warmup),
        unet=TrainConfig(steps=steps, batch_size=options.batch_size, lr=5e-4, warmup=warmup, ema_decay=0.999),
        objective=Objective(snr_gamma=5.0),
        recon="l1",
        resume=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    print(f"trained on {result['slices']} slices")
    images = Pipeline.from_pretrained(run / "pipeline").sample(options.n, seed=0)
    save_grid(to_uint8(images), options.out / "samples.png")
    print(options.out / "samples.png")


if __name__ == "__main__":
    main()
