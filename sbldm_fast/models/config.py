"""The configurations of the models."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..errors import UserError

# beyond any model of these kinds: what a file may ask for before its weights are looked at
SHAPE_BOUNDS = {
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "latent_channels": (1, 4096),
    "sample_size": (1, 8192),
    "layers_per_block": (1, 64),
    "block_out_channels": (1, 16384),
    "attention_resolutions": (1, 8192),
    "attention_head_dim": (1, 16384),
    "norm_num_groups": (1, 16384),
    "time_embed_dim": (2, 65536),
    "scaling_factor": (1e-6, 1e6),
}


def _check_groups(name: str, widths: tuple[int, ...], num_groups: int) -> None:
    if not 1 <= len(widths) <= 12:
        raise UserError(f"{name}: block_out_channels is {widths}, allowed are 1 to 12 widths")
    for width in widths:
        if width % num_groups:
            raise UserError(f"{name}: norm_num_groups is {num_groups}, allowed are divisors of every width in {widths}")


@dataclass(frozen=True)
class VAEConfig(Config):
    """Shape of an `AutoencoderKL`: `[N, in_channels, sample_size, sample_size]` to `latent_channels` at `latent_size`.

    One stride-2 convolution follows each width but the last. `scaling_factor` is 1/std of the training latents.
    """

    in_channels: int = 1
    sample_size: int = 128
    latent_channels: int = 8
    block_out_channels: tuple[int, ...] = (32, 64, 128, 256)
    layers_per_block: int = 2
    norm_num_groups: int = 8
    mid_attention: bool = False
    scaling_factor: float = 1.0

    BOUNDS = SHAPE_BOUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups("VAEConfig", self.block_out_channels, self.norm_num_groups)
        if self.sample_size % 2 ** (len(self.block_out_channels) - 1):
            raise UserError(f"VAEConfig: sample_size is {self.sample_size}, allowed are multiples of 2^downsamplings")

    @property
    def latent_size(self) -> int:
        """Side of the latent in pixels."""
        return self.sample_size >> (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class UNetConfig(Config):
    """Shape of a `UNet2D` on `[N, in_channels, sample_size, sample_size]`.

    `attention_resolutions` are sides in pixels; the middle block always attends. `time_embedding_type` is
    `"positional"` (sinusoids of t) or `"fourier"` (random frequencies of t/1000, as in template 000 section 3.4).
    """

    sample_size: int = 16
    in_channels: int = 8
    out_channels: int = 8
    block_out_channels: tuple[int, ...] = (64, 128, 256)
    layers_per_block: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    time_embed_dim: int = 512
    time_embedding_type: str = "positional"
    dropout: float = 0.1

    BOUNDS = SHAPE_BOUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups("UNetConfig", self.block_out_channels, self.norm_num_groups)
        if self.sample_size % 2 ** (len(self.block_out_channels) - 1):
            raise UserError(f"UNetConfig: sample_size is {self.sample_size}, allowed are multiples of 2^downsamplings")
        if self.time_embedding_type not in ("positional", "fourier"):
            raise UserError(
                f"UNetConfig: time_embedding_type is {self.time_embedding_type!r}, allowed are positional, fourier"
            )
        if any(width % self.attention_head_dim for width in self.block_out_channels):
            raise UserError(
                f"UNetConfig: attention_head_dim is {self.attention_head_dim}, allowed are divisors of"
                f" {self.block_out_channels}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"UNetConfig: dropout is {self.dropout}, allowed is 0 up to 1")
