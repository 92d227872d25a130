"""The first stage: the autoencoder on slices, and the latents that it gives the second."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.errors import UserError
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.models import AutoencoderKL, DiagonalGaussian, VAEConfig
from sbldm_fast.models.weights import digest_weights, read_tensors, write_tensors

from .config import TrainConfig
from .run import SHOWN, VALIDATION, Context, Stage, train

KL_WEIGHT = 1e-5
KL_EPOCHS = 20  # linear anneal
EDGE_SCALES = 3


def refuse_misfits(config: VAEConfig, data: Slices) -> None:
    """Refuse, as `UserError`, slices of another size or, where both are known, spacing than an autoencoder's."""
    apart = config.spacing and data.spacing and not math.isclose(config.spacing, data.spacing, rel_tol=1e-3)
    if config.size != data.size or apart:
        got, allowed = (
            f"{width} x {height} pixels" + (f" of {mm:.4g} mm" if apart else "")
            for (height, width), mm in ((data.size, data.spacing), (config.size, config.spacing))
        )
        spacing = f" --spacing {config.spacing:g}" if config.spacing else ""
        raise UserError(
            f"data: got slices of {got}, allowed with this autoencoder are {allowed}:"
            f" prepare --size {config.size[1]}x{config.size[0]}{spacing}"
        )


def zoom(draws: Tensor) -> Tensor:
    """How many times larger than the image what `augment` samples is, `[N]`, by its `draws`."""
    return 1 + 0.05 * (2 * draws[:, 1] - 1)


def augment(x: Tensor, draws: Tensor) -> Tensor:
    """Flips (left-right), rotations (10 degrees), shifts and scales (5 %) of images `[N, 1, H, W]`, by uniform `draws`
    `[N, 5]`.

    Source: 001 III.A.
    """
    within = 2 * draws - 1
    angle, scale = within[:, 0] * math.radians(10), zoom(draws)
    flip = torch.where(within[:, 2] < 0, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # a shift of 5 % of the side is 0.1 in grid units of -1 to 1; these are of the width along x and of the height along
    # y, and a turn is one of pixels
    tall = x.shape[2] / x.shape[3]
    theta = torch.stack(
        [cos * flip, -sin * tall, 0.1 * within[:, 3], sin * flip / tall, cos, 0.1 * within[:, 4]], dim=1
    ).view(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside the image is air, -1


def l1_with_edges(y: Tensor, x: Tensor) -> Tensor:
    """`|y - x|` plus the mean over three scales of `|grad y - grad x|` of images `[N, 1, H, W]`, per element.

    Scales are halvings by 2x2 means, gradients differences of neighbours. Source: the multi-scale gradient matching of
    Li & Snavely 2018, arXiv:1804.00607, section 4.2, on intensities.
    """
    error = y - x
    edges = error.new_zeros(())
    for scale in range(EDGE_SCALES):
        e = F.avg_pool2d(error, 2**scale) if scale else error
        edges = edges + e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean()
    return error.abs().mean() + edges / EDGE_SCALES


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "l1_edges": l1_with_edges,
}


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
        UserError: `recon` is none of `RECONSTRUCTION`.
    """
    if recon not in RECONSTRUCTION:
        raise UserError(f"recon: got {recon!r}, allowed are {', '.join(RECONSTRUCTION)}")
    distance = RECONSTRUCTION[recon]
    ranks = context.ranks
    device = next(vae.parameters()).device
    data = data.to(device)
    latent = vae.config.latent_shape
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
        return reconstruction_error(vae, held_out, F.mse_loss if recon == "mse" else F.l1_loss)

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
def encode(vae: AutoencoderKL, data: Slices, views: int, seed: int, progress: bool = True) -> tuple[Tensor, Tensor]:
    """Posterior means of the slices and of `views - 1` augmented copies of each, unscaled: `[views * N, C, h, w]`; and
    the factor of each one's area, `[views * N]`."""
    vae.eval()
    device = next(vae.parameters()).device
    torch.manual_seed(seed)
    out, areas = [], []
    for view in tqdm(range(views), desc="encode", unit="view", disable=not progress):
        for index in torch.arange(len(data), device=data.index.device).split(64):
            x = data[index].to(device)
            draws = torch.rand(len(x), 5, device=device) if view else None
            out.append(vae.encode(x if draws is None else augment(x, draws)).mean)
            areas.append(torch.ones(len(x), device=device) if draws is None else zoom(draws) ** -2)
    return torch.cat(out), torch.cat(areas)


def encode_splits(
    vae: AutoencoderKL, data: dict[str, Slices], views: int, seed: int, context: Context
) -> dict[str, Tensor]:
    """The latents of each split, and as `areas_<split>` the factors of their areas, encoded once: a resumed run reads
    them back if weights, slices and views are the same."""
    made_of = {"stamp": context.settings["data"], "views": views, "seed": seed, "vae": digest_weights(vae), "areas": 1}
    path = context.folder / "latents"
    if context.ranks.rank == 0 and not (path.exists() and read_json(path / "state.json") == made_of):
        latents: dict[str, Tensor] = {}
        for split, slices in data.items():
            z, areas = encode(vae, slices, views if split == "train" else 1, seed, context.progress)
            latents |= {split: z.contiguous(), f"areas_{split}": areas}
        with whole_folder(path, lose=True) as aside:
            write_tensors(latents, aside / "latents.safetensors")
            write_json(aside / "state.json", made_of)
    if dist.is_initialized():
        dist.barrier()
    return read_tensors(path / "latents.safetensors")
