r"""One training pair of a diffusion model in one pass: noise drawn inside, latent CutMix, target.

    e   = philox_normal(seed; sample, stream)
    z_t = sqrt(a_t) z0 + sqrt(1 - a_t) e,   a = alphas_cumprod
    target = e (epsilon),   z0 (sample),   sqrt(a_t) e - sqrt(1 - a_t) z0 (v_prediction)

or, of a rectified flow, on the straight line from z0 to e:

    z_t = a_t z0 + (1 - a_t) e,   target = e - z0 (flow_prediction)

CutMix: with probability p a box of sample n is that of sample n + 1 (of the first, for the last), in z0 and e alike;
t_n holds for the whole sample, so that z_t and target stay a pair. Four words of Philox, counter (0, sample, stream,
1), decide: whether, the box's area as a uniform fraction of the image, and its centre, clipped at the border. In
a volume it goes through all of D.

Layout: contiguous. Sources: Ho et al. 2020, arXiv:2006.11239, equation 4; Salimans & Ho 2022, arXiv:2202.00512 (v); Liu
et al. 2022, arXiv:2209.03003 (flow); Yun et al. 2019, arXiv:1905.04899 (CutMix); 001 section III.B mixes z_t, which
leaves the target undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_contiguous, check_count, check_float, check_no_grad, check_shape
from ._backend import resolve, tl, triton
from .ddim_step import PREDICTION_TYPES as OF_DDIM
from .philox_normal import _32, normals, normals_reference, philox_reference, uniform

PREDICTION_TYPES = (*OF_DDIM, "flow_prediction")
BLOCK_BYTES = 2048  # of a program: 16 bytes a thread


def diffuse_reference(
    z0: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    key: Tensor,
    first_index: int,
    prediction_type: str,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """The specification of `diffuse`: z_t and the target; `key` = (seed, stream), `threshold` = 2^23 times the
    probability of CutMix."""
    N, (H, W) = z0.shape[0], z0.shape[-2:]
    seed, stream = key
    sample = torch.arange(first_index, first_index + N, device=z0.device)
    e = normals_reference(seed.expand(N), sample, stream, z0[0].numel() if N else 0).reshape(z0.shape)
    z = z0.float()
    zero = torch.zeros_like(sample)
    words = philox_reference((zero, sample, zero + stream, zero + 1), (seed & _32, seed >> 32 & _32))
    _, area, v, u = (((w >> 9).float() + 0.5) * 2.0**-23 for w in words)
    side = area.sqrt()
    inside = (words[0] >> 9 < threshold)[:, None, None]
    for length, centre, shape in ((H, v, (1, H, 1)), (W, u, (1, 1, W))):
        size = (length * side).floor()
        start = (length * centre).floor() - (size / 2).floor()
        at = torch.arange(length, device=z0.device).reshape(shape)
        inside = inside & (at >= start[:, None, None]) & (at < (start + size)[:, None, None])
    inside = inside.reshape(N, *[1] * (z.dim() - 3), H, W)
    e, z = (torch.where(inside, t.roll(-1, 0), t) for t in (e, z))
    t_max = alphas_cumprod.shape[0]
    a = torch.where((timesteps >= 0) & (timesteps < t_max), alphas_cumprod[timesteps.clamp(0, t_max - 1)], torch.nan)
    a = a.reshape(N, *[1] * (z.dim() - 1))
    b = 1 - a
    if prediction_type == "flow_prediction":
        return (a * z + b * e).to(z0.dtype), (e - z).to(z0.dtype)
    root_a, root_b = a.sqrt(), b.sqrt()
    target = e if prediction_type == "epsilon" else z if prediction_type == "sample" else root_a * e - root_b * z
    return (root_a * z + root_b * e).to(z0.dtype), target.to(z0.dtype)


@triton.jit
def _inside(at, length, side, centre):
    size = tl.floor(tl.cast(length, tl.float32) * side)
    start = tl.floor(tl.cast(length, tl.float32) * centre) - tl.floor(size / 2)
    return (at.to(tl.float32) >= start) & (at.to(tl.float32) < start + size)


@triton.jit(do_not_specialize=["first_index"])  # else a shard whose number is 1, or divides by 16, would compile anew
def _diffuse_kernel(
    z0,
    timesteps,
    alphas_cumprod,
    key,
    z_t,
    target,
    N,
    first_index,
    H,
    W,
    numel,
    t_max,
    PREDICTION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one grid axis: the others end at 65,535
    blocks = tl.cdiv(numel, 4 * BLOCK)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i = (tl.program_id(0) % blocks).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    mask = i < numel
    at = n.to(tl.int64) * numel + i
    seed, stream = tl.load(key), tl.cast(tl.load(key + 1), tl.int32)
    e = normals(seed, first_index + n, stream, block)
    z = tl.load(z0 + at, mask=mask, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        zero = n * 0
        w0, w1, w2, w3 = tl.philox(seed, zero, first_index + n, stream, zero + 1)
        if (w0 >> 9).to(tl.int32) < THRESHOLD:
            side = tl.sqrt_rn(uniform(w1))
            box = _inside(i // W % H, H, side, uniform(w2)) & _inside(i % W, W, side, uniform(w3))
            other = (n + 1) % N
            e = tl.where(box, normals(seed, first_index + other, stream, block), e)
            z = tl.where(box, tl.load(z0 + other.to(tl.int64) * numel + i, mask=mask, other=0.0).to(tl.float32), z)
    t = tl.load(timesteps + n)
    a = tl.load(alphas_cumprod + t, mask=(t >= 0) & (t < t_max), other=float("nan"))
    if PREDICTION == "flow_prediction":
        root_a, root_b = a, 1.0 - a
    else:
        root_a, root_b = tl.sqrt(a), tl.sqrt(1.0 - a)
    tl.store(z_t + at, (root_a * z + root_b * e).to(z_t.dtype.element_ty), mask=mask)
    if PREDICTION == "epsilon":
        out = e
    elif PREDICTION == "sample":
        out = z
    elif PREDICTION == "flow_prediction":
        out = e - z
    else:
        out = root_a * e - root_b * z
    tl.store(target + at, out.to(target.dtype.element_ty), mask=mask)


torch.library.define(
    "sbldm_fast::diffuse",
    "(Tensor z0, Tensor timesteps, Tensor alphas_cumprod, Tensor key, int first_index, str prediction_type, int"
    " threshold) -> (Tensor, Tensor)",
)


def _launch(
    z0: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    key: Tensor,
    first_index: int,
    prediction_type: str,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    z_t, target = torch.empty_like(z0), torch.empty_like(z0)
    if z0.numel():
        N, (H, W) = z0.shape[0], z0.shape[-2:]
        numel, block = z0.numel() // N, BLOCK_BYTES // z0.element_size() // 4
        with torch.cuda.device_of(z0):
            _diffuse_kernel[(N * triton.cdiv(numel, 4 * block),)](
                z0,
                timesteps,
                alphas_cumprod,
                key,
                z_t,
                target,
                N,
                first_index,
                H,
                W,
                numel,
                alphas_cumprod.shape[0],
                PREDICTION=prediction_type,
                THRESHOLD=threshold,
                BLOCK=block,
            )
    return z_t, target


torch.library.impl("sbldm_fast::diffuse", ("cpu", "cuda"), _launch)


@torch.library.register_fake("sbldm_fast::diffuse")
def _fake(z0: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z0), torch.empty_like(z0)


def diffuse(
    z0: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    seed: int | Tensor,
    *,
    first_index: int = 0,
    stream: int | Tensor = 0,
    prediction_type: str = "epsilon",
    cutmix_prob: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Noised latents `z_t = sqrt(a_t) z0 + sqrt(1 - a_t) e` and what a model is trained to make of them; of a flow
    `z_t = a_t z0 + (1 - a_t) e`.

    Args:
        z0: scaled latents `[N, C, H, W]` or `[N, C, D, H, W]`, contiguous.
        timesteps: int64 `[N]`, 0 to T - 1; another one gives NaN.
        alphas_cumprod: float32 `[T]`, on the device of `z0`; of a flow the share of z0, `a_t = 1 - s_t`.
        seed, stream: of the noise, as in `philox_normal`; in training, the step is the stream. A tensor of one int64 on
            the device of `z0` can change under a captured graph.
        first_index: the number of the first sample, so that a shard draws its part of a larger batch; CutMix stays
            within the shard.
        prediction_type: the target: `"epsilon"`, `"sample"` (z0), `"v_prediction"` or `"flow_prediction"` (e - z0).
        cutmix_prob: the probability that a box of a sample is its neighbour's.

    Returns:
        z_t and the target, like `z0`.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4; Liu et al. 2022, arXiv:2209.03003 (flow); Yun et al. 2019,
    arXiv:1905.04899.
    """
    check_float("z0", z0, "[N, C, H, W]", "[N, C, D, H, W]")
    check_no_grad(z0=z0)
    check_contiguous(z0=z0, timesteps=timesteps, alphas_cumprod=alphas_cumprod)
    check_shape("timesteps", timesteps, ((z0.shape[0],),), z0, (torch.int64,))
    check_shape("alphas_cumprod", alphas_cumprod, (tuple(alphas_cumprod.shape[:1]),), z0, (torch.float32,))
    check_count("first_index", first_index, 2**31)
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type: got {prediction_type!r}, allowed are {', '.join(PREDICTION_TYPES)}")
    if not 0 <= cutmix_prob <= 1:
        raise UserError(f"cutmix_prob: got {cutmix_prob}, allowed is 0 to 1")
    key = torch.cat([_word("seed", seed, 2**63, z0), _word("stream", stream, 2**31, z0)])
    threshold = round(cutmix_prob * 2**23)
    arguments = (z0, timesteps, alphas_cumprod, key, first_index, prediction_type, threshold)
    if resolve(z0.device)[0] == "torch":
        return diffuse_reference(*arguments)
    z_t, target = torch.ops.sbldm_fast.diffuse(*arguments)
    return z_t, target


def _word(name: str, value: int | Tensor, top: int, z0: Tensor) -> Tensor:
    """A number below `top` as int64 `[1]` on the device of `z0`."""
    if isinstance(value, Tensor):
        check_shape(name, value, ((), (1,)), z0, (torch.int64,))
        return value.reshape(1)
    check_count(name, value, top)
    return torch.full((1,), value, dtype=torch.int64, device=z0.device)
