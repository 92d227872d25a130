"""An endless population of brains from the ICBM 152 tissue maps that nilearn carries, with known covariates.

A brain is the template's grey and white matter, pulled by a smooth random deformation and by a dilation of the lateral
ventricles, given the contrast of a modality, a bias field and Rician noise. Synthetic, not for diagnosis.
Template: Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtra
from .volumes import Volume, orient

# relative intensity of grey matter, white matter and fluid: what the eye expects of the contrast, not a signal equation
CONTRASTS = {"T1": (0.60, 0.95, 0.18), "T2": (0.55, 0.38, 1.00), "FLAIR": (0.80, 0.62, 0.12)}
STEP = 2  # mm
DEFINITIONS = {
    "age": {
        "unit": "years",
        "definition": "of a made brain: its ventricles dilate with it, by a rule of the generator",
    },
    "sex": {"definition": "of a made brain: F is smaller than M by 4 %, by a rule of the generator"},
    "ventricle_volume": {
        "unit": "ml",
        "definition": "of the lateral ventricles of the whole brain: the sum of their map over its voxels",
    },
}
LATERAL_VENTRICLES = (14.0, -13.0, 0.0)  # mm, z, y, x of their middle in the template


@cache
def tissue_maps() -> tuple[Tensor, float]:
    """Grey matter, white matter, brain mask and lateral ventricles at 2 mm, `[4, z, y, x]`, and the position of slice 0
    in mm."""
    from scipy import ndimage

    atlas = _nilearn_datasets()
    images = [
        f(resolution=STEP)
        for f in (atlas.load_mni152_gm_template, atlas.load_mni152_wm_template, atlas.load_mni152_brain_mask)
    ]
    gm, wm, mask = (np.asarray(i.dataobj, dtype=np.float32).transpose(2, 1, 0).clip(0, 1) for i in images)
    fluid = (mask - gm - wm).clip(0, 1)
    parts, count = ndimage.label(fluid > 0.5)
    middles = np.array(ndimage.center_of_mass(fluid, parts, range(1, count + 1)))
    origin = images[0].affine[[2, 1, 0], 3]
    ventricles = 1 + np.linalg.norm(origin + STEP * middles - LATERAL_VENTRICLES, axis=1).argmin()
    return torch.from_numpy(np.stack([gm, wm, mask, fluid * (parts == ventricles)])), float(origin[0])


def _nilearn_datasets() -> Any:
    try:
        from nilearn import datasets
    except ImportError:
        raise MissingExtra("mni152 and synthetic", "nilearn", "data") from None
    return datasets


def _smooth_field(generator: torch.Generator, channels: int, coarse: int, shape: torch.Size) -> Tensor:
    noise = torch.randn(1, channels, coarse, coarse, coarse, generator=generator)
    return F.interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)[0]


def synthetic_brain(index: int, seed: int = 0) -> tuple[Volume, str, dict[str, float | str]]:
    """Brain number `index`: its volume, its modality and its covariates; see `synthetic_brain_with_ventricles`."""
    return synthetic_brain_with_ventricles(index, seed)[:3]


def synthetic_brain_with_ventricles(
    index: int, seed: int = 0
) -> tuple[Volume, str, dict[str, float | str], np.ndarray]:
    """Brain number `index`: its volume, its modality, its covariates and the map of its lateral ventricles `[x, y, z]`.

    `ventricle_volume`, ml, is that of the lateral ventricles as they are in this brain. At their middle they dilate by
    0.85 to 1.45 times with `age` (20 to 85), and by 0.67 to 1.82 times whatever the age; `sex` scales the head by 4 %.
    They are rules of this generator, not of biology.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + index)
    maps, origin_z = tissue_maps()
    shape = maps.shape[1:]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=rng))

    age, sex = uniform(20, 85), "F" if uniform(0, 1) < 0.5 else "M"
    # people of one age differ more in their ventricles than ages do; a model must not take one for the other
    dilation = (0.85 + 0.6 * (age - 20) / 65) * math.exp(uniform(-0.4, 0.6))
    modality = list(CONTRASTS)[int(uniform(0, 3 - 1e-6))]

    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij"))  # z, y, x
    centre = torch.tensor([-0.08, 0.03, 0.0]).reshape(3, 1, 1, 1)  # that of the lateral ventricles
    radius2 = ((grid - centre) / torch.tensor([0.4, 0.5, 0.4]).reshape(3, 1, 1, 1)).square().sum(0)
    shrink = 1 - (1 - 1 / dilation) * torch.exp(-radius2)  # sampling nearer the centre enlarges what lies there
    warp = 0.035 * _smooth_field(rng, 3, 5, shape) + 0.012 * _smooth_field(rng, 3, 11, shape)
    size = torch.tensor([uniform(0.94, 1.06) for _ in range(3)]).reshape(3, 1, 1, 1) * (0.98 if sex == "M" else 1.02)
    where = (centre + (grid - centre) * shrink) * size + warp
    gm, wm, mask, ventricles = F.grid_sample(maps[None], where.flip(0).permute(1, 2, 3, 0)[None], align_corners=True)[0]

    fluid = (mask - gm - wm).clamp(0, 1)
    gains = [g * uniform(0.93, 1.07) for g in CONTRASTS[modality]]
    image = gains[0] * gm + gains[1] * wm + gains[2] * fluid
    image = image * (1 + 0.06 * _smooth_field(rng, 1, 3, shape)[0]).clamp(min=0.5)
    sigma = uniform(0.008, 0.025)
    noise = sigma * torch.randn(2, *shape, generator=rng)
    image = ((image + noise[0]).square() + noise[1].square()).sqrt() * (mask > 0.5)
    array = image.numpy().transpose(2, 1, 0)
    volume_ml = float(ventricles.sum()) * STEP**3 / 1000
    covariates: dict[str, float | str] = {"age": round(age, 1), "sex": sex, "ventricle_volume": round(volume_ml, 2)}
    volume = Volume(array, (STEP, STEP, STEP), origin_z, STEP, array.shape)
    return volume, modality, covariates, ventricles.numpy().transpose(2, 1, 0)


def mni152() -> Volume:
    """The ICBM 152 T1 template, skull-stripped, at 1 mm."""
    image = _nilearn_datasets().load_mni152_template(resolution=1)
    return orient(np.asarray(image.dataobj, dtype=np.float32), image.affine)
