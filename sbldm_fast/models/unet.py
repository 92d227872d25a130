"""The noise-prediction network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU

from ..errors import UserError
from .config import UNetConfig
from .layers import Attention, Downsample, ResBlock, Sum, Upsample, convolve, normalize
from .weights import Pretrained


class TimeEmbedding(nn.Module):
    """`[N]` timesteps to `[N, time_embed_dim]`: sinusoids or random Fourier features, then two linear layers."""

    frequencies: Tensor

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        half = config.block_out_channels[0] // 2
        if config.time_embedding_type == "fourier":
            frequencies = 2 * math.pi * 16 * torch.randn(half, generator=torch.Generator().manual_seed(0)) / 1000
        else:
            frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies)
        self.linear1 = nn.Linear(2 * half, config.time_embed_dim)
        self.linear2 = nn.Linear(config.time_embed_dim, config.time_embed_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # float32 whatever the weights become: rounded to half, 999 times a frequency is wrong by 0.2 radians
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies
        h = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear1.weight.dtype)
        out: Tensor = self.linear2(F.silu(self.linear1(h)))
        return out


class _Block(nn.Module):
    """A residual block that takes time's scale and shift, then attention if there is any."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention or nn.Identity()

    def forward(self, x: Sum, scale: Tensor, shift: Tensor) -> tuple[Tensor, Sum]:
        """The block's input, added up, and its output."""
        entered, h = self.block(x, scale, shift)
        return entered, self.attention(h)


class UNet2D(Pretrained[UNetConfig]):
    """The model's prediction (epsilon, x0 or v) from a noisy latent and its timestep.

    `[N, in_channels, S, S]`, t in 0 ... T-1  ->  `[N, out_channels, S, S]`.

    Time enters each residual block through one scale and shift: a linear layer per width, shared by the blocks of that
    width, plus an offset of the block's own (adaLN-single, Chen et al. 2023, arXiv:2310.00426, section 2.3).
    `time_rows` gives all of them at once as one row, so that a sampler computes the rows of all its steps before its
    loop and calls `forward_rows` inside it. Source of the rest: paper 001 section III.B.2.
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        last = len(widths) - 1
        levels: list[int] = []  # of each block, in the order in which forward meets them

        def block(in_channels: int, level: int, attends: bool) -> _Block:
            levels.append(level)
            attention = Attention(widths[level], config.attention_head_dim, groups) if attends else None
            return _Block(ResBlock(in_channels, widths[level], groups, config.dropout), attention)

        def attends(level: int) -> bool:
            return config.sample_size >> level in config.attention_resolutions

        self.time_embedding = TimeEmbedding(config)
        self.time_to_row = nn.ModuleList(nn.Linear(config.time_embed_dim, 2 * width) for width in widths)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        channels = widths[0]
        skips = [channels]
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(
                nn.ModuleList(block(channels if i == 0 else width, level, attends(level)) for i in range(layers))
            )
            channels = width
            skips += [width] * (layers if level == last else layers + 1)
            if level < last:
                self.downsample.append(Downsample(width))
        self.mid = nn.ModuleList([block(channels, last, True), block(channels, last, False)])
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in range(last, -1, -1):
            stage = nn.ModuleList()
            for _ in range(layers + 1):
                stage.append(block(channels + skips.pop(), level, attends(level)))
                channels = widths[level]
            self.up.append(stage)
            if level > 0:
                self.upsample.append(Upsample(channels))
        self.norm_out = GroupNormSiLU(groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self._levels = levels
        self._row_widths = [widths[level] for level in levels for _ in ("scale", "shift")]
        self.row_offsets = nn.Parameter(torch.zeros(sum(self._row_widths)))

    def time_rows(self, t: Tensor) -> Tensor:
        """The scale and shift of every block: `[N]` timesteps to `[N, R]`, block after block, each scale then shift."""
        h = F.silu(self.time_embedding(t))
        rows = [linear(h) for linear in self.time_to_row]
        return torch.cat([rows[level] for level in self._levels], dim=1) + self.row_offsets

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """The prediction from a latent and its row of `time_rows`, `[N, R]` or `[1, R]` for a shared timestep."""
        time = iter(rows.split(self._row_widths, dim=1))
        h = convolve(self.conv_in, x)
        # what enters each block and each downsampling; a block's output is one when the next has added it up
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            for block in stage.children():
                entered, h = block(h, next(time), next(time))
                skips.append(entered)
            if level < len(self.downsample):
                skips.append(h.total())
                down = self.downsample[level]
                assert isinstance(down, nn.Conv2d)
                h = convolve(down, skips[-1])
        for i, block in enumerate(self.mid):
            entered, h = block(h, next(time), next(time))
            skips += [entered] * (i == 0)
        for level, stage in enumerate(self.up):
            for block in stage.children():
                _, h = block(Sum(torch.cat([h.total(), skips.pop()], dim=1)), next(time), next(time))
            if level < len(self.upsample):
                h = Sum(self.upsample[level](h.total()))
        out: Tensor = self.conv_out(normalize(self.norm_out, h))
        return out

    def forward(self, x: Tensor, t: Tensor | int, cond: None = None) -> Tensor:
        """The prediction for timestep `t`: an int, a scalar tensor or `[N]`; `cond` waits for a conditional preset.

        Raises:
            ValueError: a wrong shape of `x` or `t`, or a `cond` that this model has no input for.
        """
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise UserError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.config.in_channels}, H, W]")
        if cond is not None:
            raise UserError("cond: got a value, allowed is None: this model is unconditional")
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise UserError(f"t: got {t.shape[0]} timesteps, allowed is 1 or the batch, {x.shape[0]}")
        return self.forward_rows(x, self.time_rows(t))
