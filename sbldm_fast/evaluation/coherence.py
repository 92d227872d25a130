"""How alike the neighbouring slices of a volume are: gradients, SSIM and spectra along z.

A volume is its slices `[D, 1, H, W]` in [-1, 1] from the bottom up; `distance` is that of its slices and `spacing` the
side of a pixel, mm. All figures depend on the distance, so only volumes of one distance are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.data.volumes import FOREGROUND
from sbldm_fast.sampling.field import draw_field
from sbldm_fast.sampling.volume import POSITION
from sbldm_fast.training.conditions import values_of

from ..errors import UserError
from . import figures
from .material import Material, height_of
from .metrics import RANGE, check_images, mean_and_std, skimage_metrics

ALIKE = 0.1  # of a distance: how much those that are compared may differ
VOLUMES = 8  # that are compared, at most
LEAST = 8  # slices of a volume that has a spectrum
FINE = 0.5  # of the highest frequency along z: what lies above is called fine


def find_head(volume: Tensor) -> Tensor:
    """Which voxels are head, bool `[D, H, W]`: those above -0.8 and, slice by slice, what they enclose.

    Raises:
        ValueError: as all functions here, another shape, fewer than two slices, or values that are not in [-1, 1].
        ImportError: scikit-image, which brings scipy, is missing (extra eval).
    """
    x = check_images("volume", volume, 2)[:, 0]
    skimage_metrics("find_head")
    from scipy.ndimage import binary_fill_holes

    return torch.from_numpy(np.stack([binary_fill_holes(one) for one in (x > FOREGROUND).numpy()]))


def gradients(volume: Tensor, distance: float, spacing: float) -> tuple[float, float]:
    """The mean magnitude of the gradient along z, and of those along rows and columns, 1/mm: the mean of `|x[k + 1] -
    x[k]|` over neighbours of which at least one is head, over their distance. NaN without head."""
    head = find_head(volume)
    x = check_images("volume", volume, 2)[:, 0].double()

    def steps(axis: int) -> Tensor:
        n = x.shape[axis] - 1
        inside = head.narrow(axis, 0, n) | head.narrow(axis, 1, n)
        return x.diff(dim=axis)[inside].abs()

    return float(steps(0).mean() / distance), float(torch.cat([steps(1), steps(2)]).mean() / spacing)


def neighbour_ssim(volume: Tensor) -> Tensor:
    """SSIM of each slice and the next, float64 `[D - 1]`: the mean of `metrics.ssim`'s map over what is head in at
    least one of them; NaN where nothing is."""
    head = find_head(volume).numpy()
    x = check_images("volume", volume, 2)[:, 0].double().numpy()
    of = skimage_metrics("neighbour_ssim").structural_similarity
    how: dict[str, Any] = {"data_range": RANGE, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    found = []
    for k in range(len(x) - 1):
        inside = head[k] | head[k + 1]
        local = of(x[k], x[k + 1], full=True, **how)[1]
        found.append(float(local[inside].mean()) if inside.any() else math.nan)
    return torch.tensor(found, dtype=torch.float64)


def spectrum_along(volume: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Frequencies, cycles/mm, and the power along z at each, mm; float64 `[D // 2 + 1]` both.

    The mean over the columns that are head in every slice of `2 d |FFT(w (x - mean x))|^2 / sum w^2`, w a Hann window
    of D slices and d their distance, so that its sum over the frequencies, times their distance, is about the variance.
    NaN where no column is head all the way.

    Raises:
        ValueError: fewer than 8 slices.
    """
    head = find_head(volume).all(0)
    x = check_images("volume", volume, LEAST)[:, 0].double()[:, head]
    frequencies = torch.fft.rfftfreq(len(x), distance, dtype=torch.float64)
    if not x.numel():  # which MKL refuses
        return frequencies, torch.full_like(frequencies, math.nan)
    window = torch.hann_window(len(x), periodic=True, dtype=torch.float64)[:, None]
    found = torch.fft.rfft(window * (x - x.mean(0)), dim=0).abs().square() * (2 * distance / window.square().sum())
    return frequencies, found.mean(1)


def measure(volume: Tensor, distance: float, spacing: float) -> dict[str, float]:
    """The figures of one volume: `gradient along z`, 1/mm, and over that within slices; `SSIM of neighbours`, the mean;
    `fine power along z`, the mean above half of the highest frequency, mm."""
    along, within = gradients(volume, distance, spacing)
    frequencies, power = spectrum_along(volume, distance)
    fine = power[frequencies > FINE * frequencies[-1]]
    return {
        "gradient along z": along,
        "gradient along z over that within slices": along / within if within else math.inf,
        "SSIM of neighbours": float(neighbour_ssim(volume).nanmean()),
        "fine power along z": float(fine.mean()),
    }


def choose_comparable(volumes: Sequence[Sequence[float]], most: int) -> tuple[float, list[tuple[int, list[int]]]]:
    """Volumes that can be compared: of the positions of many, mm, the distance that most of them have; and of the
    volumes of this distance, evenly over them and `most` at most, the number and the slices.

    Of finer volumes every second or k-th slice is taken where that comes within a tenth of the distance. Volumes of
    fewer than 8 slices are left out.

    Raises:
        ValueError: no volume of 8 slices.
    """
    own = {i: (p[-1] - p[0]) / (len(p) - 1) for i, p in enumerate(volumes) if len(p) >= LEAST and p[-1] > p[0]}
    if not own:
        raise UserError(f"volumes: got none of {LEAST} slices or more at one distance and at known heights")

    def alike(one: float, distance: float) -> bool:
        return abs(one - distance) <= ALIKE * distance

    best = max(sorted(set(own.values())), key=lambda d: sum(alike(one, d) for one in own.values()))
    found = []
    for i, one in own.items():
        every = max(1, round(best / one))
        kept = list(range(0, len(volumes[i]), every))
        if alike(every * one, best) and len(kept) >= LEAST:
            found.append((i, kept))
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return best, [found[i] for i in chosen]


def coherence(m: Material) -> dict[str, Any]:
    """Whether slices of a volume know each other: real ones, those that were made together, and those that were not."""
    covariates = m.pipeline.unet.config.covariates
    if POSITION not in [c.name for c in covariates]:
        return {"skipped": f"the pipeline knows no {POSITION}: its slices have no place in a volume"}
    volumes = [(held, index) for held in m.held for index in held.volumes]
    heights = [[height_of(held.rows[i]) for i in index.tolist()] for held, index in volumes]
    try:
        distance, chosen = choose_comparable(heights, VOLUMES)
    except UserError as error:
        return {"skipped": f"of the unseen slices, {error}"}
    spacing = m.train.spacing
    found: list[dict[str, dict[str, float]]] = []
    shown: dict[str, Tensor] = {}
    spectra: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for number, (i, kept) in enumerate(chosen):
        held, index = volumes[i][0], volumes[i][1][kept]
        sets = _volumes_like(m, held[index], [held.rows[k] for k in index.tolist()], m.settings.seed + number)
        found.append({name: measure(x, distance, spacing) for name, x in sets.items()})
        shown = shown or sets
        for name, x in sets.items():
            spectra.setdefault(name, []).append(spectrum_along(x, distance))
    note = m.note(f"{len(found)} volumes of each, {distance:.2f} mm between slices")
    figures.save_figure(
        figures.draw_reformats(shown, distance / spacing), m.out, "reformats", m.note("1 volume"), figures.BESIDE
    )
    figures.save_figure(figures.draw_axis_spectra(spectra), m.out, "coherence", note)
    made = [name for name in shown if name != "real"]
    numbers: dict[str, Any] = {"distance of slices, mm": distance, "volumes": len(found)}
    for key in found[0]["real"]:
        numbers |= {f"{key}, {name}": mean_and_std(torch.tensor([f[name][key] for f in found])) for name in shown}
        numbers |= {
            f"{key}, {name} over real": mean_and_std(torch.tensor([f[name][key] / f["real"][key] for f in found]))
            for name in made
        }
    pictures, sentences = ["reformats.svg", "coherence.svg"], _sentences(numbers, distance)
    return {"figures": numbers, "pictures": pictures, "sentences": sentences}


def _volumes_like(m: Material, real: Tensor, rows: list[dict[str, Any]], seed: int) -> dict[str, Tensor]:
    """A real volume, what the autoencoder makes of it, and what the pipeline makes of the same heights and conditions:
    together, of one field of noise alone where there are layers beside it, and each slice for itself."""
    covariates = m.pipeline.unet.config.covariates
    values = values_of(rows, covariates)
    cond = {c.name: [None if v.isnan() else v for v in values[:, i]] for i, c in enumerate(covariates)}
    device = next(m.pipeline.vae.parameters()).device
    with torch.no_grad():
        back = [m.pipeline.vae.decode(m.pipeline.vae.encode(x.to(device)).mean).cpu() for x in real.split(50)]
    how: dict[str, Any] = {"seed": seed, "steps": m.settings.steps, "mode": "eager", "extrapolate": True}
    alone = m.pipeline.sample(len(real), cond=cond, batch_size=25, **how)
    found = {"real": real, "reconstructed": torch.cat(back)}
    heights = [height_of(row) for row in rows]
    if m.pipeline.unet.config.slice_mixing:
        sampler = m.pipeline.sampler(m.settings.steps, "eager")
        noise = draw_field(heights, seed, m.pipeline.latent_shape, device)
        found["noise alone"] = sampler(noise=noise, cond=cond, extrapolate=True, batch_size=25).cpu()
    del cond[POSITION]
    found |= {"together": m.pipeline.sample_volume(positions=heights, cond=cond, **how), "independent": alone}
    return {name: x.clamp(-1, 1) for name, x in found.items()}


def _sentences(numbers: dict[str, Any], distance: float) -> list[str]:
    """How far from real scans, mean and standard error over volumes."""

    def text(key: str, name: str) -> str:
        one = numbers[f"{key}, {name} over real"]
        return f"{one['mean']:.2f} ± {one['std'] / max(1, one['n']) ** 0.5:.2f}"

    names = ("together", "noise alone", "independent", "reconstructed")
    there = [name for name in names if f"gradient along z, {name}" in numbers]
    told = [
        f"{key}: {', '.join(f'{name} {text(key, name)}' for name in there)}"
        for key in ("gradient along z", "SSIM of neighbours", "fine power along z")
    ]
    return [
        f"All volumes have a slice each {distance:.2f} mm, within {100 * ALIKE:.0f} %; those that were made have the"
        " heights and the conditions of a real one, volume by volume.",
        f"Over that of the real volume (standard errors over volumes): {'; '.join(told)}.",
    ]
