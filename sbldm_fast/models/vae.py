"""The autoencoder between images and latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU

from ..errors import UserError
from .config import VAEConfig
from .layers import Attention, Chain, Downsample, ResBlock
from .weights import Pretrained


class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, exp(logvar)), `mean` and `logvar` of shape `[N, C, h, w]`."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """`mean + exp(logvar / 2) * noise`."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """`KL(q || N(0, 1))` in nats, summed over each latent: `[N]`. Source: Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class AutoencoderKL(Pretrained[VAEConfig]):
    """A convolutional variational autoencoder: image `[N, 1, H, W]` in [-1, 1] to latent and back.

    Latents are raw here; the pipeline multiplies by `config.scaling_factor`. Source: paper 001 section III.B.1, with
    three downsamplings (four would give 8x8, not the 16x16 that it states).
    """

    config_class = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block

        def attention() -> nn.Module:
            return Attention(widths[-1], widths[-1], groups) if config.mid_attention else nn.Identity()

        encoder: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(layers):
                encoder.append(ResBlock(channels, width, groups))
                channels = width
            if level < len(widths) - 1:
                encoder.append(Downsample(channels))
        encoder += [
            attention(),
            GroupNormSiLU(groups, channels),
            nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1),
        ]
        self.encoder = Chain(*encoder)

        decoder: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels, 3, padding=1), attention()]
        for level in reversed(range(len(widths))):
            for _ in range(layers):
                decoder.append(ResBlock(channels, widths[level], groups))
                channels = widths[level]
            if level > 0:
                decoder.append(nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1))
        decoder += [GroupNormSiLU(groups, channels), nn.Conv2d(channels, config.in_channels, 3, padding=1)]
        self.decoder = Chain(*decoder)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of an image.

        Raises:
            ValueError: `x` is not `[N, in_channels, H, W]` of the configuration's `sample_size`.
        """
        c = self.config
        if x.dim() != 4 or tuple(x.shape[1:]) != (c.in_channels, *c.size):
            raise UserError(f"x: got shape {tuple(x.shape)}, allowed is [N, {c.in_channels}, {c.size[0]}, {c.size[1]}]")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """The image in [-1, 1] of an unscaled latent.

        Raises:
            ValueError: `z` is not `[N, latent_channels, h, w]`.
        """
        if z.dim() != 4 or z.shape[1] != self.config.latent_channels:
            raise UserError(f"z: got shape {tuple(z.shape)}, allowed is [N, {self.config.latent_channels}, h, w]")
        out: Tensor = self.decoder(z).tanh()
        return out
