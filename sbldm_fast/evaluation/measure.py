"""What is in a slice of a brain: how much lateral ventricle, at which height, of which contrast; by a network that is
trained on made brains, whose labels are exact. Thresholds fail on such images: r is .58 at best.

A figure of it is worth what its own error on brains that it has not seen allows, so `Ceiling` stands beside each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast.data.frame import FRAME, Frame
from sbldm_fast.data.readers import TOP
from sbldm_fast.data.synthetic import CONTRASTS, STEP, synthetic_brain_with_ventricles
from sbldm_fast.data.volumes import axial_slices_with
from sbldm_fast.models import AutoencoderKL, VAEConfig
from sbldm_fast.models.config import check_divides

from ..errors import UserError

MODALITIES = tuple(CONTRASTS)
HALF = 70.0  # mm, by which heights are scaled
SEED = 1_000_000  # of the brains that it is trained on; those that it is judged by have the next one
BATCH, RATE = 32, 4e-3
LATENT_NOISE = 0.5  # standard deviations, at most, by which half of the latents that it learns from are off
FAINT = 0.2  # shares of ventricle below it are none: a thousandth of 4,096 places would be 50 mm^2


class Reading(NamedTuple):
    """Of each slice the area of the lateral ventricles, mm^2, its height, mm, and its modality's place in
    `MODALITIES`: all `[N]`."""

    area: Tensor
    position: Tensor
    modality: Tensor


@dataclass(frozen=True)
class Brains:
    """Slices `[N, 1, H, W]` in [-1, 1] of made brains, their ventricles `[N, 1, H, W]` in [0, 1], and of each
    slice its height, its modality's place and its brain's number, with the volume of each brain's ventricles, ml."""

    slices: Tensor
    ventricles: Tensor
    position: Tensor
    modality: Tensor
    brain: Tensor
    volume: Tensor


class Measurer(nn.Module):
    """`[N, 1, H, W]`, slices of a frame whose sides are multiples of 8, to the share of ventricle in each of H/2 x W/2
    places, a height and a modality."""

    gain: Tensor

    def __init__(self, width: int = 16, frame: Frame = FRAME) -> None:
        super().__init__()
        self.frame = frame
        self.register_buffer("gain", torch.ones(()))  # of an area as it is to one as read

        def block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
            )

        w = width
        self.first = nn.Sequential(block(1, w, 2), block(w, w))
        self.second = nn.Sequential(block(w, 2 * w, 2), block(2 * w, 2 * w))
        self.third = nn.Sequential(block(2 * w, 4 * w, 2), block(4 * w, 4 * w))
        self.last = nn.Sequential(block(4 * w, 4 * w, 2), block(4 * w, 4 * w))
        self.up = block(4 * w + 2 * w, 2 * w)
        self.out = nn.Sequential(block(2 * w + w, w), nn.Conv2d(w, 1, 1))
        self.about = nn.Linear(4 * w * 16, 1 + len(MODALITIES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of ventricle `[N, 1, H/2, W/2]`, heights over `HALF` `[N]`, logits of modalities."""
        a = self.first(x)
        b = self.second(a)
        c = self.third(b)
        about = self.about(F.adaptive_avg_pool2d(self.last(c), 4).flatten(1))
        up = self.up(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        logits = self.out(torch.cat([F.interpolate(up, scale_factor=2.0), a], 1))
        return logits, about[:, 0], about[:, 1:]

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """What images `[N, 1, H, W]` in [-1, 1] show."""
        self.eval()
        parts = []
        for x in images.split(64):
            logits, height, modality = self(x)
            share = logits.float().sigmoid()
            area = (share * (share > FAINT)).sum((1, 2, 3)) * (2 * self.frame.spacing) ** 2
            parts.append(Reading(area * self.gain, height * HALF, modality.argmax(1)))
        return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def frame_of(config: VAEConfig) -> Frame:
    """What the slices of an autoencoder show; one of 128 x 128 pixels whose spacing is unknown is of an earlier
    version, which had one.

    Raises:
        ValueError: another one of unknown spacing, or sides that are no multiples of 8.
    """
    check_divides("pipeline: its size", config.size, 8)
    if not config.spacing and config.size != FRAME.size:
        raise UserError("pipeline: its spacing is not known, allowed is a vae/config.json with spacing, mm a pixel")
    return Frame(*config.size, config.spacing or FRAME.spacing)


def make_brains(count: int, seed: int, every: int = 1, frame: Frame = FRAME) -> Brains:
    """`count` made brains of a seed, every n-th slice of each."""
    found = []
    volumes = []
    for i in range(count):
        volume, modality, covariates, ventricles = synthetic_brain_with_ventricles(i, seed)
        slices, positions, maps = axial_slices_with(volume, ventricles, frame)
        assert maps is not None
        heights = positions - positions.max() + TOP
        kind = np.full(len(slices), MODALITIES.index(modality))
        found.append(
            (slices[::every], maps[::every], heights[::every], kind[::every], np.full(len(slices), i)[::every])
        )
        volumes.append(float(covariates["ventricle_volume"]))
    slices, maps, heights, kinds, brains = (np.concatenate(part) for part in zip(*found, strict=True))
    return Brains(
        torch.from_numpy(slices)[:, None].float(),
        torch.from_numpy(maps)[:, None].float(),
        torch.from_numpy(heights).float(),
        torch.from_numpy(kinds).long(),
        torch.from_numpy(brains).long(),
        torch.tensor(volumes),
    )


def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images with another brightness, contrast, blur and noise each, and every second one mirrored."""
    n = len(x)
    gain, shift, blur, noise = torch.rand(4, n, 1, 1, 1, generator=generator).unbind(0)
    x = x.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), blur * (blur < 0.7))
    x = (x + 1) * (0.85 + 0.3 * gain) - 1 + 0.1 * (shift - 0.5)
    return (x + 0.06 * noise * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """What the autoencoder makes of images, its blur none of what a UNet does wrong; with `noise` `[N]` of latents that
    are off by as many of their standard deviations, as a UNet's are."""
    torch.manual_seed(0)
    levels = torch.zeros(len(images)) if noise is None else noise / vae.config.scaling_factor
    out = []
    for x, level in zip(images.split(32), levels.split(32), strict=True):
        z = vae.encode(x).mean
        out.append(vae.decode(z + level[:, None, None, None] * torch.randn(z.shape)))
    return torch.cat(out)


def train_measurer(vae: AutoencoderKL, *, brains: int = 64, steps: int = 1200, progress: bool = True) -> Measurer:
    """A measurer trained on every other slice of made brains that nothing else has seen, half of them as the
    autoencoder decodes them from latents that are a little off; some minutes of one core."""
    frame = frame_of(vae.config)
    made = make_brains(brains, SEED, every=2, frame=frame)
    generator = torch.Generator().manual_seed(0)
    levels = LATENT_NOISE * torch.rand(len(made.slices), generator=generator)
    shown = torch.cat([made.slices, reconstruct(vae, made.slices, levels)])
    share = F.avg_pool2d(made.ventricles, 2)
    torch.manual_seed(0)
    model = Measurer(frame=frame)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in tqdm(range(steps), desc="measurer", unit="step", disable=not progress):
        index = torch.randint(len(shown), (BATCH,), generator=generator)
        of = index % len(share)
        x, target = distort(shown[index], generator), share[of]
        if bool(torch.rand(1, generator=generator) < 0.5):
            x, target = x.flip(3), target.flip(3)
        logits, height, modality = model(x.contiguous(memory_format=torch.channels_last))
        p = logits.sigmoid()
        # Dice's coefficient beside the cross entropy, which alone is small where most places are none
        overlap = (2 * (p * target).sum() + 1) / (p.square().sum() + target.square().sum() + 1)
        loss = F.binary_cross_entropy_with_logits(logits, target) * 10 + (1 - overlap)
        loss = loss + F.smooth_l1_loss(height, made.position[of] / HALF) * 10
        loss = loss + F.cross_entropy(modality, made.modality[of])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    read, known = model.read(shown).area, share.sum((1, 2, 3)).repeat(2) * (2 * frame.spacing) ** 2
    model.gain = (read * known).sum() / read.square().sum().clamp(min=1e-9)
    model.eval()
    return model


def volumes(area: Tensor, brain: Tensor, count: int, distance: float) -> Tensor:
    """The volume of each brain's ventricles, ml, from the areas of its slices, mm^2, `distance` mm from one another."""
    return torch.zeros(count).index_add(0, brain, area) * distance / 1000


def measure_ceiling(model: Measurer, vae: AutoencoderKL | None, brains: int = 40) -> dict[str, float]:
    """How well a measurer reads made brains that nobody has seen, as they are or as the autoencoder gives them back:
    what it says of slices 4 mm apart against what is known."""
    made = make_brains(brains, SEED + 1, every=2, frame=model.frame)
    read = model.read(made.slices if vae is None else reconstruct(vae, made.slices))
    found = volumes(read.area, made.brain, brains, 2 * STEP)
    return {
        "brains": brains,
        "slices": len(made.slices),
        "ventricle_r": correlation(made.volume, found),
        "ventricle_bias_ml": float((found - made.volume).mean()),
        "position_r": correlation(made.position, read.position),
        "modality_accuracy": float((read.modality == made.modality).float().mean()),
    }


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's r."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])
