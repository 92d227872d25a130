r"""One DDIM step in one pass: x0 from the model's output, clipping, direction, noise.

    x0    = (x - sqrt(1-a) m) / sqrt(a)          epsilon      e = m
          = m                                    sample       e = (x - sqrt(a) m) / sqrt(1-a)
          = sqrt(a) x - sqrt(1-a) m              v_prediction e = sqrt(a) m + sqrt(1-a) x
    sigma = eta sqrt((1-a')/(1-a)) sqrt((a'-a)/a')
    x'    = sqrt(a') clip(x0) + sqrt(1 - a' - sigma^2) e + sigma z
            1 - a' - sigma^2 = (1-a') (1 - eta^2 + eta^2 a (1-a') / (a' (1-a)))

The right-hand forms of 1 - a/a' and 1 - a' - sigma^2 are computed: sums of what is not negative, in which nothing
cancels. a is alphas_cumprod at this timestep, a' at the previous one. As in diffusers, e is not derived again after
clipping. Any dense layout; x, model_output and noise must share it. Source: Song et al. 2021, arXiv:2010.02502,
equation 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_clip, check_float, check_like, check_shape, is_dense
from ._backend import needs_grad, resolve, tl, triton

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BLOCK = 1024


def ddim_step_reference(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
) -> Tensor:
    """The specification of `ddim_step`, in float32; `alpha_bar` of shape `[]` or `[N]`."""
    a, a_prev = (v.float().reshape(-1, *[1] * (x.dim() - 1)) for v in (alpha_bar, alpha_bar_prev))
    z, m = x.float(), model_output.float()
    if prediction_type == "epsilon":
        x0, e = (z - (1 - a).sqrt() * m) / a.sqrt(), m
    elif prediction_type == "sample":
        x0, e = m, (z - a.sqrt() * m) / (1 - a).sqrt()
    else:
        x0, e = a.sqrt() * z - (1 - a).sqrt() * m, a.sqrt() * m + (1 - a).sqrt() * z
    if clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    if eta == 0:
        return (a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * e).to(x.dtype)
    sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * ((a_prev - a) / a_prev).clamp(min=0).sqrt()
    direction = (1 - a_prev) * (1 - eta**2 + eta**2 * (a * (1 - a_prev) / (a_prev * (1 - a))).clamp(max=1))
    y = a_prev.sqrt() * x0 + direction.sqrt() * e
    return (y if noise is None else y + sigma * noise.float()).to(x.dtype)


@triton.jit
def _ddim_step_kernel(
    x,
    model_output,
    noise,
    y,
    alpha_bar,
    alpha_bar_prev,
    numel,
    a_stride,
    a_prev_stride,
    BLOCK: tl.constexpr,
    eta: tl.constexpr,
    PREDICTION: tl.constexpr,
    CLIP: tl.constexpr,
):
    # one grid axis: the others end at 65,535
    blocks = tl.cdiv(numel, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    a = tl.load(alpha_bar + n * a_stride).to(tl.float32)
    a_prev = tl.load(alpha_bar_prev + n * a_prev_stride).to(tl.float32)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    at = n * numel + i
    z = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(model_output + at, mask=mask, other=0.0).to(tl.float32)
    root_a, root_b = tl.sqrt(a), tl.sqrt(1.0 - a)
    if PREDICTION == "epsilon":
        x0 = (z - root_b * m) / root_a
        e = m
    elif PREDICTION == "sample":
        x0 = m
        e = (z - root_a * m) / root_b
    else:
        x0 = root_a * z - root_b * m
        e = root_a * m + root_b * z
    if CLIP is not None:
        # a comparison with NaN is false: NaN passes through, as in torch.clamp
        x0 = tl.where(x0 > CLIP, CLIP, tl.where(x0 < -CLIP, -CLIP, x0))
    direction = 1.0 - a_prev
    if eta != 0:
        sigma = eta * tl.sqrt((1.0 - a_prev) / (1.0 - a)) * tl.sqrt(tl.maximum((a_prev - a) / a_prev, 0.0))
        direction *= 1.0 - eta * eta + eta * eta * tl.minimum(a * (1.0 - a_prev) / (a_prev * (1.0 - a)), 1.0)
    out = tl.sqrt(a_prev) * x0 + tl.sqrt(direction) * e
    if noise is not None:
        out += sigma * tl.load(noise + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


torch.library.define(
    "sbldm_fast::ddim_step",
    "(Tensor x, Tensor model_output, Tensor alpha_bar, Tensor alpha_bar_prev, float eta, Tensor? noise, "
    "str prediction_type, float? clip_range) -> Tensor",
)


def _launch(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    eta: float,
    noise: Tensor | None,
    prediction_type: str,
    clip_range: float | None,
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    numel = x.numel() // x.shape[0]
    with torch.cuda.device_of(x):
        _ddim_step_kernel[(triton.cdiv(numel, BLOCK) * x.shape[0],)](
            x,
            model_output,
            noise if eta else None,
            y,
            alpha_bar,
            alpha_bar_prev,
            numel,
            *map(_step, (alpha_bar, alpha_bar_prev)),
            BLOCK=BLOCK,
            eta=eta,
            PREDICTION=prediction_type,
            CLIP=clip_range,
        )
    return y


torch.library.impl("sbldm_fast::ddim_step", ("cpu", "cuda"), _launch)


def _step(a: Tensor) -> int:
    return 0 if a.numel() == 1 else a.stride(0)


@torch.library.register_fake("sbldm_fast::ddim_step")
def _fake(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    eta: float,
    noise: Tensor | None,
    prediction_type: str,
    clip_range: float | None,
) -> Tensor:
    return torch.empty_like(x)


def ddim_step(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
) -> Tensor:
    """The sample one DDIM step earlier: `x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) e + sigma z`.

    Args:
        x, model_output: `[N, ...]`, one dtype, one dense layout.
        alpha_bar, alpha_bar_prev: alphas_cumprod now and at the previous timestep: a number, `[]` or one per sample
            `[N]`. Tensors must be on the device of `x`.
        eta: 0 is deterministic, 1 has DDPM's variance.
        noise: like `x`; needed if `eta > 0`.
        prediction_type: what the model predicts: `"epsilon"`, `"sample"` (x0) or `"v_prediction"`.
        clip_range: clip x0 to [-clip_range, clip_range]; None for latents.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Song et al. 2021, arXiv:2010.02502, equation 12; v as in Salimans & Ho 2022, arXiv:2202.00512.
    """
    a, a_prev = (
        v.float() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float32, device=x.device)
        for v in (alpha_bar, alpha_bar_prev)
    )
    _check(x, model_output, a, a_prev, eta, noise, prediction_type, clip_range)
    for name, t in (("x", x), ("model_output", model_output), ("noise", noise)):
        if t is not None and (_strides(t) != _strides(x) or not is_dense(t)):
            raise UserError(
                f"{name}: got strides {t.stride()}, allowed is one dense layout for x, model_output and noise: call"
                " .contiguous()"
            )
    chosen, _ = resolve(x.device, needs_grad(x, model_output, noise))
    if chosen == "torch":
        return ddim_step_reference(
            x, model_output, a, a_prev, eta=eta, noise=noise, prediction_type=prediction_type, clip_range=clip_range
        )
    out: Tensor = torch.ops.sbldm_fast.ddim_step(x, model_output, a, a_prev, eta, noise, prediction_type, clip_range)
    return out


def _strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _check(
    x: Tensor,
    model_output: Tensor,
    a: Tensor,
    a_prev: Tensor,
    eta: float,
    noise: Tensor | None,
    prediction_type: str,
    clip_range: float | None,
) -> None:
    check_float("x", x)
    for name, t in (("model_output", model_output), ("noise", noise)):
        if t is not None:
            check_like(name, t, x)
    for name, t in (("alpha_bar", a), ("alpha_bar_prev", a_prev)):
        check_shape(name, t, ((), (1,), (x.shape[0],)), x)
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type: got {prediction_type!r}, allowed are {', '.join(PREDICTION_TYPES)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: got {eta}, allowed is 0 to 1")
    if eta and noise is None:
        raise UserError(f"noise: got None, allowed is a tensor like x where eta > 0 (eta = {eta})")
    check_clip(clip_range)
