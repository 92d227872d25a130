"""The named presets: the three configurations of a pipeline."""

from __future__ import annotations

from typing import NamedTuple

from sbldm_fast.diffusion.config import SchedulerConfig

from ..errors import UserError
from .config import UNetConfig, VAEConfig


class Preset(NamedTuple):
    """The three configurations of a pipeline."""

    vae: VAEConfig
    unet: UNetConfig
    scheduler: SchedulerConfig


_LATENT = SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False)
PRESETS: dict[str, Preset] = {
    "paper": Preset(VAEConfig(), UNetConfig(), _LATENT),
    "template": Preset(
        VAEConfig(latent_channels=4, block_out_channels=(32, 64, 128)),
        UNetConfig(
            sample_size=32, in_channels=4, out_channels=4, attention_resolutions=(16,), time_embedding_type="fourier"
        ),
        SchedulerConfig(beta_schedule="gamma", clip_sample=False),
    ),
    "demo": Preset(
        VAEConfig(block_out_channels=(16, 32, 64, 96), layers_per_block=1),
        UNetConfig(
            block_out_channels=(32, 64, 128), attention_head_dim=32, norm_num_groups=8, time_embed_dim=256, dropout=0.0
        ),
        _LATENT,
    ),
}


def preset(name: str) -> Preset:
    """The configurations known as `paper` (001), `template` (000) or `demo` (the bundled weights).

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, allowed are {', '.join(PRESETS)}")
    return PRESETS[name]
