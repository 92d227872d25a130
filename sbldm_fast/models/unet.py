"""The noise-prediction network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU

from .config import UNetConfig
from .layers import Attention, Downsample, ResBlock, Upsample
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

    def forward(self, t: Tensor) -> Tensor:
        # float32 whatever the weights are: a half has no room for 999 times a frequency
        angle = t.float()[:, None] * self.frequencies.float()
        h = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear1.weight.dtype)
        out: Tensor = self.linear2(F.silu(self.linear1(h)))
        return out


class UNet2D(Pretrained[UNetConfig]):
    """The model's prediction (epsilon, x0 or v) from a noisy latent and its timestep.

    `[N, in_channels, S, S]`, t in 0 ... T-1  ->  `[N, out_channels, S, S]`.

    Time enters each residual block through one scale and shift: a linear layer per width, shared by the blocks of that
    width, plus an offset of the block's own (adaLN-single, Chen et al. 2023, arXiv:2310.00426, section 2.3). `time_rows`
    gives all of them at once as one row, so that a sampler computes the rows of all its steps before its loop and calls
    `forward_rows` inside it. Source of the rest: paper 001 section III.B.2.
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        sides = [config.sample_size >> i for i in range(len(widths))]

        def attention(level: int) -> nn.Module:
            attends = sides[level] in config.attention_resolutions
            return Attention(widths[level], config.attention_head_dim, groups) if attends else nn.Identity()

        def block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, groups, config.dropout)

        self.time_embedding = TimeEmbedding(config)
        self.time_to_row = nn.ModuleList(nn.Linear(config.time_embed_dim, 2 * width) for width in widths)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        skips, channels = [widths[0]], widths[0]
        self.down, levels = nn.ModuleList(), []
        for level, width in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(layers):
                stage.append(nn.ModuleList([block(channels, width), attention(level)]))
                channels = width
                skips.append(channels)
                levels.append(level)
            if level < len(widths) - 1:
                stage.append(Downsample(channels))
                skips.append(channels)
            self.down.append(stage)
        self.mid = nn.ModuleList(
            [block(channels, channels), Attention(channels, config.attention_head_dim, groups), block(channels, channels)]
        )
        levels += [len(widths) - 1] * 2
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            stage = nn.ModuleList()
            for _ in range(layers + 1):
                stage.append(nn.ModuleList([block(channels + skips.pop(), widths[level]), attention(level)]))
                channels = widths[level]
                levels.append(level)
            if level > 0:
                stage.append(Upsample(channels))
            self.up.append(stage)
        self.norm_out = GroupNormSiLU(groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self._row_levels = levels
        self.row_offsets = nn.Parameter(torch.zeros(sum(2 * widths[level] for level in levels)))

    def time_rows(self, t: Tensor) -> Tensor:
        """The scale and shift of every block: `[N]` timesteps to `[N, R]`, block after block, each scale then shift."""
        h = F.silu(self.time_embedding(t))
        rows = [linear(h) for linear in self.time_to_row]
        return torch.cat([rows[level] for level in self._row_levels], dim=1) + self.row_offsets

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """The prediction from a latent and its row of `time_rows`, `[N, R]` or `[1, R]` for a shared timestep."""
        at = 0

        def run(block: nn.Module, attention: nn.Module, h: Tensor) -> Tensor:
            nonlocal at
            width = block.conv2.out_channels
            scale, shift = rows[:, at : at + width], rows[:, at + width : at + 2 * width]
            at += 2 * width
            out: Tensor = attention(block(h, scale, shift))
            return out

        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for layer in stage:
                h = run(*layer, h) if isinstance(layer, nn.ModuleList) else layer(h)
                skips.append(h)
        h = run(self.mid[0], self.mid[1], h)
        h = run(self.mid[2], nn.Identity(), h)
        for stage in self.up:
            for layer in stage:
                h = run(*layer, torch.cat([h, skips.pop()], dim=1)) if isinstance(layer, nn.ModuleList) else layer(h)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out

    def forward(self, x: Tensor, t: Tensor | int, cond: None = None) -> Tensor:
        """The prediction for timestep `t`: an int, a scalar tensor or `[N]`; `cond` waits for a conditional preset.

        Raises:
            ValueError: a wrong shape of `x` or `t`, or a `cond` that this model has no input for.
        """
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.config.in_channels}, H, W]")
        if cond is not None:
            raise ValueError("cond: got a value, allowed is None: this model is unconditional")
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"t: got {t.shape[0]} timesteps, allowed is 1 or the batch, {x.shape[0]}")
        return self.forward_rows(x, self.time_rows(t))
