"""The named presets: the three configurations of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sbldm_fast.diffusion.config import SchedulerConfig

from ..errors import UserError
from .config import UNetConfig, VAEConfig
from .covariates import Covariate


class Preset(NamedTuple):
    """The three configurations of a pipeline."""

    vae: VAEConfig
    unet: UNetConfig
    scheduler: SchedulerConfig


_LATENT = SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False)
# at t = T, a = 6e-4, and x0 from a noise prediction has 40 times its error: ours predict v, the documents' as they do
_V = replace(_LATENT, prediction_type="v_prediction")
# what `prepare` knows, over the ranges of adults; `train --condition` takes those of its data instead
COVARIATES = (
    Covariate("age", low=18.0, high=90.0, unit="years"),
    Covariate("sex", ("F", "M")),
    Covariate("ventricle_volume", low=5.0, high=150.0, unit="ml", definition="of the lateral ventricles"),
    Covariate("modality", ("FLAIR", "T1", "T2")),
    Covariate("position", low=-75.0, high=75.0, unit="mm", definition="height of the slice above z = 0 of ICBM 152"),
)
PRESETS: dict[str, Preset] = {
    "paper": Preset(VAEConfig(), UNetConfig(), _LATENT),
    "template": Preset(
        VAEConfig(latent_channels=4, block_out_channels=(32, 64, 128)),
        UNetConfig(
            sample_size=32, in_channels=4, out_channels=4, attention_resolutions=(16,), time_embedding_type="fourier"
        ),
        SchedulerConfig(beta_schedule="gamma", clip_sample=False),
    ),
    "covariates": Preset(VAEConfig(), UNetConfig(covariates=COVARIATES), _V),
    "volume": Preset(VAEConfig(), UNetConfig(covariates=COVARIATES, slice_mixing=True), _V),
    "demo": Preset(
        VAEConfig(block_out_channels=(16, 32, 64, 96), layers_per_block=1),
        UNetConfig(
            block_out_channels=(32, 64, 128), attention_head_dim=32, norm_num_groups=8, time_embed_dim=256, dropout=0.0
        ),
        _V,
    ),
    # document 003's volumes: 160 slices of 160 x 224 pixels of 1 mm, latents of 28 x 20
    "brain": Preset(
        VAEConfig(sample_size=(224, 160), block_out_channels=(16, 32, 64, 96), layers_per_block=1, spacing=1.0),
        UNetConfig(
            sample_size=(28, 20),
            block_out_channels=(32, 64, 128),
            attention_resolutions=(14, 7),
            attention_head_dim=32,
            norm_num_groups=16,  # by 8 a norm of 7 x 5 pixels spills a register
            time_embed_dim=256,
            dropout=0.0,
            covariates=COVARIATES,
            slice_mixing=True,
        ),
        _V,
    ),
}


def preset(name: str) -> Preset:
    """The configurations known as `paper` (001), `template` (000), `covariates` (003), `volume` (the same, with layers
    that mix the slices of a volume), `demo` (the bundled weights') or `brain` (volumes of 003's size).

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, allowed are {', '.join(PRESETS)}")
    return PRESETS[name]
