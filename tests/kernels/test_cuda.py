"""What only a GPU can show of every op: captured in a CUDA graph, on a side stream, on a second device, the same bits
each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import (
    backend,
    ddim_step,
    diffuse,
    frequency_loss,
    group_norm_silu,
    mix_slices,
    philox_normal,
    solver_step,
    spectral_mse,
)
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _train(device: torch.device, side: int) -> Callable[[], tuple[Tensor, ...]]:
    x, residual, dy = torch.randn(3, 2, 64, side, side, device=device)
    # each a leaf: a view made here would send its gradient through this stream, and a capture may not wait for it
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in torch.randn(2, 64, device=device))]

    def step() -> tuple[Tensor, ...]:
        y, h = group_norm_silu(leaves[0], 32, *leaves[1:], residual=residual)
        return y.detach(), *torch.autograd.grad([y, h], leaves, [dy, dy])

    return step


def _solve(device: torch.device) -> Callable[[], Tensor]:
    x, table = torch.randn(2, 8, 16, 16, device=device), torch.randn(1, 10, device=device)
    m, counter, w = (
        torch.randn(4, 8, 16, 16, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.ones(1, device=device),
    )
    history, seeds = torch.zeros(2, 2, *x.shape, device=device), torch.tensor([[1, 0], [1, 1]], device=device)

    def step() -> Tensor:
        counter.zero_()
        history.zero_()
        return solver_step(x, m, table, counter, guidance_scale=w, history=history, seeds=seeds)

    return step


def _loss(loss: Any, device: torch.device, side: int) -> Callable[[], tuple[Tensor, Tensor]]:
    pred, target = torch.randn(2, 2, 4, side, side, device=device)
    pred.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(pred, target)
        return value.detach(), torch.autograd.grad(value, pred)[0]

    return step


def _diffuse(device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    z0, t, bars = torch.randn(4, 8, 16, 16, device=device), torch.arange(4, device=device), torch.rand(4, device=device)
    return lambda: diffuse(z0, t, bars, 3, cutmix_prob=0.5)


def _ddim(device: torch.device) -> Callable[[], Tensor]:
    x, m, bars = (
        torch.randn(2, 8, 16, 16, device=device),
        torch.randn(2, 8, 16, 16, device=device),
        torch.tensor([0.5, 0.6], device=device),
    )
    return lambda: ddim_step(x, m, bars[0], bars[1])


def _mix(device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    x, residual, dy = torch.randn(3, 5, 8, 16, 16, device=device)
    volumes = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32, device=device)
    leaves = [t.requires_grad_() for t in (x, torch.randn(5, 3, 8, device=device), torch.randn(8, device=device))]

    def step() -> tuple[Tensor, ...]:
        y = mix_slices(leaves[0], leaves[1], volumes, leaves[2], residual)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step


OPS: dict[str, Callable[[torch.device], Callable[[], Any]]] = {
    "group_norm_silu": lambda d: _train(d, 16),
    "group_norm_silu in two launches": lambda d: _train(d, 128),
    "ddim_step": _ddim,
    "solver_step": _solve,
    "frequency_loss": lambda d: _loss(frequency_loss, d, 16),
    "frequency_loss by FFT": lambda d: _loss(frequency_loss, d, 64),
    "spectral_mse": lambda d: _loss(spectral_mse, d, 16),
    "diffuse": _diffuse,
    "mix_slices": _mix,
    "philox_normal": lambda d: lambda: philox_normal((3, 8, 16, 16), 7, device=d),
}
each_op = pytest.mark.parametrize("op", OPS)


def tensors(out: Any) -> list[Tensor]:
    return [t.clone() for t in ([out] if isinstance(out, Tensor) else out)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@each_op
def test_a_captured_graph_replays_the_same_bits(op: str) -> None:
    with backend("triton"):
        call = OPS[op](torch.device("cuda"))
        expected = tensors(call())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
    for _ in range(3):
        graph.replay()
        assert same(tensors(out), expected)


def test_a_captured_step_walks_down_its_table() -> None:
    """One captured step, thousands of programs, six replays: the counter is advanced by the kernel alone."""
    x, m, table = (
        torch.randn(4000, 8, 16, 16, device="cuda"),
        torch.randn(4000, 8, 16, 16, device="cuda"),
        torch.randn(7, 6, device="cuda"),
    )
    counter = torch.zeros(2, dtype=torch.int32, device="cuda")
    with backend("triton"):
        solver_step(x, m, table, counter)
        counter.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = solver_step(x, m, table, counter)
        counter.zero_()
        for row in table[:6]:
            graph.replay()
            x0 = row[0] * x + row[1] * m
            torch.testing.assert_close(y, row[4] * x + row[5] * m + row[2] * x0)
    assert counter.tolist() == [6, 0]


@each_op
def test_a_side_stream_gives_the_same_bits(op: str) -> None:
    with backend("triton"):
        call = OPS[op](torch.device("cuda"))
        expected = tensors(call())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = tensors(call())
        stream.synchronize()
    assert same(got, expected)


@each_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
def test_a_second_device_that_is_not_the_current_one(op: str) -> None:
    with backend("triton"):
        call = OPS[op](torch.device("cuda:1"))
        got = tensors(call())
        with torch.cuda.device(1):
            assert same(got, tensors(call()))
    assert all(t.device == torch.device("cuda:1") for t in got)
