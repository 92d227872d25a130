"""The two stages: the autoencoder on slices, then the UNet on its latents."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.diffusion import DDPMScheduler
from sbldm_fast.files import read_json
from sbldm_fast.models import AutoencoderKL, DiagonalGaussian, UNet2D
from sbldm_fast.models.config import Preset

from .loop import Optimisation, train

KL_WEIGHT = 1e-5
KL_EPOCHS = 20  # linear anneal


def augment(x: Tensor) -> Tensor:
    """Random flips (left-right), rotations (10 degrees), shifts and scales (5 %) of images `[N, 1, S, S]`. Source: 001 III.A."""
    n = x.shape[0]

    def within(limit: float) -> Tensor:
        return (2 * torch.rand(n, device=x.device) - 1) * limit

    angle, scale = within(math.radians(10)), 1 + within(0.05)
    flip = torch.where(torch.rand(n, device=x.device) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # a shift of 5 % of the side is 0.1 in grid units of -1 to 1
    theta = torch.stack([cos * flip, -sin, within(0.1), sin * flip, cos, within(0.1)], dim=1).view(n, 2, 3)
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


def train_vae(vae: AutoencoderKL, data: Slices, o: Optimisation, folder: Path, *, recon: str = "mse", progress: bool = True) -> None:
    """Train in place on `recon + beta * KL`, both per element, beta from 0 to 1e-5 over 20 epochs. Source: 001 equation 1.

    Raises:
        ValueError: `recon` is neither `"mse"` nor `"l1"`.
    """
    if recon not in ("mse", "l1"):
        raise ValueError(f"recon: got {recon!r}, allowed are mse, l1")
    device = next(vae.parameters()).device
    images = data.images.to(device)
    c = vae.config
    anneal = KL_EPOCHS * max(1, len(data) // o.batch_size)

    def loss_of(model: nn.Module, index: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        x = augment(images[index.to(device)].float())
        noise = torch.randn(len(x), c.latent_channels, c.latent_size, c.latent_size, device=device)
        y, mean, logvar = model(x, noise)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        error = F.mse_loss(y, x) if recon == "mse" else F.l1_loss(y, x)
        kl = DiagonalGaussian(mean, logvar).kl().mean() / mean[0].numel()
        return error + KL_WEIGHT * min(1.0, step / anneal) * kl, {recon: float(error.detach()), "kl": float(kl.detach())}

    train(_Autoencode(vae), loss_of, len(data), o, folder, name="vae", progress=progress)
    vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, views: int, seed: int, progress: bool = True) -> Tensor:
    """Posterior means of the images and of `views - 1` augmented copies of each, unscaled: `[views * N, C, h, w]`."""
    device = next(vae.parameters()).device
    torch.manual_seed(seed)
    out = []
    for view in tqdm(range(views), desc="encode", unit="view", disable=not progress):
        for chunk in images.split(64):
            x = chunk.to(device).float()
            out.append(vae.encode(augment(x) if view else x).mean)
    return torch.cat(out)


def train_unet(unet: UNet2D, latents: Tensor, preset: Preset, o: Optimisation, folder: Path, progress: bool = True) -> UNet2D:
    """Train on scaled latents with the simple loss `mean |target - prediction|^2`; return the EMA. Source: 001 equation 3."""
    device = next(unet.parameters()).device
    latents = latents.to(device)
    scheduler = DDPMScheduler.from_config(preset.scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)  # else every step copies the table there
    kind = preset.scheduler.prediction_type

    def loss_of(model: nn.Module, index: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        x0 = latents[index.to(device)]
        noise = torch.randn_like(x0)
        t = torch.randint(preset.scheduler.num_train_timesteps, (len(x0),), device=device)
        target = noise if kind == "epsilon" else x0 if kind == "sample" else scheduler.get_velocity(x0, noise, t)
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).float(), target), {}

    trained = train(unet, loss_of, len(latents), o, folder, name="unet", progress=progress)
    assert isinstance(trained, UNet2D)
    return trained


def train_pipeline(
    preset: Preset, data: str | Path, folder: str | Path, *, vae: Optimisation, unet: Optimisation, recon: str = "mse",
    views: int = 4, device: torch.device | str = "cpu", progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train both stages on a prepared folder and save the pipeline to `folder/pipeline`; a run that was cut off is continued.

    Returns:
        The slices, subjects and scaling factor, and the mean absolute reconstruction error of the validation split (None if empty).

    Raises:
        ValueError: as `Slices`, or a checkpoint of another model.
        FloatingPointError: a loss that is not finite.
    """
    from sbldm_fast.sampling.pipeline import Pipeline

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    slices = Slices(data)
    torch.manual_seed(vae.seed)
    autoencoder = AutoencoderKL(preset.vae).to(device)
    network = UNet2D(preset.unet).to(device)
    train_vae(autoencoder, slices, vae, folder, recon=recon, progress=progress)
    latents = encode(autoencoder, slices.images, views, vae.seed, progress)
    factor = float(1 / latents.std())
    autoencoder.config = replace(preset.vae, scaling_factor=factor)
    ema = train_unet(network, latents * factor, preset, unet, folder, progress)
    pipeline = Pipeline(autoencoder, ema, preset.scheduler)
    pipeline.save(folder / "pipeline")
    return {"slices": len(slices), "subjects": len({row["subject"] for row in slices.rows}), "scaling_factor": factor,
            "val_l1": reconstruction_error(autoencoder, data)}  # fmt: skip


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, data: str | Path) -> float | None:
    """Mean absolute error of the validation slices through the autoencoder, in units of [-1, 1]; None if there are none."""
    rows = read_json(Path(data) / "manifest.json")["slices"]
    if not any(row["split"] == "val" for row in rows):
        return None
    device = next(vae.parameters()).device
    chunks = [chunk.to(device).float() for chunk in Slices(data, "val").images.split(64)]
    return float(torch.cat([(vae.decode(vae.encode(x).mean) - x).abs().mean(dim=(1, 2, 3)) for x in chunks]).mean())
