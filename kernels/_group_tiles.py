"""How programs share out the groups of a GroupNorm: what its forward and backward kernels have in common.

A program owns one sample, a run of whole groups, and their pixels or a tile of them. On the way through the kernels
size = (C, HW, W, chunks); TILE = (channels of a group, groups, lanes = channels of a program, pixels of a tile, 2^k >=
chunks); affine = (weight, bias, scale, shift, row stride of scale, row stride of shift).
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
    programs = tl.cdiv(C, TILE[0] * TILE[1]) * chunks
    n = (tl.program_id(0) // programs).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    lane = tl.arange(0, TILE[2])
    c = (tl.program_id(0) % programs) // chunks * (TILE[0] * TILE[1]) + lane
    in_c = (lane < TILE[0] * TILE[1]) & (c < C)
    s = chunk * TILE[3] + tl.arange(0, TILE[3])
    return n, chunk, c, in_c, s, in_c[:, None] & (s < HW)[None, :]


@triton.jit
def offsets(n, c, s, size, strides, FLAT: tl.constexpr):
    # FLAT: the rows follow on one another, so a pixel needs no division
    s = s.to(tl.int64)
    pixel = s * strides[3] if FLAT else (s // size[2]) * strides[2] + (s % size[2]) * strides[3]
    return n * strides[0] + c.to(tl.int64)[:, None] * strides[1] + pixel[None, :]


@triton.jit
def spread(v, TILE):
    # from a value for each group to one for each of its channels
    return tl.reshape(tl.broadcast_to(v[:, None], (TILE[1], TILE[2] // TILE[1])), (TILE[2],))


@triton.jit
def per_group(v, TILE):
    return spread(tl.sum(tl.reshape(v, (TILE[1], TILE[2] // TILE[1])), axis=1), TILE)


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
    groups = size[0] // TILE[0]
    k = tl.arange(0, TILE[4])
    g = tl.min(c) // TILE[0] + tl.arange(0, TILE[1])
    at = pairs + ((n * size[3] + k) * 2 * groups)[:, None] + g[None, :]
    mask = (k < size[3])[:, None] & (g < groups)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + groups, mask=mask, other=0.0)


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
