"""The two stages: the autoencoder on slices, then the UNet on its latents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.diffusion import DDIMScheduler, DDPMScheduler, SchedulerConfig
from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.kernels import diffuse
from sbldm_fast.models import AutoencoderKL, DiagonalGaussian, UNet2D
from sbldm_fast.models.presets import Preset
from sbldm_fast.models.weights import digest_weights, read_tensors, write_tensors
from sbldm_fast.sampling.pipeline import Pipeline

from . import checkpoint
from .config import TrainConfig
from .objective import Objective
from .ranks import Ranks
from .run import Context, Stage, train
from .step import LossOf

KL_WEIGHT = 1e-5
KL_EPOCHS = 20  # linear anneal
VALIDATION = 512  # slices or latents that the validation loss is taken on, at most
SHOWN = 8  # images in a grid


def augment(x: Tensor, draws: Tensor) -> Tensor:
    """Flips (left-right), rotations (10 degrees), shifts and scales (5 %) of images `[N, 1, S, S]`, by uniform `draws`
    `[N, 5]`.

    Source: 001 III.A.
    """
    within = 2 * draws - 1
    angle, scale = within[:, 0] * math.radians(10), 1 + 0.05 * within[:, 1]
    flip = torch.where(within[:, 2] < 0, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # a shift of 5 % of the side is 0.1 in grid units of -1 to 1
    theta = torch.stack([cos * flip, -sin, 0.1 * within[:, 3], sin * flip, cos, 0.1 * within[:, 4]], dim=1).view(
        len(x), 2, 3
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside the image is air, -1


class _Autoencode(nn.Module):
    """One call for torch.compile: reconstruction, mean and logvar."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.vae.encode(x)
        return self.vae.decode(q.mean + (0.5 * q.logvar).exp() * noise), q.mean, q.logvar


def train_vae(
    vae: AutoencoderKL,
    data: Slices,
    config: TrainConfig,
    context: Context,
    *,
    recon: str = "mse",
    held_out: Slices | None = None,
) -> None:
    """Train in place on `recon + beta * KL`, both per element, beta from 0 to 1e-5 over 20 epochs.

    Source: 001 equation 1.

    Raises:
        UserError: `recon` is neither `"mse"` nor `"l1"`.
    """
    if recon not in ("mse", "l1"):
        raise UserError(f"recon: got {recon!r}, allowed are mse, l1")
    distance = F.mse_loss if recon == "mse" else F.l1_loss
    ranks = context.ranks
    device = next(vae.parameters()).device
    data = data.to(device)
    latent = vae.config.latent_channels, vae.config.latent_size, vae.config.latent_size
    anneal = KL_EPOCHS * max(1, len(data) // config.batch_size)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # every process draws for the whole batch and takes its part: their number changes nothing
        draws = torch.rand(len(index), 5, device=device)
        noise = torch.randn(len(index), *latent, device=device)
        x = augment(data[ranks.own(index)], ranks.own(draws))
        y, mean, logvar = (t.float() for t in model(x, ranks.own(noise)))
        error = distance(y, x)
        kl = DiagonalGaussian(mean, logvar).kl().mean() / mean[0].numel()
        return error + KL_WEIGHT * (step[0] / anneal).clamp(max=1) * kl, {recon: error, "kl": kl}

    def validate(model: nn.Module) -> float:
        assert held_out is not None
        return reconstruction_error(vae, held_out, distance)

    @torch.no_grad()
    def reconstruct_some(model: nn.Module) -> dict[str, Tensor]:
        x = data[torch.linspace(0, len(data) - 1, SHOWN, device=data.index.device).long()]
        return {"slices": x, "synthetic reconstructions": vae.decode(vae.encode(x).mean)}

    stage = Stage(
        "vae",
        _Autoencode(vae),
        loss_of,
        len(data),
        validate=validate if held_out else None,
        pictures=reconstruct_some,
        settings={"recon": recon, "vae": vae.config.to_dict()},
    )
    train(stage, config, context)
    vae.eval()


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, data: Slices, distance: Any = F.l1_loss) -> float:
    """Mean `distance` (per element, in units of [-1, 1]) between slices and what the autoencoder makes of them."""
    vae.eval()
    device = next(vae.parameters()).device
    every = max(1, len(data) // VALIDATION)
    chunks = [data[i].to(device) for i in torch.arange(0, len(data), every, device=data.index.device).split(64)]
    return float(
        torch.cat(
            [distance(vae.decode(vae.encode(x).mean), x, reduction="none").mean((1, 2, 3)) for x in chunks]
        ).mean()
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Slices, views: int, seed: int, progress: bool = True) -> Tensor:
    """Posterior means of the slices and of `views - 1` augmented copies of each, unscaled: `[views * N, C, h, w]`."""
    vae.eval()
    device = next(vae.parameters()).device
    torch.manual_seed(seed)
    out = []
    for view in tqdm(range(views), desc="encode", unit="view", disable=not progress):
        for index in torch.arange(len(data), device=data.index.device).split(64):
            x = data[index].to(device)
            out.append(vae.encode(augment(x, torch.rand(len(x), 5, device=device)) if view else x).mean)
    return torch.cat(out)


def encode_splits(
    vae: AutoencoderKL, data: dict[str, Slices], views: int, seed: int, context: Context
) -> dict[str, Tensor]:
    """The latents of each split, encoded once: a resumed run reads them back if weights, slices and views are the
    same."""
    made_of = {"stamp": context.settings["data"], "views": views, "seed": seed, "vae": digest_weights(vae)}
    path = context.folder / "latents"
    if context.ranks.rank == 0 and not (path.exists() and read_json(path / "state.json") == made_of):
        latents = {
            split: encode(vae, slices, views if split == "train" else 1, seed, context.progress).contiguous()
            for split, slices in data.items()
        }
        with whole_folder(path, lose=True) as aside:
            write_tensors(latents, aside / "latents.safetensors")
            write_json(aside / "state.json", made_of)
    if dist.is_initialized():
        dist.barrier()
    return read_tensors(path / "latents.safetensors")


def unet_loss(
    latents: Tensor, scheduler: SchedulerConfig, objective: Objective, seed: int, ranks: Ranks | None = None
) -> LossOf:
    """The loss of scaled latents `[N, C, h, w]` at uniform times, all in fused ops: noise, target, weights, bands."""
    ranks = ranks or Ranks()
    device = latents.device
    alphas_cumprod = DDPMScheduler.from_config(scheduler).alphas_cumprod.to(device)
    kind, T = scheduler.prediction_type, scheduler.num_train_timesteps
    weights = objective.weights(alphas_cumprod, kind)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t = ranks.own(torch.randint(T, (len(index),), device=device))
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
        return objective.loss(model(z_t, t), target, weights[t]), {}

    return loss_of


@torch.no_grad()
def prediction_error(model: nn.Module, latents: Tensor, scheduler: SchedulerConfig, seed: int) -> float:
    """The plain error of the prediction on scaled latents `[N, C, h, w]`, at evenly spread times and one draw of
    noise."""
    model.eval()
    device = next(model.parameters()).device
    alphas_cumprod = DDPMScheduler.from_config(scheduler).alphas_cumprod.to(device)
    kind = scheduler.prediction_type
    losses = []
    z = latents[:: max(1, len(latents) // VALIDATION)].to(device)
    t = torch.linspace(0, scheduler.num_train_timesteps - 1, len(z), device=device).long()
    for z0, at, first in zip(z.split(64), t.split(64), range(0, len(z), 64), strict=True):
        z_t, target = diffuse(
            z0.contiguous(), at, alphas_cumprod, seed, first_index=first, stream=2**31 - 1, prediction_type=kind
        )
        losses.append((model(z_t, at).float() - target).square().mean((1, 2, 3)))
    return float(torch.cat(losses).mean())


def train_unet(
    unet: UNet2D,
    latents: Tensor,
    scheduler: SchedulerConfig,
    config: TrainConfig,
    context: Context,
    *,
    objective: Objective | None = None,
    held_out: Tensor | None = None,
    pictures: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> UNet2D:
    """Train on scaled latents with `objective`; return the EMA. Source: 001 equations 3 and 4.

    Under torchrun CutMix stays within a process and dropout draws the same masks in each: with neither, their number
    changes only the rounding.
    """
    objective = objective or Objective()
    latents = latents.to(next(unet.parameters()).device)

    def validate(model: nn.Module) -> float:
        assert held_out is not None
        return prediction_error(model, held_out, scheduler, config.seed)

    stage = Stage(
        "unet",
        unet,
        unet_loss(latents, scheduler, objective, config.seed, context.ranks),
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
        recon: reconstruction loss of the autoencoder, `"mse"` or `"l1"`.
        objective: what the UNet is trained on; the mean squared error by default.
        views: the latents of each slice and of `views - 1` augmented copies of it are trained on.
        resume: go on with the run in `folder`, if there is one; the result is that of an uninterrupted run.
        device: of both models.
        progress: whether bars are shown.

    Returns:
        The slices, subjects and scaling factor; of each stage the step that was kept (the last without a validation
        split); and `val_l1`, the mean absolute reconstruction error of the validation split (None if empty).

    Raises:
        UserError: as `Slices`; a folder that holds a run, without `resume`; a checkpoint of another model or of other
            settings.
        NotFinite: a loss or gradient that is not finite.
        OSError: a file could not be written, with the last good checkpoint.
        Stopped: on a signal.
    """
    folder, ranks = Path(folder), Ranks.of_torchrun()
    for config in (vae, unet):
        ranks.check_batch_size(config.batch_size)
    found = checkpoint.checkpoints(folder)
    if found and not resume:
        raise UserError(
            f"{folder} holds a run ({found[-1].name}); allowed is a new folder, or --resume to go on with it"
        )
    rows = read_manifest(data)["slices"]
    slices = {s: Slices(data, s) for s in ("train", "val") if s == "train" or any(row["split"] == s for row in rows)}
    data_digest = hashlib.sha256((Path(data) / "manifest.json").read_bytes()).hexdigest()
    context = Context(folder, ranks, {"data": data_digest}, progress)
    with checkpoint.name_last_checkpoint(folder):
        torch.manual_seed(vae.seed)
        autoencoder = AutoencoderKL(preset.vae).to(device)
        network = UNet2D(preset.unet).to(device)
        train_vae(autoencoder, slices["train"], vae, context, recon=recon, held_out=slices.get("val"))
        latents = encode_splits(autoencoder, slices, views, vae.seed, context)
        factor = float(1 / latents["train"].std())
        autoencoder.config = replace(preset.vae, scaling_factor=factor)
        ema = train_unet(
            network,
            latents["train"] * factor,
            preset.scheduler,
            unet,
            context,
            objective=objective,
            held_out=latents["val"] * factor if "val" in latents else None,
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


def _sample_some(vae: AutoencoderKL, scheduler: SchedulerConfig, unet: nn.Module) -> dict[str, Tensor]:
    assert isinstance(unet, UNet2D)
    pipeline = Pipeline(vae, unet, scheduler)
    # from pure noise: by default so few steps would begin later
    ddim = DDIMScheduler.from_config(scheduler, timestep_spacing="trailing")
    return {"synthetic samples": pipeline.sample(SHOWN, seed=0, steps=20, scheduler=ddim, mode="eager")}
