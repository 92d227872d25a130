"""The noise-prediction network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU, mix_slices

from ..errors import UserError
from .config import UNetConfig, check_divides
from .covariates import MAPS, CovariateEmbedding, encode, unit_range
from .layers import Attention, CrossAttention, Downsample, ResBlock, Sum, Upsample, convolve, normalize
from .slices import MIXING, SLICE, SliceAttention, distance_bias, number_volumes
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
    """A residual block that takes time's scale and shift, then attention and mixing along z if there are any."""

    def __init__(
        self,
        block: ResBlock,
        attention: Attention | None,
        cross: CrossAttention | None,
        slices: SliceAttention | None,
    ) -> None:
        super().__init__()
        self.block, self.attention = block, attention or nn.Identity()
        self.cross, self.slices = cross, slices

    def forward(
        self,
        x: Sum,
        scale: Tensor,
        shift: Tensor,
        keys_values: Tensor | None,
        taps: Tensor,
        slices: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Sum]:
        """The block's input, added up, and its output."""
        entered, h = self.block(x, scale, shift)
        h = self.attention(h)
        if self.cross is not None and keys_values is not None:
            h = self.cross(h, keys_values)
        if slices is not None:
            volumes, bias = slices
            h = Sum(mix_slices(h.x, taps.unflatten(1, (3, -1)), volumes, h.conv_bias, h.residual))
            h = h if self.slices is None else self.slices(h, bias)
        return entered, h


class Conditioning(nn.Module):
    """What a condition becomes before the first step: rows that are added to those of time, tokens for
    cross-attention, planes beside x."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.covariates, ways = config.covariates, config.conditioning
        dim = config.time_embed_dim
        self.context_dim = 0
        if "adaln" in ways or "cross_attention" in ways:
            self.embedding = CovariateEmbedding(config.covariates, dim)
        if "adaln" in ways:
            self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.to_row = nn.ModuleList(nn.Linear(dim, 2 * width) for width in config.block_out_channels)
            for linear in self.to_row:  # at first a model without a condition
                assert isinstance(linear, nn.Linear)
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        if "cross_attention" in ways or "context" in ways:
            self.context_dim = dim if "cross_attention" in ways else len(self.covariates)
        if "context" in ways or "concat" in ways:
            self.unknown_value = nn.Parameter(torch.zeros(len(self.covariates)))

    def scaled(self, values: Tensor) -> Tensor:
        """Covariates `[N, K]` in 0 to 1, what is unknown at a value that is learned."""
        columns = zip(self.covariates, values.unbind(1), strict=True)
        out = torch.stack([0.5 + 0.5 * unit_range(c, v) for c, v in columns], dim=1)
        return torch.where(values.isnan(), self.unknown_value, out.to(self.unknown_value.dtype))


class UNet2D(Pretrained[UNetConfig]):
    """The model's prediction (epsilon, x0 or v) from a noisy latent and its timestep.

    `[N, in_channels, H, W]`, t in 0 ... T-1  ->  `[N, out_channels, H, W]`, of any height and width that its stride
    divides.

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
        conditioning = Conditioning(config) if config.covariates else None
        context_dim = 0 if conditioning is None else conditioning.context_dim
        planes = len(config.covariates) if "concat" in config.conditioning else 0
        levels: list[int] = []  # of each block, in the order in which forward meets them

        def block(in_channels: int, level: int, attends: bool) -> _Block:
            levels.append(level)
            width, head_dim = widths[level], config.attention_head_dim
            attention = Attention(width, head_dim, groups) if attends else None
            cross = CrossAttention(width, head_dim, groups, context_dim) if attends and context_dim else None
            slices = config.slice_mixing and attends and level == last
            along_z = SliceAttention(width, head_dim, groups) if slices else None
            return _Block(ResBlock(in_channels, width, groups, config.dropout), attention, cross, along_z)

        self.time_embedding = TimeEmbedding(config)
        self.time_to_row = nn.ModuleList(nn.Linear(config.time_embed_dim, 2 * width) for width in widths)
        self.conv_in = nn.Conv2d(config.in_channels + planes + config.concat_channels, widths[0], 3, padding=1)
        channels = widths[0]
        skips = [channels]
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(
                nn.ModuleList(block(channels if i == 0 else width, level, config.attends(level)) for i in range(layers))
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
                stage.append(block(channels + skips.pop(), level, config.attends(level)))
                channels = widths[level]
            self.up.append(stage)
            if level > 0:
                self.upsample.append(Upsample(channels))
        self.norm_out = GroupNormSiLU(groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self._levels = levels
        self._row_widths = [widths[level] for level in levels for _ in ("scale", "shift")]
        self.row_offsets = nn.Parameter(torch.zeros(sum(self._row_widths)))
        self.conditioning = conditioning
        self._mix_widths = [3 * widths[level] for level in levels] if config.slice_mixing else []
        if config.slice_mixing:
            dim = config.time_embed_dim
            self.time_to_mix = nn.ModuleList(nn.Linear(dim, 3 * width, bias=False) for width in widths)
            for linear in self.time_to_mix:  # at first a model of single slices
                assert isinstance(linear, nn.Linear)
                nn.init.zeros_(linear.weight)
            self.mix_offsets = nn.Parameter(torch.zeros(sum(self._mix_widths)))
            for name, parameter in self.named_parameters():  # `training.train_volume` trains these alone, others do not
                parameter.requires_grad_(not MIXING.search(name))
        self._slice_heads = widths[last] // config.attention_head_dim
        self._crosses = [m for m in self.modules() if isinstance(m, CrossAttention)]

    def time_rows(self, t: Tensor) -> Tensor:
        """The scale and shift of every block: `[N]` timesteps to `[N, R]`, block after block, each scale then shift;
        with `slice_mixing` the three weights of each block's channels along z follow."""
        h = F.silu(self.time_embedding(t))
        rows = [linear(h) for linear in self.time_to_row]
        out = torch.cat([rows[level] for level in self._levels], dim=1) + self.row_offsets
        if not self.config.slice_mixing:
            return out
        # a mean over h, not a sum: a step of the optimizer moves it as far as it moves an offset
        taps = [linear(h / h.shape[1]) for linear in self.time_to_mix]
        return torch.cat([out, torch.cat([taps[level] for level in self._levels], dim=1) + self.mix_offsets], dim=1)

    def condition(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `forward_rows` takes of a condition, the same at every step: a sampler makes it before its loop.

        `cond` maps names of covariates to `[N]`, categories by their place in `values`, NaN where unknown; `maps` to
        `[N, concat_channels, H, W]`, `slice` to numbers of slices `[N]`. Of what is made `rows` `[N, R]` is added to
        the rows of time, `keys_values` `[N, L, S]` are those of all cross-attentions, `planes` `[N, K, 1, 1]` and
        `maps` go beside x, `volumes` int32 `[N]` tells which rows are slices of one volume, `distances` how far
        from one another (`distance_bias`).
        """
        made: dict[str, Tensor] = {}
        if SLICE in cond:
            made["volumes"] = number_volumes(cond[SLICE])
            made["distances"] = distance_bias(made["volumes"], self._slice_heads)
        if self.config.concat_channels:
            made[MAPS] = cond[MAPS]
        if self.conditioning is None:
            return made
        ways, c = self.config.conditioning, self.conditioning
        values = torch.stack([cond[one.name].float() for one in self.config.covariates], dim=1)
        embedded = "adaln" in ways or "cross_attention" in ways
        tokens: Tensor = c.embedding(values) if embedded else c.scaled(values)[:, None]
        if "adaln" in ways:
            h = F.silu(c.linear2(F.silu(c.linear1(tokens.sum(1)))))
            rows = [linear(h) for linear in c.to_row]
            made["rows"] = torch.cat([rows[level] for level in self._levels], dim=1)
        if c.context_dim:
            context = c.scaled(values)[:, None] if "context" in ways else tokens
            made["keys_values"] = torch.cat([cross.to_kv(context) for cross in self._crosses], dim=2)
        if "concat" in ways:
            made["planes"] = c.scaled(values)[:, :, None, None]
        return made

    def forward_rows(self, x: Tensor, rows: Tensor, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        """The prediction from a latent and its row of `time_rows`, `[N, R]` or `[1, R]` for a shared timestep, and what
        `condition` made."""
        given = condition or {}
        rows, taps = rows.split([sum(self._row_widths), sum(self._mix_widths)], dim=1)
        if "rows" in given:
            rows = rows + given["rows"]
        beside = [given["planes"].expand(-1, -1, *x.shape[2:])] if "planes" in given else []
        beside += [given[MAPS]] if MAPS in given else []
        if beside:
            x = torch.cat([x, *(b.to(x.dtype) for b in beside)], dim=1)
        time = iter(rows.split(self._row_widths, dim=1))
        widths = [2 * cross.to_q.out_features for cross in self._crosses]
        keys = iter(given["keys_values"].split(widths, dim=2) if widths else ())
        h = convolve(self.conv_in, x)
        slices = (given["volumes"], given["distances"]) if "volumes" in given else None
        mixing = iter(taps.split(self._mix_widths, dim=1) if self._mix_widths else [taps] * len(self._levels))

        def run(block: nn.Module, h: Sum) -> tuple[Tensor, Sum]:
            assert isinstance(block, _Block)
            key = None if block.cross is None else next(keys)
            out: tuple[Tensor, Sum] = block(h, next(time), next(time), key, next(mixing), slices)
            return out

        # what enters each block and each downsampling; a block's output is one when the next has added it up
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            for block in stage.children():
                entered, h = run(block, h)
                skips.append(entered)
            if level < len(self.downsample):
                skips.append(h.total())
                down = self.downsample[level]
                assert isinstance(down, nn.Conv2d)
                h = convolve(down, skips[-1])
        for i, block in enumerate(self.mid):
            entered, h = run(block, h)
            skips += [entered] * (i == 0)
        for level, stage in enumerate(self.up):
            for block in stage.children():
                _, h = run(block, Sum(torch.cat([h.total(), skips.pop()], dim=1)))
            if level < len(self.upsample):
                h = Sum(self.upsample[level](h.total()))
        out: Tensor = self.conv_out(normalize(self.norm_out, h))
        return out

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        cond: Mapping[str, Any] | Tensor | None = None,
        slices: Tensor | None = None,
    ) -> Tensor:
        """The prediction for timestep `t`: an int, a scalar tensor or `[N]`; `cond` as `read_condition` takes it, or
        unchecked `[N, K]`, the covariates in their order, NaN where unknown; `slices` `[N]`, unchecked, the numbers of
        slices that mix with their neighbours.

        Raises:
            ValueError: a wrong shape of `x` or `t`, or a `cond` that this model has no input for.
        """
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise UserError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.config.in_channels}, H, W]")
        check_divides("x: its size", (x.shape[2], x.shape[3]), self.config.stride)
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise UserError(f"t: got {t.shape[0]} timesteps, allowed is 1 or the batch, {x.shape[0]}")
        covariates = self.config.covariates
        if isinstance(cond, Tensor) and covariates and not self.config.concat_channels:
            if cond.dim() != 2 or cond.shape[1] != len(covariates):
                raise UserError(f"cond: got shape {tuple(cond.shape)}, allowed is [N, {len(covariates)}]")
            given = {c.name: v for c, v in zip(covariates, cond.unbind(1), strict=True)}
        else:
            named: Any = cond  # refused there if it is no mapping
            given = {k: v.to(x.device) for k, v in self.read_condition(named, x.shape[0]).items()}
        if slices is not None:
            given[SLICE] = slices
        return self.forward_rows(x, self.time_rows(t), self.condition(given))

    def read_condition(
        self, cond: Mapping[str, Any] | None, n: int, *, extrapolate: bool = False, argument: str = "cond"
    ) -> dict[str, Tensor]:
        """A condition of n samples as `condition` takes it; None: everything is unknown, maps are 0.

        Raises:
            ValueError: as `covariates.encode`; a `cond` for a model without one; maps of another shape, or none where
                the model was given a condition and needs them.
        """
        numbers, cond = self._numbers(cond, n, argument)
        if not self.config.conditional:
            if cond is not None:
                raise UserError(f"{argument}: got a value, allowed is None: this model is unconditional")
            return numbers
        found = numbers | encode(
            self.config.covariates, {} if cond is None else cond, n, extrapolate=extrapolate, argument=argument
        )
        channels = self.config.concat_channels
        if channels and cond is None:
            found[MAPS] = torch.zeros(n, channels, *self.config.size)
        maps = found.get(MAPS)
        fits = maps is None or (maps.dim() == 4 and tuple(maps.shape[:2]) == (n, channels))
        if (maps is not None) != bool(channels) or not fits:
            got = "none" if maps is None else f"shape {tuple(maps.shape)}"
            allowed = f"[{n}, {channels}, H, W]" if channels else "none"
            raise UserError(f"{argument}[{MAPS!r}]: got {got}, allowed is {allowed}")
        return found

    def _numbers(
        self, cond: Mapping[str, Any] | None, n: int, argument: str
    ) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
        """The slices' numbers of a condition, where there are any, and the rest of it."""
        if not self.config.slice_mixing or not isinstance(cond, Mapping) or SLICE not in cond:
            return {}, cond
        try:
            listed = cond[SLICE]
            listed = [math.nan if v is None else v for v in listed] if isinstance(listed, (list, tuple)) else listed
            numbers = torch.as_tensor(listed, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{argument}[{SLICE!r}]: got {cond[SLICE]!r:.100}, allowed are numbers of slices") from None
        if len(numbers) != n:
            raise UserError(f"{argument}[{SLICE!r}]: got {len(numbers)} numbers, allowed is one for each of {n}")
        if bool((numbers.abs() > 2**23).any()):  # float32 knows no next number there
            raise UserError(f"{argument}[{SLICE!r}]: got {float(numbers.abs().max()):g}, allowed is up to 2^23")
        return {SLICE: numbers}, {k: v for k, v in cond.items() if k != SLICE} or None
