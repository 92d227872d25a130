"""What lets the slices of a volume know each other: mixing along z, zero at first, between the layers of a 2-D network.

The rows of a batch are slices. Each has a number, and rows whose numbers follow on one another are neighbours; so any
number of volumes, of any length, may lie in a batch.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.kernels import GroupNormSiLU

from .layers import Sum

SLICE = "slice"  # the name of the slices' numbers in a condition
MIXING = re.compile(r"time_to_mix\.|mix_offsets|\.slices\.")  # in the names of the parameters of what mixes


def number_volumes(numbers: Tensor) -> Tensor:
    """Which volume each slice is of, int32 `[N]`, from the slices' numbers `[N]`, NaN where one stands alone."""
    follows = numbers[1:] == numbers[:-1] + 1
    return F.pad((~follows).cumsum(0), (1, 0)).to(torch.int32)


def distance_bias(volumes: Tensor, heads: int) -> Tensor:
    """What attention over slices adds to its logits, float32 `[N, heads, N]`: less by the head's slope for each slice
    between two, so that a volume may be longer than those that were trained on; minus infinity across volumes.

    Head i of n has the slope `2^(-8 i / n)`, i from 1. Source: Press et al. 2022, arXiv:2108.12409.
    """
    at = torch.arange(len(volumes), device=volumes.device)
    slopes = torch.exp2(-8 / heads * torch.arange(1, heads + 1, device=volumes.device))
    falls = -slopes[:, None] * (at[:, None] - at).abs()[:, None]
    return falls.masked_fill((volumes[:, None] != volumes)[:, None], float("-inf"))


class SliceAttention(nn.Module):
    """Self-attention over the slices of a volume, pixel by pixel of `[N, C, H, W]`, added to its input, under the
    `distance_bias` `[N, heads, N]`."""

    def __init__(self, channels: int, head_dim: int, num_groups: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = GroupNormSiLU(num_groups, channels, activation="none")
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Sum, bias: Tensor) -> Sum:
        N, C, H, W = x.x.shape
        y, entered = self.norm(x.x, conv_bias=x.conv_bias, residual=x.residual, return_sum=True)
        h = y.flatten(2).permute(2, 0, 1)
        q, k, v = self.to_qkv(h).reshape(H * W, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mask = bias[..., :N].transpose(0, 1).to(q.dtype)  # of fewer slices, where a smaller batch is tried
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(H * W, N, C)
        return Sum(entered, residual=self.to_out(h).permute(1, 2, 0).reshape(N, C, H, W).to(entered.dtype))
