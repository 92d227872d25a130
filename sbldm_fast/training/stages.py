"""The two stages: the autoencoder on slices, then the UNet on its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbldm_fast.data import Slices
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.diffusion import DDPMScheduler, SchedulerConfig
from sbldm_fast.diffusion.flow import flow_alphas
from sbldm_fast.errors import UserError
from sbldm_fast.kernels import diffuse
from sbldm_fast.models import AutoencoderKL, UNet2D
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.presets import Preset
from sbldm_fast.sampling.pipeline import Pipeline

from . import checkpoint, conditions
from .autoencoder import encode_splits, reconstruction_error, refuse_misfits, train_vae
from .config import TrainConfig
from .objective import Objective
from .ranks import Ranks
from .run import SHOWN, VALIDATION, Context, Stage, train
from .step import LossOf


class Told(NamedTuple):
    """Scaled latents `[N, C, h, w]` and what is told of them: the covariates `[N, K]`, NaN where unknown."""

    latents: Tensor
    values: Tensor | None = None


def noise_levels(scheduler: SchedulerConfig, device: torch.device) -> tuple[Tensor, int]:
    """The table that `diffuse` is given, `[T]`, and the timestep that its first entry is: 1 for a flow, whose 0 is
    data."""
    if scheduler.prediction_type == "flow_prediction":
        return flow_alphas(scheduler.num_train_timesteps).to(device), 1
    return DDPMScheduler.from_config(scheduler).alphas_cumprod.to(device), 0


def unet_loss(
    latents: Tensor,
    scheduler: SchedulerConfig,
    objective: Objective,
    seed: int,
    ranks: Ranks | None = None,
    values: Tensor | None = None,
) -> LossOf:
    """The loss of scaled latents `[N, C, h, w]` at uniform times, all in fused ops: noise, target, weights, bands;
    under the condition `values` `[N, K]`, with some of it dropped."""
    ranks = ranks or Ranks()
    device = latents.device
    alphas_cumprod, first = noise_levels(scheduler, device)
    kind, T = scheduler.prediction_type, scheduler.num_train_timesteps
    weights = objective.weights(alphas_cumprod, kind)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t = ranks.own(torch.randint(T, (len(index),), device=device))
        cond: tuple[Tensor, ...] = ()
        if values is not None:
            draws = torch.rand(len(index), 1 + values.shape[1], device=device)
            cond = (conditions.drop(values[ranks.own(index)], ranks.own(draws)),)
        z0 = latents[ranks.own(index)]
        z_t, target = diffuse(
            z0,
            t,
            alphas_cumprod,
            seed,
            first_index=ranks.rank * len(z0),
            stream=step,
            prediction_type=kind,
            cutmix_prob=objective.cutmix_prob,
        )
        return objective.loss(model(z_t, t + first if first else t, *cond), target, weights[t]), {}

    return loss_of


@torch.no_grad()
def prediction_error(
    model: nn.Module, latents: Tensor, scheduler: SchedulerConfig, seed: int, values: Tensor | None = None
) -> float:
    """The plain error of the prediction on scaled latents `[N, C, h, w]`, at evenly spread times and one draw of
    noise, under the whole condition `values` `[N, K]`."""
    model.eval()
    device = next(model.parameters()).device
    alphas_cumprod, start = noise_levels(scheduler, device)
    kind = scheduler.prediction_type
    losses = []
    every = max(1, len(latents) // VALIDATION)
    z = latents[::every].to(device)
    given: list[tuple[Tensor, ...]] = (
        [()] * len(z) if values is None else [(v,) for v in values[::every].to(device).split(64)]
    )
    t = torch.linspace(0, scheduler.num_train_timesteps - 1, len(z), device=device).long()
    for z0, at, first, cond in zip(z.split(64), t.split(64), range(0, len(z), 64), given, strict=False):
        z_t, target = diffuse(
            z0.contiguous(), at, alphas_cumprod, seed, first_index=first, stream=2**31 - 1, prediction_type=kind
        )
        losses.append((model(z_t, at + start, *cond).float() - target).square().mean((1, 2, 3)))
    return float(torch.cat(losses).mean())


def train_unet(
    unet: UNet2D,
    data: Told,
    scheduler: SchedulerConfig,
    config: TrainConfig,
    context: Context,
    *,
    objective: Objective | None = None,
    held_out: Told | None = None,
    pictures: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> UNet2D:
    """Train on scaled latents with `objective`, a conditional model on what is told of them; return the EMA.

    Source: 001 equations 3 and 4.

    Under torchrun CutMix stays within a process and dropout draws the same masks in each: with neither, their number
    changes only the rounding.
    """
    objective = objective or Objective()
    device = next(unet.parameters()).device
    latents = data.latents.to(device)
    values = None if data.values is None else data.values.to(device)
    if values is not None:
        conditions.refuse_mixtures(objective.cutmix_prob)

    def validate(model: nn.Module) -> float:
        assert held_out is not None
        return prediction_error(model, held_out.latents, scheduler, config.seed, held_out.values)

    stage = Stage(
        "unet",
        unet,
        unet_loss(latents, scheduler, objective, config.seed, context.ranks, values),
        len(latents),
        validate=None if held_out is None else validate,
        pictures=pictures,
        settings={"unet": unet.config.to_dict(), "scheduler": scheduler.to_dict(), **asdict(objective)},
    )
    trained = train(stage, config, context)
    assert isinstance(trained, UNet2D)
    return trained


def train_pipeline(
    preset: Preset,
    data: str | Path,
    folder: str | Path,
    *,
    vae: TrainConfig,
    unet: TrainConfig,
    recon: str = "mse",
    objective: Objective | None = None,
    views: int = 4,
    condition: Sequence[str] = (),
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train both stages on a prepared folder and save the pipeline to `folder/pipeline`.

    Started by torchrun, every process takes its part of each batch.

    Args:
        preset: the configurations of both models and of the noise schedule.
        data: a folder that `prepare` wrote.
        folder: for the log, the checkpoints, the latents and the pipeline.
        vae: how the autoencoder is trained.
        unet: how the UNet is trained.
        recon: reconstruction loss of the autoencoder, `"mse"`, `"l1"` or `"l1_edges"`.
        objective: what the UNet is trained on; the mean squared error by default.
        views: the latents of each slice and of `views - 1` augmented copies of it are trained on.
        condition: the covariates in the manifest that the UNet is told, with their ranges in the training split; none:
            those of the preset, if it has any.
        resume: go on with the run in `folder`, if there is one; the result is that of an uninterrupted run.
        device: of both models.
        progress: whether bars are shown.

    Returns:
        The slices, subjects and scaling factor; of each stage the step that was kept (the last without a validation
        split); and `val_l1`, the mean absolute reconstruction error of the validation split (None if empty).

    Raises:
        UserError: as `Slices`, `refuse_misfits` and `conditions.find_covariates`; a folder that holds a run, without
            `resume`; a checkpoint of another model or of other settings.
        NotFinite: a loss or gradient that is not finite.
        OSError: a file could not be written, with the last good checkpoint.
        Stopped: on a signal.
    """
    folder, ranks = Path(folder), Ranks.of_torchrun()
    for config in (vae, unet):
        ranks.check_batch_size(config.batch_size)
    refuse_a_run(folder, resume)
    if condition:
        found_covariates = conditions.find_covariates(read_manifest(data), condition)
        preset = preset._replace(unet=replace(preset.unet, covariates=found_covariates))
    slices = find_splits(data)
    refuse_misfits(preset.vae, slices["train"])
    if preset.unet.covariates:  # now, and not after the first stage
        conditions.refuse_mixtures((objective or Objective()).cutmix_prob)
        conditions.refuse_unknown(preset.unet.covariates, slices["train"].rows)
    context = Context(folder, ranks, {"data": digest_data(data)}, progress)
    with checkpoint.name_last_checkpoint(folder):
        torch.manual_seed(vae.seed)
        autoencoder = AutoencoderKL(preset.vae).to(device)
        network = UNet2D(preset.unet).to(device)
        train_vae(autoencoder, slices["train"], vae, context, recon=recon, held_out=slices.get("val"))
        latents = encode_splits(autoencoder, slices, views, vae.seed, context)
        factor = float(1 / latents["train"].std())
        values = condition_values(preset.unet.covariates, slices, latents)
        autoencoder.config = replace(preset.vae, scaling_factor=factor, spacing=slices["train"].spacing)
        ema = train_unet(
            network,
            Told(latents["train"] * factor, values.get("train")),
            preset.scheduler,
            unet,
            context,
            objective=objective,
            held_out=Told(latents["val"] * factor, values.get("val")) if "val" in latents else None,
            pictures=partial(_sample_some, autoencoder, preset.scheduler),
        )
        if ranks.rank == 0:
            Pipeline(autoencoder, ema, preset.scheduler).save(folder / "pipeline")
    return {
        "slices": len(slices["train"]),
        "subjects": len({row["subject"] for row in slices["train"].rows}),
        "scaling_factor": factor,
        "kept_steps": {n: checkpoint.kept_step(folder, n, c.steps) for n, c in (("vae", vae), ("unet", unet))},
        "val_l1": reconstruction_error(autoencoder, slices["val"]) if "val" in slices else None,
    }


def refuse_a_run(folder: Path, resume: bool) -> None:
    """Refuse, as `UserError`, a folder that holds a run, unless it is gone on with."""
    found = checkpoint.checkpoints(folder)
    if found and not resume:
        raise UserError(
            f"{folder} holds a run ({found[-1].name}); allowed is a new folder, or --resume to go on with it"
        )


def find_splits(data: str | Path) -> dict[str, Slices]:
    """The training split of a prepared folder, and the validation split where there is one."""
    there = {row["split"] for row in read_manifest(data)["slices"]}
    return {split: Slices(data, split) for split in ("train", "val") if split == "train" or split in there}


def digest_data(data: str | Path) -> str:
    """What tells a prepared folder from another."""
    return hashlib.sha256((Path(data) / "manifest.json").read_bytes()).hexdigest()


def condition_values(
    covariates: Sequence[Covariate], slices: dict[str, Slices], latents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The covariates of the latents of each split, `[views * N, K]`; nothing where there are none to tell."""
    values = {}
    for split, data in slices.items() if covariates else ():
        areas = latents[f"areas_{split}"].cpu()
        told = conditions.values_of(data.rows, covariates).repeat(len(areas) // len(data), 1)
        values[split] = conditions.scale_volumes(told, areas, covariates)
    return values


def _sample_some(vae: AutoencoderKL, scheduler: SchedulerConfig, unet: nn.Module) -> dict[str, Tensor]:
    assert isinstance(unet, UNet2D)
    return {"synthetic samples": Pipeline(vae, unet, scheduler).sample(SHOWN, seed=0, mode="eager")}
