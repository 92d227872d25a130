r"""Standard normals that depend on (seed, sample, element) alone: the same for any batch split, any device.

    c = (element // 4, sample, stream, 0),   k = (seed mod 2^32, seed >> 32)
    w0 .. w3 = Philox4x32-10(c, k)
    u = (w >> 9 + 1/2) 2^-23,   (z0, z1) = sqrt(-2 ln u0) (cos, sin)(2 pi (u1 - 1/2)),   likewise (z2, z3)

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import DTYPES, check_count
from ._backend import resolve, tl, triton

BLOCK = 256  # counters, each worth four normals
_M0, _M1, _W0, _W1, _32 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_reference(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words from four counter words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the products need 64 unsigned bits: split into 16-bit halves so that int64 holds every partial sum
        hi0, lo0 = _mulhilo(c0, _M0)
        hi1, lo1 = _mulhilo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _32, (k1 + _W1) & _32
    return [c0, c1, c2, c3]


def _mulhilo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def normals_reference(seed: Tensor, sample: Tensor, stream: Tensor | int, numel: int) -> Tensor:
    """`[N, numel]` normals from one seed and sample number a row, int64 `[N]`; transcendental functions in float64."""
    block = torch.arange((numel + 3) // 4, device=seed.device, dtype=torch.int64)[None, :]
    zero = torch.zeros_like(sample[:, None] + block)
    key = (seed & _32)[:, None], (seed >> 32 & _32)[:, None]
    words = philox_reference((block + zero, sample[:, None] + zero, zero + stream, zero), key)
    u0, u1, u2, u3 = (((w >> 9).double() + 0.5) * 2.0**-23 for w in words)
    pairs = []
    for a, b in ((u0, u1), (u2, u3)):
        r, angle = (-2 * a.log()).sqrt(), 2 * math.pi * (b - 0.5)
        pairs += [r * angle.cos(), r * angle.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :numel].float()


def philox_normal_reference(
    shape: Sequence[int], seed: int, *, first_index: int = 0, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The specification of `philox_normal`."""
    sample = torch.arange(first_index, first_index + shape[0], device=device, dtype=torch.int64)
    return normals_reference(torch.full_like(sample, seed), sample, stream, math.prod(shape[1:])).reshape(tuple(shape))


@triton.jit
def uniform(w):
    return ((w >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _box_muller(w0, w1):
    # the angle in turns, -1/2 to 1/2, is brought to an eighth of a turn without rounding, where Taylor series reach
    # float32's last digit; libdevice's sine would bring its path for huge angles along, with float64 and local memory
    turn = uniform(w1) - 0.5
    quarter = tl.floor(turn * 4.0 + 0.5)
    a = (turn - quarter * 0.25) * 6.283185307179586
    a2 = a * a
    sin = a * (1.0 + a2 * (-1.0 / 6 + a2 * (1.0 / 120 + a2 * (-1.0 / 5040 + a2 / 362880))))
    cos = 1.0 + a2 * (-0.5 + a2 * (1.0 / 24 + a2 * (-1.0 / 720 + a2 * (1.0 / 40320 - a2 / 3628800))))
    odd, half = (quarter == 1.0) | (quarter == -1.0), (quarter == 2.0) | (quarter == -2.0)
    r = tl.sqrt(-2.0 * tl.log(uniform(w0)))
    z0 = tl.where(odd, -quarter * sin, tl.where(half, -cos, cos))
    z1 = tl.where(odd, quarter * cos, tl.where(half, -sin, sin))
    return r * z0, r * z1


@triton.jit
def normals(seed, sample, stream, block):
    """Normals number 4 block to 4 block + 3 of a sample, for a vector of blocks: four times as many, in order."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + sample, zero + stream, zero)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# else a shard or step whose number is 1, or divides by 16, would compile anew
@triton.jit(do_not_specialize=["first_index", "stream"])
def _philox_normal_kernel(y, seed, first_index, stream, numel, BLOCK: tl.constexpr):
    # one grid axis: the others end at 65,535
    blocks = tl.cdiv(numel, 4 * BLOCK)
    n = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    z = normals(tl.load(seed), first_index + n, stream, start + tl.arange(0, BLOCK))
    i = start.to(tl.int64) * 4 + tl.arange(0, 4 * BLOCK)
    tl.store(y + n.to(tl.int64) * numel + i, z.to(y.dtype.element_ty), mask=i < numel)


torch.library.define(
    "sbldm_fast::philox_normal", "(Tensor seed, int[] shape, int first_index, int stream, ScalarType dtype) -> Tensor"
)


def _launch(seed: Tensor, shape: Sequence[int], first_index: int, stream: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(tuple(shape), dtype=dtype, device=seed.device)
    if y.numel() == 0:
        return y
    numel = y.numel() // y.shape[0]
    with torch.cuda.device_of(y):
        _philox_normal_kernel[(triton.cdiv(numel, 4 * BLOCK) * y.shape[0],)](
            y, seed, first_index, stream, numel, BLOCK=BLOCK
        )
    return y


torch.library.impl("sbldm_fast::philox_normal", ("cpu", "cuda"), _launch)


@torch.library.register_fake("sbldm_fast::philox_normal")
def _fake(seed: Tensor, shape: Sequence[int], first_index: int, stream: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=seed.device)


def philox_normal(
    shape: Sequence[int],
    seed: int,
    *,
    first_index: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of `shape`, where `shape[0]` counts samples: sample i is number `first_index + i` of the seed.

    Args:
        shape: `[N, ...]`.
        seed: 0 to 2^63 - 1.
        first_index: the number of the first sample, so that a shard draws its part of a larger batch.
        stream: 0 for the starting noise, the step's number from 1 for the noise of a solver step.
        device, dtype: of the result; drawn in float32, then rounded.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    if len(shape) < 1 or min(shape) < 0:
        raise UserError(f"shape: got {tuple(shape)}, allowed is [N, ...] with no negative size")
    if math.prod(shape[1:]) >= 2**31:
        raise UserError(f"shape: got {tuple(shape)}, allowed is fewer than 2^31 elements a sample")
    for name, value, top in (("seed", seed, 2**63), ("first_index", first_index, 2**31), ("stream", stream, 2**31)):
        check_count(name, value, top)
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype}, allowed are float32, float16 and bfloat16")
    device = torch.empty(0, device=device).device  # None is the default device, as in PyTorch's own factories
    chosen, _ = resolve(device)
    if chosen == "torch":
        return philox_normal_reference(shape, seed, first_index=first_index, stream=stream, device=device).to(dtype)
    key = torch.full((1,), seed, dtype=torch.int64, device=device)  # filled there: torch.tensor would copy and wait
    out: Tensor = torch.ops.sbldm_fast.philox_normal(key, shape, first_index, stream, dtype)
    return out
