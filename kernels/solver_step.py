r"""One step of any linear solver in one pass, its numbers read from a table through a counter on the device.

    m  = m_u + w (m_c - m_u)                                        guidance
    x0 = clip(c_x x + c_m m)                                        x0 from epsilon, x0 or v
    x' = a_0 x + b_0 m + d x0 + s z + sum_k (a_k x_-k + b_k m_-k)   k = 1 .. K steps back

Row i of the table is [c_x, c_m, d, s, a_0, b_0, a_1, b_1, ..., a_K, b_K]; z is `philox_normal` of the sample's seed and
number, stream i + 1. The last program to finish advances the counter, so that one captured launch replays for any
number of steps with no traffic between host and device. Of what is x0's or the history's, a term with coefficient 0 is
not read.

Layout: contiguous; the model's output may also be channels_last or channels_last_3d. Sources: Song et al. 2021,
arXiv:2010.02502 (DDIM); Lu et al. 2022, arXiv:2211.01095 and Zhao et al. 2023, arXiv:2302.04867 (multistep solvers are
such sums); Ho & Salimans 2022, arXiv:2207.12598 (w).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbldm_fast.errors import UserError

from ._arguments import check_clip, check_contiguous, check_float, check_no_grad, check_shape, is_dense
from ._backend import resolve, tl, triton
from .philox_normal import normals, normals_reference

BLOCK = 512  # Philox counters of a program, each worth four elements: a latent of 8x16x16 is one program
COLUMNS = 6  # of the table without history, as the kernel reads them: c_x, c_m, d, s, a_0, b_0


def solver_step_reference(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    guidance: Tensor | None,
    history: Tensor | None,
    seeds: Tensor | None,
    frozen: Tensor | None,
    x0: Tensor | None,
    statistics: Tensor | None,
    clip_range: float | None,
) -> Tensor:
    """The specification of `solver_step`, in float32; writes to counter, history, x0 and statistics."""
    N, step = x.shape[0], counter[:1].long()

    def each(v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (x.dim() - 1))

    row = torch.where(step < table.shape[0], table.index_select(0, step.clamp(max=table.shape[0] - 1))[0], torch.nan)
    v, m = x.float(), model_output[:N].float()
    if guidance is not None:
        m = m + each(guidance) * (model_output[N:].float() - m)
    now = row[0] * v + row[1] * m
    if clip_range is not None:
        now = now.clamp(-clip_range, clip_range)
    y = row[4] * v + row[5] * m + torch.where(row[2] != 0, row[2] * now, 0.0)
    stop = torch.zeros(N, dtype=torch.bool, device=x.device) if frozen is None else frozen
    if history is not None:
        K = history.shape[0]
        for k in range(1, K + 1):
            past = history.index_select(0, (step - k) % K)[0].float()
            for i in (0, 1):
                coefficient = row[COLUMNS + 2 * (k - 1) + i]
                y = y + torch.where(coefficient != 0, coefficient * past[i], 0.0)
        old = history.index_select(0, step % K)[0]
        new = torch.where(each(stop), old, torch.stack([v, m]).to(history.dtype))
        history.index_copy_(0, step % K, new[None])
    if seeds is not None:
        y = y + row[3] * normals_reference(seeds[:, 0], seeds[:, 1], step[:, None] + 1, x[0].numel()).reshape(x.shape)
    if x0 is not None and statistics is not None:
        delta = now - torch.where(step > 0, x0.float(), 0.0)
        squares = torch.stack([m.square().flatten(1).sum(1), delta.square().flatten(1).sum(1)], dim=1)
        statistics.copy_(torch.where(stop[:, None], 0.0, squares))
        x0.copy_(torch.where(each(stop), x0, now.to(x0.dtype)))
    counter[:1] += 1
    return torch.where(each(stop), x, y.to(x.dtype))


@triton.jit
def _solver_step_kernel(
    x,
    model_output,
    y,
    table,
    counter,
    guidance,
    history,
    seeds,
    frozen,
    x0,
    sums,
    N,
    numel,
    steps,
    guidance_stride,
    channels,
    K: tl.constexpr,
    CLIP: tl.constexpr,
    M_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one grid axis: the others end at 65,535
    blocks = tl.cdiv(numel, 4 * BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    i = start.to(tl.int64) * 4 + tl.arange(0, 4 * BLOCK)
    mask = i < numel
    at = n * numel + i
    all_samples = tl.cast(N, tl.int64) * numel
    step = tl.load(counter)
    row = table + tl.cast(step, tl.int64) * (6 + 2 * K)
    in_table = step < steps
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    at_m = at
    if M_LAST:
        pixels = numel // channels
        at_m = n * numel + (i % pixels) * channels + i // pixels
    m = tl.load(model_output + at_m, mask=mask, other=0.0).to(tl.float32)
    if guidance is not None:
        conditioned = tl.load(model_output + all_samples + at_m, mask=mask, other=0.0).to(tl.float32)
        m += tl.load(guidance + n * guidance_stride) * (conditioned - m)
    nan = float("nan")
    now = tl.load(row, mask=in_table, other=nan) * v + tl.load(row + 1, mask=in_table, other=nan) * m
    if CLIP is not None:
        # a comparison with NaN is false: NaN passes through, as in torch.clamp
        now = tl.where(now > CLIP, CLIP, tl.where(now < -CLIP, -CLIP, now))
    d = tl.load(row + 2, mask=in_table, other=nan)
    out = tl.load(row + 4, mask=in_table, other=nan) * v + tl.load(row + 5, mask=in_table, other=nan) * m
    out += tl.where(d != 0.0, d * now, 0.0)
    moves = mask
    if frozen is not None:
        moves = mask & (tl.load(frozen + n) == 0)
    if history is not None:
        for k in tl.static_range(1, K + 1):
            a = tl.load(row + 4 + 2 * k, mask=in_table, other=nan)
            b = tl.load(row + 5 + 2 * k, mask=in_table, other=nan)
            past = history + ((step + K - k) % K).to(tl.int64) * 2 * all_samples + at
            if a != 0.0:
                out += a * tl.load(past, mask=mask, other=0.0).to(tl.float32)
            if b != 0.0:
                out += b * tl.load(past + all_samples, mask=mask, other=0.0).to(tl.float32)
    if seeds is not None:
        s = tl.load(row + 3, mask=in_table, other=nan)
        if s != 0.0:
            sample = tl.cast(tl.load(seeds + n * 2 + 1), tl.int32)
            out += s * normals(tl.load(seeds + n * 2), sample, step + 1, start + tl.arange(0, BLOCK))
    if sums is not None:
        delta = now - tl.load(x0 + at, mask=mask & (step > 0), other=0.0).to(tl.float32)
        tl.store(sums + tl.program_id(0) * 2, tl.sum(tl.where(moves, m * m, 0.0)))
        tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(tl.where(moves, delta * delta, 0.0)))
    # what is overwritten below may have been read by another warp, and the counter must have been read by all
    tl.debug_barrier()
    if history is not None:
        # over what was read last, K steps back
        here = history + (step % K).to(tl.int64) * 2 * all_samples + at
        tl.store(here, v.to(history.dtype.element_ty), mask=moves)
        tl.store(here + all_samples, m.to(history.dtype.element_ty), mask=moves)
    if sums is not None:
        tl.store(x0 + at, now.to(x0.dtype.element_ty), mask=moves)
    out = out.to(y.dtype.element_ty)
    if frozen is not None:
        out = tl.where(moves, out, v.to(y.dtype.element_ty))
    tl.store(y + at, out, mask=mask)
    # the last program of all advances the counter: every other has read it and said so
    if tl.atomic_add(counter + 1, 1) == tl.num_programs(0) - 1:
        tl.store(counter + 1, 0)
        tl.store(counter, step + 1)


torch.library.define(
    "sbldm_fast::solver_step",
    "(Tensor x, Tensor model_output, Tensor table, Tensor(a!) counter, Tensor? guidance, Tensor(b!)? history, Tensor?"
    " seeds, Tensor? frozen, Tensor(c!)? x0, Tensor(d!)? statistics, float? clip_range) -> Tensor",
)


def _launch(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    guidance: Tensor | None,
    history: Tensor | None,
    seeds: Tensor | None,
    frozen: Tensor | None,
    x0: Tensor | None,
    statistics: Tensor | None,
    clip_range: float | None,
) -> Tensor:
    y = torch.empty_like(x)
    N = x.shape[0]
    if x.numel() == 0:
        counter[:1] += 1
        return y
    numel = x.numel() // N
    block = min(BLOCK, triton.next_power_of_2(triton.cdiv(numel, 4)))
    blocks = triton.cdiv(numel, 4 * block)
    sums = statistics
    if statistics is not None and blocks > 1:
        sums = torch.empty(N, blocks, 2, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _solver_step_kernel[(N * blocks,)](
            x,
            model_output,
            y,
            table,
            counter,
            guidance,
            history,
            seeds,
            frozen,
            x0,
            sums,
            N,
            numel,
            table.shape[0],
            int(guidance is not None and guidance.numel() > 1),
            x.shape[1] if x.dim() > 1 else 1,
            K=_history_length(history),
            CLIP=clip_range,
            M_LAST=not model_output.is_contiguous(),
            BLOCK=block,
            num_warps=block // 32 or 1,
        )
    if sums is not None and sums is not statistics:
        torch.sum(sums, 1, out=statistics)
    return y


torch.library.impl("sbldm_fast::solver_step", ("cpu", "cuda"), _launch)


@torch.library.register_fake("sbldm_fast::solver_step")
def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _history_length(history: Tensor | None) -> int:
    return 0 if history is None else history.shape[0]


def solver_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    *,
    guidance_scale: Tensor | float | None = None,
    history: Tensor | None = None,
    seeds: Tensor | None = None,
    frozen: Tensor | None = None,
    x0: Tensor | None = None,
    statistics: Tensor | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """The sample one solver step on, `x' = a_0 x + b_0 m + d x0 + s z + sum_k (a_k x_-k + b_k m_-k)`; the counter moves
    one row on.

    Args:
        x: `[N, ...]`, contiguous.
        model_output: like `x`, in any float dtype, its channels side by side or not; under guidance `[2 N, ...]`, the
            unconditional half first.
        table: `[steps, 6 + 2 K]` float32, rows `[c_x, c_m, d, s, a_0, b_0, ..., a_K, b_K]`. A step beyond its end gives
            NaN.
        counter: int32 `[2]`, zero before the first step: the step to take, and a scratch word.
        guidance_scale: w, a number, `[1]` or `[N]`; None: no guidance.
        history: `[K, 2, N, ...]`, the last K pairs of x and m, kept by the op; what it holds at first is not read where
            its coefficients are 0.
        seeds: int64 `[N, 2]`, seed and sample number of each sample's noise; None: no noise.
        frozen: bool `[N]`, samples that stay as they are.
        x0, statistics: given together, like `x` and float32 `[N, 2]`: x0 of this step, and of each sample the sums of
            m^2 and of (x0 - x0 of the step before)^2 (at the first step, before it, 0), 0 for a frozen one.
        clip_range: clip x0 to [-clip_range, clip_range]; None for latents.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    Source: Song et al. 2021, arXiv:2010.02502, equation 12; multistep solvers as in Lu et al. 2022, arXiv:2211.01095.
    """
    guidance = guidance_scale
    if guidance is not None and not isinstance(guidance, Tensor):
        guidance = torch.full((1,), guidance, dtype=torch.float32, device=x.device)
    _check(x, model_output, table, counter, guidance, history, seeds, frozen, x0, statistics, clip_range)
    arguments = (x, model_output, table, counter, guidance, history, seeds, frozen, x0, statistics, clip_range)
    if resolve(x.device)[0] == "torch":
        return solver_step_reference(*arguments)
    out: Tensor = torch.ops.sbldm_fast.solver_step(*arguments)
    return out


def _check(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    guidance: Tensor | None,
    history: Tensor | None,
    seeds: Tensor | None,
    frozen: Tensor | None,
    x0: Tensor | None,
    statistics: Tensor | None,
    clip_range: float | None,
) -> None:
    check_float("x", x)
    check_no_grad(x=x, model_output=model_output)
    N, rest = x.shape[0], tuple(x.shape[1:])
    batch = N if guidance is None else 2 * N
    check_float("model_output", model_output)
    check_shape("model_output", model_output, ((batch, *rest),), x)
    check_contiguous(
        x=x,
        model_output=None if is_dense(model_output) else model_output,
        table=table,
        counter=counter,
        guidance_scale=guidance,
        history=history,
        seeds=seeds,
        frozen=frozen,
        x0=x0,
        statistics=statistics,
    )
    if history is not None and (history.dim() != x.dim() + 2 or history.shape[0] == 0):
        raise UserError(
            f"history: got shape {tuple(history.shape)}, allowed is [K, 2, {', '.join(map(str, x.shape))}] with K >= 1"
        )
    K = _history_length(history)
    _check_table(table, K, x.device)
    for name, t, dtype, shapes in (
        ("counter", counter, torch.int32, ((2,),)),
        ("guidance_scale", guidance, torch.float32, ((1,), (N,))),
        ("history", history, x.dtype, ((K, 2, N, *rest),)),
        ("seeds", seeds, torch.int64, ((N, 2),)),
        ("frozen", frozen, torch.bool, ((N,),)),
        ("x0", x0, x.dtype, ((N, *rest),)),
        ("statistics", statistics, torch.float32, ((N, 2),)),
    ):
        if t is not None:
            check_shape(name, t, shapes, x, (dtype,))
    if (x0 is None) != (statistics is None):
        raise UserError(
            f"{'x0' if x0 is None else 'statistics'}: got None, allowed are x0 and statistics together or neither"
        )
    check_clip(clip_range)


def _check_table(table: Tensor, K: int, device: torch.device) -> None:
    columns = table.shape[1] if table.dim() == 2 else None
    if (columns, table.dtype, table.device) != (COLUMNS + 2 * K, torch.float32, device):
        raise UserError(
            f"table: got {table.dtype} {tuple(table.shape)} on {table.device}, "
            f"allowed is float32 [steps, {COLUMNS} + 2 * {K}] on {device}"
        )
