"""The configurations of the models and the named presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from reprlib import repr as short  # what a file holds may be of any length, and no text for a terminal
from typing import Any, ClassVar, NamedTuple, Self

from ..errors import UserError


@dataclass(frozen=True)
class Config:
    """A frozen dataclass that goes to and from the JSON of a `config.json`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, tuples as lists, with the class's name as diffusers writes it."""
        return {"_class_name": type(self).__name__.removesuffix("Config"), **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The configuration in `content`; keys that begin with an underscore are passed over.

        Raises:
            ValueError: a key that this configuration does not have, or a value of another type or out of bounds.
        """
        names = {f.name for f in fields(cls)}
        # betas as an array
        listed = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in content.items() if not k.startswith("_")}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()}
        if unknown := given.keys() - names:
            raise UserError(
                f"{cls.__name__}: got {', '.join(short(k) for k in sorted(unknown))}, allowed are"
                f" {', '.join(sorted(names))}"
            )
        return cls(**given)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, likes = getattr(self, f.name), getattr(self, "LIKE", {}).get(f.name, f.default)
            if f.default is None and value is None:
                continue
            several = isinstance(likes, tuple)
            if several and not isinstance(value, (tuple, list)):
                raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is one like {likes!r}")
            for one in value if several else (value,):
                like = likes[0] if several else likes
                kinds = (int, float) if isinstance(like, float) else type(like)
                # True is an int to Python, and to nobody else
                if not isinstance(one, kinds) or isinstance(one, bool) != isinstance(like, bool):
                    raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is one like {likes!r}")
                if isinstance(one, (int, float)) and not abs(one) < math.inf:
                    raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed are finite numbers")
            least, most = BOUNDS.get(f.name, (None, None))
            if least is not None and not all(least <= one <= most for one in (value if several else (value,))):
                raise UserError(f"{type(self).__name__}: {f.name} is {short(value)}, allowed is {least} to {most}")


# beyond any model of these kinds: what a file may ask for before its weights are looked at
BOUNDS = {
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
    "num_train_timesteps": (1, 100_000),
    "steps_offset": (0, 100_000),
    "clip_sample_range": (1e-6, 1e6),
    "scaling_factor": (1e-6, 1e6),
    "gamma": (1e-3, 1e3),
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


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """What a scheduler needs, under diffusers' names and with its defaults; our presets do not clip, latents are not in
    [-1, 1].

    Beyond diffusers: the schedules `cosine_ramp`, `cosine` and `gamma` with `gamma` and `normalise` (see
    `NoiseSchedule`); `prev`, the timestep that a step of DDIM leads to (see `previous_timestep`); `compat="monai"`,
    MONAI's timesteps.
    """

    BETA_SCHEDULES: ClassVar = ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine_ramp", "cosine", "gamma")

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    gamma: float = 0.5
    normalise: str = "none"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    prev: str = "stride"
    compat: str = "diffusers"

    LIKE: ClassVar = {"trained_betas": (1e-4,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("beta_schedule", self.BETA_SCHEDULES),
            ("prediction_type", ("epsilon", "sample", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
            ("thresholding", (False,)),
            ("variance_type", ("fixed_small",)),
            ("prev", ("stride", "lookup")),
            ("compat", ("diffusers", "monai")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: got {short(getattr(self, name))}, allowed are {', '.join(map(str, allowed))}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"beta_start, beta_end: got {self.beta_start}, {self.beta_end}, allowed is 0 < start <= end < 1"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"trained_betas: got {len(self.trained_betas)}, allowed is num_train_timesteps ="
                f" {self.num_train_timesteps}"
            )
        if self.trained_betas is not None and not all(0 < beta < 1 for beta in self.trained_betas):
            raise UserError("trained_betas: got one that is not between 0 and 1, allowed are betas above 0 and below 1")


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
