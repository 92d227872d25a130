"""The blocks that the VAE and the UNet are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU
from sbldm_fast.kernels._backend import resolve


class Sum(NamedTuple):
    """`x + conv_bias + residual`, which a norm adds up as it reads; `conv_bias` `[C]` is of the convolution that made
    x."""

    x: Tensor
    conv_bias: Tensor | None = None
    residual: Tensor | None = None

    def total(self) -> Tensor:
        """The sum as a tensor, for those that are no norms."""
        out = self.x if self.conv_bias is None else self.x + self.conv_bias.to(self.x.dtype)[:, None, None]
        return out if self.residual is None else out + self.residual


def added_by_norms(device: torch.device) -> bool:
    """Whether biases and shortcuts wait for the norm behind them: cuDNN and PyTorch would add each in a kernel of its
    own (LOG 26)."""
    return resolve(device)[0] == "triton"


def is_bare_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution and no more: one with hooks, or another in its place, is called as it is."""
    return type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks


def convolve(conv: nn.Conv2d, x: Tensor) -> Sum:
    """A convolution whose bias waits for the norm behind it; on a CPU the convolution adds it for nothing."""
    if added_by_norms(x.device) and is_bare_conv(conv):
        return Sum(conv._conv_forward(x, conv.weight, None), conv.bias)
    return Sum(conv(x))


def normalize(norm: nn.Module, x: Sum) -> Tensor:
    """The norm of a sum that nobody else reads."""
    out = norm(x.x, conv_bias=x.conv_bias, residual=x.residual)
    y: Tensor = out if x.residual is None else out[0]
    return y


class ResBlock(nn.Module):
    """`skip(x) + conv2(dropout(silu(GN(conv1(silu(GN(x)))) * (1 + scale) + shift)))`, `[N, C, H, W]` to
    `[N, C', H, W]`."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Sum, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Sum]:
        """The block's input, added up, and its output."""
        y, entered = self.norm1(x.x, conv_bias=x.conv_bias, residual=x.residual, return_sum=True)
        h = convolve(self.conv1, y)
        out = convolve(self.conv2, self.dropout(self.norm2(h.x, scale, shift, conv_bias=h.conv_bias)))
        if out.conv_bias is None or not is_bare_conv(self.skip):
            return entered, out._replace(residual=self.skip(entered).to(out.x.dtype))
        # a sampler has made one of them
        bias = out.conv_bias if self.skip.bias is None else out.conv_bias + self.skip.bias
        if torch.is_grad_enabled():
            shortcut = self.skip._conv_forward(entered, self.skip.weight, None)
            return entered, Sum(out.x, bias, shortcut.to(out.x.dtype))
        return entered, Sum(add_pointwise_(out.x, self.skip.weight, entered), bias)


def add_pointwise_(out: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`out += conv(x)` of a 1x1 convolution without bias, as one matrix product that adds to what is there."""
    x, W = x.to(out.dtype), weight.to(out.dtype).flatten(1)
    if out.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous(memory_format=torch.channels_last):
        flat = out.permute(0, 2, 3, 1).view(-1, out.shape[1])
        flat.addmm_(x.permute(0, 2, 3, 1).view(-1, x.shape[1]), W.t())
    else:
        out.view(*out.shape[:2], -1).baddbmm_(W.expand(len(out), -1, -1), x.flatten(2))
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` of `[N, heads, pixels, d]`."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused one takes 46 ms forward and backward where this takes 4: 32 images of 8 x 8 pixels, 16 heads
        # of 8 (LOG 19)
        return attend_in_three(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_in_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` in three operators, for a few pixels on a CPU: Inductor fuses them with their neighbours."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v


class Attention(nn.Module):
    """Self-attention over the pixels of `[N, C, H, W]`, added to its input; q, k and v are one projection."""

    def __init__(self, channels: int, head_dim: int, num_groups: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = GroupNormSiLU(num_groups, channels, activation="none")
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.attend: Callable[..., Tensor] = attend

    def forward(self, x: Sum) -> Sum:
        N, C, H, W = x.x.shape
        y, entered = self.norm(x.x, conv_bias=x.conv_bias, residual=x.residual, return_sum=True)
        h = y.flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(h).reshape(N, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = self.attend(q, k, v).transpose(1, 2).reshape(N, H * W, C)
        # in the layout of what entered
        return Sum(entered, residual=self.to_out(h).transpose(1, 2).reshape(N, C, H, W))


class CrossAttention(nn.Module):
    """Attention from the pixels of `[N, C, H, W]` to tokens `[N, L, D]`, added to its input; the tokens' keys and
    values `[N, L, 2 C]` are made apart, once for all steps of a run."""

    def __init__(self, channels: int, head_dim: int, num_groups: int, context_dim: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = GroupNormSiLU(num_groups, channels, activation="none")
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Sum, keys_values: Tensor) -> Sum:
        N, C, H, W = x.x.shape
        y, entered = self.norm(x.x, conv_bias=x.conv_bias, residual=x.residual, return_sum=True)
        q = self.to_q(y.flatten(2).transpose(1, 2)).reshape(N, H * W, self.heads, -1).transpose(1, 2)
        k, v = keys_values.reshape(N, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = attend_in_three(q, k, v).transpose(1, 2).reshape(N, H * W, C)
        return Sum(entered, residual=self.to_out(h).transpose(1, 2).reshape(N, C, H, W))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def Downsample(channels: int) -> nn.Conv2d:
    """A 3x3 convolution of stride 2."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Chain(nn.Sequential):
    """Blocks, convolutions and norms one after the other, sums kept open between them."""

    def forward(self, x: Tensor) -> Tensor:
        h = Sum(x)
        for module in self:
            if isinstance(module, ResBlock):
                _, h = module(h)
            elif isinstance(module, Attention):
                h = module(h)
            elif isinstance(module, GroupNormSiLU):
                h = Sum(normalize(module, h))
            elif isinstance(module, nn.Conv2d):
                h = convolve(module, h.total())
            else:
                h = Sum(module(h.total()))
        return h.total()
