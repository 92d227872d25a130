"""The two stages: the autoencoder on slices, then the UNet on its latents."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.diffusion import DDPMScheduler
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.kernels import diffuse
from sbldm_fast.models import AutoencoderKL, DiagonalGaussian, UNet2D
from sbldm_fast.models.config import Preset, SchedulerConfig
from sbldm_fast.models.weights import read_tensors, write_tensors

from ..errors import UserError
from . import checkpoint
from .loop import LossOf, Optimisation, train
from .objective import Objective
from .ranks import Ranks

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
    o: Optimisation,
    folder: Path,
    *,
    recon: str = "mse",
    held_out: Slices | None = None,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Train in place on `recon + beta * KL`, both per element, beta from 0 to 1e-5 over 20 epochs. Source: 001 equation
    1.

    Raises:
        ValueError: `recon` is neither `"mse"` nor `"l1"`.
    """
    if recon not in ("mse", "l1"):
        raise UserError(f"recon: got {recon!r}, allowed are mse, l1")
    distance = F.mse_loss if recon == "mse" else F.l1_loss
    ranks = Ranks.of_torchrun()
    device = next(vae.parameters()).device
    data = data.to(device)
    c = vae.config
    anneal = KL_EPOCHS * max(1, len(data) // o.batch_size)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # every process draws for the whole batch and takes its part: their number changes nothing
        draws = torch.rand(len(index), 5, device=device)
        noise = torch.randn(len(index), c.latent_channels, c.latent_size, c.latent_size, device=device)
        x = augment(data[ranks.own(index)], ranks.own(draws))
        y, mean, logvar = (t.float() for t in model(x, ranks.own(noise)))
        error = distance(y, x)
        kl = DiagonalGaussian(mean, logvar).kl().mean() / mean[0].numel()
        return error + KL_WEIGHT * (step[0] / anneal).clamp(max=1) * kl, {recon: error, "kl": kl}

    def validate(model: nn.Module) -> float:
        assert held_out is not None
        return reconstruction_error(vae, held_out, distance)

    def pictures(model: nn.Module) -> dict[str, Tensor]:
        x = data[torch.linspace(0, len(data) - 1, SHOWN, device=data.index.device).long()]
        with torch.no_grad():
            return {"slices": x, "synthetic reconstructions": vae.decode(vae.encode(x).mean)}

    train(
        _Autoencode(vae),
        loss_of,
        len(data),
        o,
        folder,
        name="vae",
        validate=validate if held_out else None,
        pictures=pictures,
        extra={"recon": recon, "vae": c.to_dict(), **(extra or {})},
        progress=progress,
    )
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


def _latents(
    vae: AutoencoderKL, data: dict[str, Slices], folder: Path, views: int, seed: int, stamp: str, progress: bool
) -> dict[str, Tensor]:
    """The latents of each split, encoded once: a run that goes on reads them back if weights, slices and views are the
    same."""
    made_of = {"stamp": stamp, "views": views, "seed": seed, "vae": _digest(vae)}
    path = folder / "latents"
    if Ranks.of_torchrun().rank == 0 and not (path.exists() and read_json(path / "state.json") == made_of):
        latents = {
            split: encode(vae, slices, views if split == "train" else 1, seed, progress)
            for split, slices in data.items()
        }
        with whole_folder(path, lose=True) as aside:
            write_tensors({k: v.contiguous() for k, v in latents.items()}, aside / "latents.safetensors")
            write_json(aside / "state.json", made_of)
    if dist.is_initialized():
        dist.barrier()
    return read_tensors(path / "latents.safetensors")


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unet_loss(latents: Tensor, scheduler: SchedulerConfig, objective: Objective, seed: int) -> LossOf:
    """The loss of scaled latents `[N, C, h, w]` at uniform times, all in fused ops: noise, target, weights, bands."""
    ranks = Ranks.of_torchrun()
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


def train_unet(
    unet: UNet2D,
    latents: Tensor,
    scheduler: SchedulerConfig,
    o: Optimisation,
    folder: Path,
    *,
    objective: Objective | None = None,
    held_out: Tensor | None = None,
    pictures: Any = None,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
) -> UNet2D:
    """Train on scaled latents with `objective`; return the EMA. Source: 001 equations 3 and 4.

    Under torchrun CutMix stays within a process and dropout draws the same masks in each: with neither, their number
    changes only the rounding.
    """
    objective = objective or Objective()
    device = next(unet.parameters()).device
    alphas_cumprod = DDPMScheduler.from_config(scheduler).alphas_cumprod.to(device)
    kind, T = scheduler.prediction_type, scheduler.num_train_timesteps
    loss_of = unet_loss(latents.to(device), scheduler, objective, o.seed)

    @torch.no_grad()
    def validate(model: nn.Module) -> float:
        """The plain error of the prediction at evenly spread times and one draw of noise."""
        assert held_out is not None
        model.eval()
        losses = []
        z = held_out[:: max(1, len(held_out) // VALIDATION)].to(device)
        t = torch.linspace(0, T - 1, len(z), device=device).long()
        for z0, at, first in zip(z.split(64), t.split(64), range(0, len(z), 64), strict=True):
            z_t, target = diffuse(
                z0.contiguous(), at, alphas_cumprod, o.seed, first_index=first, stream=2**31 - 1, prediction_type=kind
            )
            losses.append((model(z_t, at).float() - target).square().mean((1, 2, 3)))
        return float(torch.cat(losses).mean())

    trained = train(
        unet,
        loss_of,
        len(latents),
        o,
        folder,
        name="unet",
        validate=None if held_out is None else validate,
        pictures=pictures,
        extra={"unet": unet.config.to_dict(), "scheduler": scheduler.to_dict(), **asdict(objective), **(extra or {})},
        progress=progress,
    )
    assert isinstance(trained, UNet2D)
    return trained


def train_pipeline(
    preset: Preset,
    data: str | Path,
    folder: str | Path,
    *,
    vae: Optimisation,
    unet: Optimisation,
    recon: str = "mse",
    objective: Objective | None = None,
    views: int = 4,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train both stages on a prepared folder and save the pipeline to `folder/pipeline`.

    `resume`: go on with the run in `folder`, if there is one; the result is that of an uninterrupted run. Started by
    torchrun, every process takes its part of each batch.

    Returns:
        The slices, subjects and scaling factor; of each stage the step that was kept (the last without a validation
        split); and `val_l1`, the mean absolute reconstruction error of the validation split (None if empty).

    Raises:
        ValueError: as `Slices`; a folder that holds a run, without `resume`; a checkpoint of another model or of other
            settings.
        FloatingPointError: a loss or gradient that is not finite.
        OSError: a file could not be written, with the last good checkpoint.
        Stopped: on a signal.
    """
    from sbldm_fast.sampling.pipeline import Pipeline

    folder, size = Path(folder), Ranks.of_torchrun().size
    for o in (vae, unet):
        if o.batch_size % size:
            raise UserError(f"batch_size: got {o.batch_size}, allowed are multiples of the {size} processes")
    found = checkpoint.checkpoints(folder)
    if found and not resume:
        raise UserError(
            f"{folder} holds a run ({found[-1].name}); allowed is a new folder, or --resume to go on with it"
        )
    manifest = read_manifest(data)
    splits = [s for s in ("train", "val") if s == "train" or any(row["split"] == s for row in manifest["slices"])]
    slices = {split: Slices(data, split) for split in splits}
    stamp = {"data": hashlib.sha256((Path(data) / "manifest.json").read_bytes()).hexdigest()}
    with checkpoint.naming(folder):
        torch.manual_seed(vae.seed)
        autoencoder = AutoencoderKL(preset.vae).to(device)
        network = UNet2D(preset.unet).to(device)
        train_vae(
            autoencoder,
            slices["train"],
            vae,
            folder,
            recon=recon,
            held_out=slices.get("val"),
            extra=stamp,
            progress=progress,
        )
        latents = _latents(autoencoder, slices, folder, views, vae.seed, stamp["data"], progress)
        factor = float(1 / latents["train"].std())
        autoencoder.config = replace(preset.vae, scaling_factor=factor)

        def pictures(model: nn.Module) -> dict[str, Tensor]:
            assert isinstance(model, UNet2D)
            return {
                "synthetic samples": (
                    Pipeline(autoencoder, model, preset.scheduler).sample(SHOWN, seed=0, steps=20, mode="eager")
                )
            }

        ema = train_unet(
            network,
            latents["train"] * factor,
            preset.scheduler,
            unet,
            folder,
            objective=objective,
            pictures=pictures,
            held_out=latents["val"] * factor if "val" in latents else None,
            extra=stamp,
            progress=progress,
        )
        if Ranks.of_torchrun().rank == 0:
            Pipeline(autoencoder, ema, preset.scheduler).save(folder / "pipeline")
    kept = {name: checkpoint.kept(folder, name, o.steps) for name, o in (("vae", vae), ("unet", unet))}
    return {
        "slices": len(slices["train"]),
        "subjects": len({row["subject"] for row in slices["train"].rows}),
        "scaling_factor": factor,
        "kept_steps": kept,
        "val_l1": reconstruction_error(autoencoder, slices["val"]) if "val" in slices else None,
    }
