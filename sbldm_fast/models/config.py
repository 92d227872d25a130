"""The configurations of the models."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar, Self

from ..config import Config
from ..errors import UserError
from .covariates import Covariate

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
    "spacing": (0.0, 100.0),
    "concat_channels": (0, 4096),
}
CONDITIONING = ("adaln", "cross_attention", "context", "concat")
Size = int | tuple[int, int]  # a side of a square, or (height, width)


def _check_groups(name: str, widths: tuple[int, ...], num_groups: int) -> None:
    if not 1 <= len(widths) <= 12:
        raise UserError(f"{name}: block_out_channels is {widths}, allowed are 1 to 12 widths")
    for width in widths:
        if width % num_groups:
            raise UserError(f"{name}: norm_num_groups is {num_groups}, allowed are divisors of every width in {widths}")


def check_divides(argument: str, size: tuple[int, int], stride: int) -> None:
    """Refuse, as `UserError`, a `(height, width)` that is no multiple of a stride in pixels, with the nearest that
    are."""
    for side in size:
        if side % stride:
            below = side // stride * stride
            nearest = f"{below} or {below + stride}" if below else f"{stride}"
            raise UserError(
                f"{argument} is {size[0] if size[0] == size[1] else size}, allowed are multiples of {stride}, the"
                f" stride: {nearest} for {side}"
            )


class _Sized(Config):
    """A configuration with a `sample_size`: one number of a square, `(height, width)` of another; two that are alike
    become one, so that a model has one configuration."""

    PAIRS = ("sample_size",)
    sample_size: Size
    block_out_channels: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sample_size, int):
            height, width = self.sample_size
            object.__setattr__(self, "sample_size", height if height == width else (height, width))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size

    @property
    def stride(self) -> int:
        """What divides height and width: `2^downsamplings`, one after each width but the last."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class VAEConfig(_Sized):
    """Shape of an `AutoencoderKL`: `[N, in_channels, H, W]` to `latent_channels` at `latent_size`.

    `sample_size` is the side of a square or `(H, W)`. One stride-2 convolution follows each width but the last.
    `scaling_factor` is 1/std of the training latents, `spacing` the side of a pixel in mm, 0 where it is unknown.
    """

    in_channels: int = 1
    sample_size: Size = 128
    latent_channels: int = 8
    block_out_channels: tuple[int, ...] = (32, 64, 128, 256)
    layers_per_block: int = 2
    norm_num_groups: int = 8
    mid_attention: bool = False
    scaling_factor: float = 1.0
    spacing: float = 0.0

    BOUNDS = SHAPE_BOUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups("VAEConfig", self.block_out_channels, self.norm_num_groups)
        check_divides("VAEConfig: sample_size", self.size, self.stride)

    def to_dict(self) -> dict[str, Any]:
        """As every configuration's; without `spacing` where it is unknown."""
        content = super().to_dict()
        if not content["spacing"]:
            del content["spacing"]
        return content

    @property
    def latent_size(self) -> Size:
        """Side of the latent in pixels, or its `(height, width)`."""
        height, width = (side // self.stride for side in self.size)
        return height if height == width else (height, width)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of one latent."""
        height, width = self.size
        return self.latent_channels, height // self.stride, width // self.stride


@dataclass(frozen=True)
class UNetConfig(_Sized):
    """Shape of a `UNet2D` on `[N, in_channels, H, W]`; `sample_size` is the side of a square or `(H, W)`.

    `attention_resolutions` are sides in pixels, of what is not square heights; the middle block always attends.
    `time_embedding_type` is
    `"positional"` (sinusoids of t) or `"fourier"` (random frequencies of t/1000, as in template 000 section 3.4).

    `covariates` are what the model may be asked for, `conditioning` how they enter: `"adaln"`, as rows added to those
    of time; `"cross_attention"`, as a learned token each, at the attention resolutions; `"context"`, as one token of
    their values in 0 to 1; `"concat"`, as planes of these values beside x. Document 003's brains have the last two
    (Pinaya et al. 2022, arXiv:2209.07162). `concat_channels` counts maps that are concatenated to x as they are given.

    `slice_mixing` adds layers that mix the slices of a volume along z (`models.slices`).

    `distilled_steps` are the model calls that a distilled network knows, 0 of another; `distilled_guidance` is the
    guidance scale that was folded into it.
    """

    sample_size: Size = 16
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
    covariates: tuple[Covariate, ...] = ()
    conditioning: tuple[str, ...] = ("adaln",)
    concat_channels: int = 0
    slice_mixing: bool = False
    distilled_steps: int = 0
    distilled_guidance: float = 1.0

    BOUNDS = SHAPE_BOUNDS | {"distilled_steps": (0, 1000), "distilled_guidance": (-100.0, 100.0)}
    LIKE: ClassVar[dict[str, Any]] = {"covariates": (Covariate(),)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """As every configuration's; each of `covariates` is a mapping."""
        listed = content.get("covariates", [])
        if not isinstance(listed, (list, tuple)) or not all(isinstance(c, dict) for c in listed):
            raise UserError("UNetConfig: covariates are allowed to be a list of mappings")
        return super().from_dict({**content, "covariates": [Covariate.from_dict(c) for c in listed]})

    def to_dict(self) -> dict[str, Any]:
        """As every configuration's; of a model without conditions as it was before there were any."""
        content = super().to_dict()
        for name, absent in (
            ("covariates", ()),
            ("conditioning", ("adaln",)),
            ("concat_channels", 0),
            ("slice_mixing", False),
            ("distilled_steps", 0),
            ("distilled_guidance", 1.0),
        ):
            if content[name] == absent:
                del content[name]
        return content

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one sample."""
        return self.in_channels, *self.size

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level attend, as those of the middle always do."""
        return self.size[0] >> level in self.attention_resolutions

    @property
    def conditional(self) -> bool:
        """Whether there is anything to ask for."""
        return bool(self.covariates or self.concat_channels)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [c.name for c in self.covariates]
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"UNetConfig: covariates are {short(names)}, allowed are different names")
        both = {"cross_attention", "context"} <= set(self.conditioning)
        if not self.conditioning or not set(self.conditioning) <= set(CONDITIONING) or both:
            raise UserError(
                f"UNetConfig: conditioning is {short(self.conditioning)}, allowed are some of"
                f" {', '.join(CONDITIONING)}, and of cross_attention and context one"
            )
        _check_groups("UNetConfig", self.block_out_channels, self.norm_num_groups)
        check_divides("UNetConfig: sample_size", self.size, self.stride)
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
