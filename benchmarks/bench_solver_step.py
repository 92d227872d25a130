"""solver_step, guided, with two pairs of history, statistics and its counter, against the same step in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sbldm_fast.kernels import solver_step
from torch import Tensor

from .suite_kernels import OpCase, Providers, on_device, ours

K = 2


def eager(
    x: Tensor, m: Tensor, table: Tensor, counter: Tensor, w: Tensor, history: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """A step as a device-side loop would write it with PyTorch operators: no transfer, the row by index_select."""
    i = counter[:1].long()
    c_x, c_m, d, _, a, b, a1, b1, a2, b2 = table.index_select(0, i)[0]
    m_u, m_c = m.chunk(2)
    m = m_u + w * (m_c - m_u)
    x0 = c_x * x + c_m * m
    (x1, m1), (x2, m2) = (history.index_select(0, (i - k) % K)[0] for k in (1, 2))
    y = a * x + b * m + d * x0 + a1 * x1 + b1 * m1 + a2 * x2 + b2 * m2
    history.index_copy_(0, i % K, torch.stack([x, m])[None])
    sums = torch.stack([m.square().flatten(1).sum(1), (x0 - before).square().flatten(1).sum(1)], 1)
    before.copy_(x0)
    return y, sums


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for dtype in on_device(device):
        for N in (1, 16, *([2048] if large else [])):
            x, m = torch.randn(N, 8, 16, 16, device=device), torch.randn(2 * N, 8, 16, 16, device=device, dtype=dtype)
            table, w = torch.randn(1, 6 + 2 * K, device=device), torch.full((1,), 2.0, device=device)
            state = (
                torch.zeros(2, dtype=torch.int32, device=device),
                torch.zeros(K, 2, *x.shape, device=device),
                torch.zeros_like(x),
            )
            sums = torch.zeros(N, 2, device=device)

            def fused(
                x: Tensor,
                m: Tensor,
                table: Tensor,
                counter: Tensor,
                w: Tensor,
                history: Tensor,
                x0: Tensor,
                sums: Tensor = sums,
            ) -> tuple[Tensor, Tensor]:
                return solver_step(
                    x, m, table, counter, guidance_scale=w, history=history, x0=x0, statistics=sums
                ), sums

            def own(
                f: Callable[..., Any], inputs: tuple[Tensor, ...] = (x, m, table), w: Tensor = w, state: Any = state
            ) -> Any:
                return partial(_fresh, f, inputs, w, tuple(t.clone() for t in state))

            providers: Providers = {"eager": own(eager), "torch.compile": own(torch.compile(eager, dynamic=False))}
            # each with a history of its own
            providers |= {name: ours(own(fused))[name] for name in ("reference", "ours")}
            # reads x, both halves of m, four of history and x0; writes x', a pair of history and x0
            moved = x.numel() * (4 * 10 + 2 * m.element_size())
            yield OpCase(f"{N}x8x16x16", dtype, "nchw", moved, 30 * x.numel(), 1, providers)


def _fresh(f: Callable[..., Any], inputs: tuple[Tensor, ...], w: Tensor, state: tuple[Tensor, ...]) -> Any:
    state[0].zero_()  # a table of one row serves every call
    return f(*inputs, state[0], w, *state[1:])


def test_solver_step(timed: Callable[[], None]) -> None:
    timed()
