"""How programs share out the groups of a GroupNorm: what its forward and backward kernels have in common.

A program owns one sample, a run of whole groups, and their pixels or a tile of them. Three tuples go through the
kernels, which take them apart by name:

    size = (C, HW, W, chunks)
    TILE = (GROUP, GROUPS, LANES, PIXELS, CHUNKS)
    affine = (weight, bias, scale, shift, row stride of scale, row stride of shift)

A group has GROUP channels, a program GROUPS groups and LANES = 2^k >= their channels, a tile PIXELS pixels;
chunks is the number of tiles of a group and CHUNKS = 2^k >= chunks.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._backend import tl, triton

SPLIT_TILE = 4096  # elements of one program where a group is cut


@triton.jit
def place(size, TILE):
    # the sample, channels and pixels of this program; one grid axis, as the others end at 65,535
    C, HW, _, chunks = size
    GROUP: tl.constexpr = TILE[0]
    GROUPS: tl.constexpr = TILE[1]
    LANES: tl.constexpr = TILE[2]
    PIXELS: tl.constexpr = TILE[3]
    programs = tl.cdiv(C, GROUP * GROUPS) * chunks
    n = (tl.program_id(0) // programs).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    lane = tl.arange(0, LANES)
    c = (tl.program_id(0) % programs) // chunks * (GROUP * GROUPS) + lane
    in_c = (lane < GROUP * GROUPS) & (c < C)
    s = chunk * PIXELS + tl.arange(0, PIXELS)
    return n, chunk, c, in_c, s, in_c[:, None] & (s < HW)[None, :]


@triton.jit
def offsets(n, c, s, size, strides, FLAT: tl.constexpr):
    # FLAT: the rows follow on one another, so a pixel needs no division
    _, _, W, _ = size
    of_sample, of_channel, of_row, of_pixel = strides
    s = s.to(tl.int64)
    pixel = s * of_pixel if FLAT else (s // W) * of_row + (s % W) * of_pixel
    return n * of_sample + c.to(tl.int64)[:, None] * of_channel + pixel[None, :]


@triton.jit
def spread(v, TILE):
    # from a value for each group to one for each of its channels
    GROUPS: tl.constexpr = TILE[1]
    LANES: tl.constexpr = TILE[2]
    return tl.reshape(tl.broadcast_to(v[:, None], (GROUPS, LANES // GROUPS)), (LANES,))


@triton.jit
def per_group(v, TILE):
    GROUPS: tl.constexpr = TILE[1]
    LANES: tl.constexpr = TILE[2]
    return spread(tl.sum(tl.reshape(v, (GROUPS, LANES // GROUPS)), axis=1), TILE)


@triton.jit
def inverse_root(v):
    # a GPU's rsqrt is off by up to 2.6 in the last place; a step of Newton's iteration leaves 1, where a rounded
    # division of a rounded root leaves 1.5 and calls subroutines (LOG 29). Not where it is 0 or infinite
    r = tl.rsqrt(v)
    return tl.where((r > 0.0) & (r < float("inf")), r + 0.5 * r * (1.0 - (v * r) * r), r)


@triton.jit
def load_affine(n, c, in_c, affine):
    weight, bias, scale, shift, scale_stride, shift_stride = affine
    a = tl.full(c.shape, 1.0, tl.float32)
    b = tl.zeros_like(a)
    if weight is not None:
        a = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + n * scale_stride + c, mask=in_c, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    if shift is not None:
        b += tl.load(shift + n * shift_stride + c, mask=in_c, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pair(pairs, first, second, row, column, mask, columns):
    # pairs is [rows, 2, columns]
    at = pairs + row * 2 * columns + column
    tl.store(at, first, mask=mask)
    tl.store(at + columns, second, mask=mask)


@triton.jit
def load_pairs(pairs, n, c, size, TILE):
    # what every tile of the sample has left of the groups of this program, as two [tiles, groups]
    C, _, _, chunks = size
    GROUP: tl.constexpr = TILE[0]
    GROUPS: tl.constexpr = TILE[1]
    CHUNKS: tl.constexpr = TILE[4]
    groups = C // GROUP
    k = tl.arange(0, CHUNKS)
    g = tl.min(c) // GROUP + tl.arange(0, GROUPS)
    at = pairs + ((n * chunks + k) * 2 * groups)[:, None] + g[None, :]
    mask = (k < chunks)[:, None] & (g < groups)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + groups, mask=mask, other=0.0)


def as_images(x: Tensor) -> Tensor:
    """`x` `[N, C, *spatial]` as `[N, C, rows, W]`, for a GroupNorm knows no neighbours: a view, but for a volume of
    which neither D and H nor H and W follow on one another in memory: that is copied."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    if x.dim() == 4:
        return x
    D_H, H_W = (x.stride(i) == x.shape[i + 1] * x.stride(i + 1) for i in (2, 3))
    return x.flatten(2, 3) if D_H or not H_W else x.flatten(3)


@functools.cache
def register_tile(device: torch.device) -> int:
    """Elements of the largest group that one program keeps in registers: as measured on this GPU (crossover.json), else
    the default."""
    tiles = json.loads(Path(__file__).with_name("crossover.json").read_text())
    return int(tiles.get(torch.cuda.get_device_name(device) if device.type == "cuda" else "default", tiles["default"]))


@functools.cache
def plan(
    shape: tuple[int, ...], num_groups: int, channels_last: bool, itemsize: int, limit: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """How to run groups of which up to `limit` elements stay whole: `size`, `TILE`, the number of programs and the
    warps of each."""
    N, C, H, W = shape
    channels, HW = C // num_groups, H * W
    groups, lanes, pixels = 1, triton.next_power_of_2(channels), triton.next_power_of_2(HW)
    if lanes == channels:
        # 16 bytes for each of the 32 threads of a warp, side by side: in channels_last it is the channels that lie so
        vector = 16 // itemsize
        want = max(vector // channels if channels_last else 1, 32 * vector // (channels * pixels))
        groups = min(max(1, want), triton.next_power_of_2(num_groups))
        lanes = groups * channels
    if lanes * pixels > limit:
        pixels = max(1, min(SPLIT_TILE // lanes, pixels // 2))
    chunks = triton.cdiv(HW, pixels)
    programs = N * triton.cdiv(C, groups * channels) * chunks
    tile = (channels, groups, lanes, pixels, triton.next_power_of_2(chunks))
    return (C, HW, W, chunks), tile, programs, min(32, max(1, lanes * pixels // 256))  # 8 elements a thread


def is_flat(*tensors: Tensor | None) -> bool:
    return all(t is None or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors)


def affine_arguments(*tensors: Tensor | None) -> tuple[Any, ...]:
    return (*tensors, *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in tensors[2:]))
