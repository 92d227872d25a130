"""The commands from scans to weights: prepare, train, evaluate."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, PipelineFolder, Prediction, count, place, say

Split = StrEnum("Split", ["subject", "slice"])
Amp = StrEnum("Amp", ["auto", "off", "fp16", "bf16"])
Recon = StrEnum("Recon", ["mse", "l1", "l1_edges"])


def prepare(
    sources: Annotated[
        list[str], typer.Argument(help="NIfTI files, folders of NIfTI, DICOM or PNG/JPG, mni152, synthetic[:COUNT].")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", callback=place, help="Folder to write; one that prepare wrote is replaced.")
    ],
    split: Annotated[
        Split, typer.Option(help="subject keeps a subject in one split; slice leaks, as paper 001 does.")
    ] = Split.subject,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the synthetic brains.")] = 42,
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of 4-D files.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Keep every n-th slice.")] = 1,
    size: Annotated[
        str | None, typer.Option(help="Width x height of a slice in pixels, as 160x224, or one side (default: 128).")
    ] = None,
    spacing: Annotated[
        float | None, typer.Option(help="Side of a pixel in mm (default: 220 mm lie along the smaller side).")
    ] = None,
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Keep each scan as a volume: all slices in order, none left out.")
    ] = False,
    subject: Annotated[
        str | None, typer.Option(help="Regular expression: its group is the subject in a file's name.")
    ] = None,
    covariates: Annotated[
        Path | None,
        typer.Option(help="CSV file, its first column the subject; goes to the manifest, is not trained on."),
    ] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first unusable file.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read at a time (default: one per core).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn scans into training slices. Example: sbldm-fast prepare scans/ synthetic:20 -o data"""
    from sbldm_fast.data import Frame
    from sbldm_fast.data import prepare as run
    from sbldm_fast.data.prepare import was_prepared

    frame = Frame.of(size, spacing)
    if split == "slice":
        say("warning: --split slice puts slices of one subject into train and test")
    if was_prepared(out):
        say(f"{out} holds the slices of an earlier prepare; they are replaced when this one ends")
    reading: dict[str, Any] = {"volume": volume, "every": every, "subject": subject, "covariates": covariates}
    reading |= {"frame": frame, "volumes": volumes}
    workers = workers or os.cpu_count() or 1
    manifest = run(
        sources, out, split=split.value, seed=seed, **reading, strict=strict, workers=workers, progress=not as_json
    )
    _say_what_lacks(manifest, covariates)
    if as_json:
        done = {k: manifest[k] for k in ("subjects", "skipped", "without_covariates")}
        parts = manifest["split"]["slices"]
        print(json.dumps({"out": str(out), "slices": len(manifest["slices"]), "split": parts, **done}))
    else:
        _print_slices(manifest, out, covariates is not None)


def _say_what_lacks(manifest: dict[str, Any], covariates: Path | None) -> None:
    for one in manifest["skipped"]:
        say(f"skipped {one['source']}: {one['reason']}")
    for one in manifest["without_covariates"]:
        say(f"without covariates {one}: {covariates} has no row for it; its slices are kept")
    if "test" not in manifest["split"]["slices"]:
        say(
            f"warning: {count(manifest['subjects'], 'subject')} cannot be split, all slices are for training: no"
            " validation finds the best weights, and evaluate has nothing to compare with; three subjects can be"
        )


def _print_slices(manifest: dict[str, Any], out: Path, with_covariates: bool) -> None:
    """A table of sources, modalities and splits, and the sum."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in manifest["slices"]:
        table.setdefault((row["source"].split("/")[0], row["modality"], row["split"]), []).append(row)
    print(f"{'source':24} {'modality':9} {'split':6} {'subjects':>8} {'scans':>6} {'slices':>7}")
    for (source, modality, part), rows in sorted(table.items()):
        subjects = {row["subject"] for row in rows}
        scans = {(row["subject"], row["source"]) for row in rows}
        print(f"{source[:24]:24} {modality:9} {part:6} {len(subjects):8} {len(scans):6} {len(rows):7}")
    lacking = f", {len(manifest['without_covariates'])} without covariates" if with_covariates else ""
    print(
        f"{count(len(manifest['slices']), 'slice')} of {count(manifest['subjects'], 'subject')},"
        f" {len(manifest['skipped'])} skipped{lacking}; look at {out / 'contact_sheet.png'}"
    )


# The options of train bear the names of the fields of TrainConfig, Objective and train_pipeline; those of the VAE's
# TrainConfig start with --vae.
RunFolder = Annotated[
    Path, typer.Argument(callback=place, help="Run folder: log, checkpoints and, at the end, pipeline/.")
]
PreparedFolder = Annotated[Path, typer.Option(help="A folder that prepare wrote.")]
PresetName = Annotated[str, typer.Option(help="paper, template, covariates, volume, demo or brain.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")]
UNetSteps = Annotated[int, typer.Option(min=1, help="Optimizer steps of the UNet.")]
VAESteps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps of the VAE (default: as --steps).")]
UNetBatch = Annotated[int, typer.Option(min=1, help="Latents a step of the UNet, of all processes together.")]
VAEBatch = Annotated[int, typer.Option(min=1, help="Slices a step of the VAE, of all processes together.")]
UNetRate = Annotated[float, typer.Option(help="Learning rate of the UNet.")]
VAERate = Annotated[float, typer.Option(help="Learning rate of the VAE.")]
Warmup = Annotated[int, typer.Option(min=0, help="Steps of linear warmup of both, a tenth of all at most.")]
EMADecay = Annotated[float, typer.Option(min=0, max=0.99999, help="Of the average of the UNet's weights; 0: none.")]
Views = Annotated[int, typer.Option(min=1, help="Latents of each slice: one as it is, the others augmented.")]
Condition = Annotated[
    str | None, typer.Option(help="Covariates in the data that the model can be asked for, e.g. age,modality,position.")
]
ReconLoss = Annotated[
    Recon, typer.Option(help="Reconstruction loss of the VAE; l1_edges adds differences of neighbours at three scales.")
]
PredictionType = Annotated[Prediction | None, typer.Option(help="Default: that of the preset.")]
SNRGamma = Annotated[float | None, typer.Option(help="Gamma of min-SNR weighting, 5 in its paper (default: none).")]
LowWeight = Annotated[float, typer.Option(help="Weight of the low frequencies in the loss of the UNet.")]
HighWeight = Annotated[float, typer.Option(help="Weight of the high frequencies.")]
Cutoff = Annotated[float, typer.Option(help="Where low ends: cycles a pixel, 0 to 1.")]
SpectralWeight = Annotated[float, typer.Option(help="Lambda of 001 equation 4, 0.1 there; it rescales the loss.")]
CutMixProb = Annotated[float, typer.Option(help="Probability of latent CutMix, 0.25 in 001.")]
AmpName = Annotated[Amp, typer.Option(help="auto: what the device computes in natively.")]
Compile = Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints and validations.")]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints to keep of each stage, beside the best.")]
TrainSeed = Annotated[int, typer.Option(min=0, max=2**40 - 1, help="Of weights, order and noise.")]


def train(
    out: RunFolder,
    data: PreparedFolder,
    preset: PresetName = "demo",
    resume: Resume = False,
    steps: UNetSteps = 100_000,
    vae_steps: VAESteps = None,
    batch_size: UNetBatch = 16,
    vae_batch_size: VAEBatch = 32,
    lr: UNetRate = 2e-4,
    vae_lr: VAERate = 1e-4,
    warmup: Warmup = 1000,
    ema_decay: EMADecay = 0.9999,
    views: Views = 4,
    condition: Condition = None,
    recon: ReconLoss = Recon.mse,
    prediction_type: PredictionType = None,
    snr_gamma: SNRGamma = None,
    low_weight: LowWeight = 1.0,
    high_weight: HighWeight = 1.0,
    cutoff: Cutoff = 0.25,
    spectral_weight: SpectralWeight = 0.0,
    cutmix_prob: CutMixProb = 0.0,
    amp: AmpName = Amp.auto,
    compiled: Compile = False,
    save_every: SaveEvery = 1000,
    keep: Keep = 3,
    seed: TrainSeed = 0,
    as_json: Json = False,
) -> None:
    """Train the VAE, then the UNet. Example: sbldm-fast train run --data data --preset demo --steps 200 --vae-steps 100

    On several devices: torchrun --nproc-per-node=2 -m sbldm_fast train run --data data
    """
    from sbldm_fast import preset as find
    from sbldm_fast.training import Objective, TrainConfig

    def configure(steps: int, batch_size: int, lr: float, ema_decay: float) -> TrainConfig:
        shared: dict[str, Any] = {"save_every": save_every, "keep": keep, "seed": seed, "amp": amp.value}
        shared |= {"warmup": min(warmup, steps // 10), "compile": compiled}
        return TrainConfig(steps, batch_size, lr, ema_decay=ema_decay, **shared)

    configuration = find(preset)
    if prediction_type is not None:
        scheduler = replace(configuration.scheduler, prediction_type=prediction_type.value)
        configuration = configuration._replace(scheduler=scheduler)
    _train(
        configuration,
        data,
        out,
        vae=configure(vae_steps or steps, vae_batch_size, vae_lr, 0.0),
        unet=configure(steps, batch_size, lr, ema_decay),
        objective=Objective(low_weight, high_weight, cutoff, spectral_weight, cutmix_prob, snr_gamma),
        recon=recon.value,
        views=views,
        condition=[name.strip() for name in condition.split(",")] if condition else [],
        resume=resume,
        progress=not as_json,
    )


def _train(preset: Any, data: Path, out: Path, *, progress: bool, **options: Any) -> None:
    """Train on the devices that torchrun gave, and say what came of it."""
    import torch

    from sbldm_fast.training import Stopped, torchrun, train_pipeline
    from sbldm_fast.training.checkpoint import read_log

    start = time.monotonic()
    with torchrun() as device:
        try:
            result = train_pipeline(preset, data, out, device=device, progress=progress, **options)
        except Stopped as stopped:
            say(f"sbldm-fast: {stopped}; the same command with --resume continues")
            raise typer.Exit(130) from None
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
    result |= {"pipeline": str(out / "pipeline"), "seconds": round(time.monotonic() - start, 1)}
    # a run that was continued took longer than this part of it
    result["training_seconds"] = round(sum({row["stage"]: row["seconds"] for row in read_log(out)}.values()), 1)
    latents, seen = result["slices"] * options["views"], options["unet"].steps * options["unet"].batch_size
    if seen < latents:
        say(f"warning: the UNet met {seen} of {latents} latents, less than one pass: its samples will be noise")
    text = (
        f"trained on {result['slices']} slices of {count(result['subjects'], 'subject')} in {result['seconds']} s, "
        f"{result['training_seconds']} s of training in all: {result['pipeline']}"
    )
    print(text if progress else json.dumps(result))


def distill(
    pipeline: PipelineFolder,
    data: PreparedFolder,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", callback=place, help="Run folder: log, checkpoints and, at the end, pipeline/."),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Model calls that the student samples in.")] = 4,
    guidance: Annotated[
        float | None, typer.Option(help="Fold the teacher's guidance in: the student samples by one pass.")
    ] = None,
    resume: Resume = False,
    train_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 6000,
    batch_size: UNetBatch = 32,
    lr: UNetRate = 5e-4,
    warmup: Warmup = 50,
    ema_decay: EMADecay = 0.999,
    views: Views = 4,
    amp: AmpName = Amp.auto,
    save_every: SaveEvery = 500,
    keep: Keep = 3,
    seed: TrainSeed = 0,
    as_json: Json = False,
) -> None:
    """Train a student of few calls. Example: sbldm-fast distill demo --data data --steps 4 -o student

    Its teacher takes four steps for each of its own; one that is a student takes its own, so that 8 become 4, then 2.
    """
    from sbldm_fast.training import TrainConfig, distill_pipeline

    shared: dict[str, Any] = {"save_every": save_every, "keep": keep, "seed": seed, "amp": amp.value}
    shared |= {"warmup": min(warmup, train_steps // 10), "weight_decay": 0.0, "ema_decay": ema_decay}
    config = TrainConfig(train_steps, batch_size, lr, **shared)
    options: dict[str, Any] = {"guidance_scale": guidance, "views": views, "resume": resume, "progress": not as_json}
    result = _train_from(pipeline, lambda teacher: distill_pipeline(teacher, data, out, steps, config, **options))
    if result is None:
        return
    unipc = result["unipc_rms"]
    if unipc is not None and result["rms"] >= unipc:
        say(f"warning: UniPC by {steps} calls of the teacher is nearer to its converged images: train longer")
    beside = "" if unipc is None else f", UniPC by as many {unipc:.4f}"
    text = f"{count(steps, 'call')}: {result['rms']:.4f} RMS from the teacher's converged latents{beside}"
    result |= {"pipeline": str(out / "pipeline")}
    print(json.dumps(result) if as_json else f"{text}: {result['pipeline']}")


def train_volume(
    pipeline: PipelineFolder,
    data: PreparedFolder,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", callback=place, help="Run folder: log, checkpoints and, at the end, pipeline/."),
    ],
    resume: Resume = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 6000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Slices a step, a multiple of 64: windows of 32, 16, 8 and 8.")
    ] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    warmup: Warmup = 50,
    ema_decay: EMADecay = 0.999,
    amp: AmpName = Amp.auto,
    save_every: SaveEvery = 500,
    keep: Keep = 3,
    seed: TrainSeed = 0,
    as_json: Json = False,
) -> None:
    """Let the slices of a volume know each other. Example: sbldm-fast train-volume demo --data data -o volume

    Trains layers that mix neighbours along z, and no others: without its neighbours a slice is what it was.
    """
    from sbldm_fast.training import TrainConfig
    from sbldm_fast.training import train_volume as run

    shared: dict[str, Any] = {"save_every": save_every, "keep": keep, "seed": seed, "amp": amp.value}
    shared |= {"warmup": min(warmup, steps // 10), "weight_decay": 0.0, "ema_decay": ema_decay}
    config = TrainConfig(steps, batch_size, lr, **shared)
    options: dict[str, Any] = {"resume": resume, "progress": not as_json}
    result = _train_from(pipeline, lambda slices: run(slices, data, out, config, **options))
    if result is None:
        return
    text = f"{count(result['volumes'], 'volume')}: error {result['error']:.4f}, {result['error_2d']:.4f} without"
    result |= {"pipeline": str(out / "pipeline")}
    print(json.dumps(result) if as_json else f"{text} neighbours: {result['pipeline']}")


def _train_from(pipeline: str, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any] | None:
    """Run on a pipeline, on the devices that torchrun gave; None in a process that has nothing to say."""
    import torch

    from sbldm_fast import Pipeline
    from sbldm_fast.training import Stopped, torchrun

    with torchrun() as device:
        try:
            result = run(Pipeline.from_pretrained(pipeline).to(device))
        except Stopped as stopped:
            say(f"sbldm-fast: {stopped}; the same command with --resume continues")
            raise typer.Exit(130) from None
        return None if torch.distributed.is_initialized() and torch.distributed.get_rank() else result
