"""Tensors of more than 2^31 elements: the last program of each op, alone, on memory that is reserved and hardly
touched.

The programs before it would take the interpreter days; what differs in the last one is the arithmetic of its offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import (
    backend,
    ddim_step,
    diffuse,
    frequency_loss,
    mix_slices,
    philox_normal,
    solver_step,
    spectral_mse,
)
from sbldm_fast.kernels._backend import HAS_TRITON, interpreted
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and interpreted()), reason="only the interpreter can run one program of a grid alone"
)
N, SHAPE = 2**20 + 1, (8, 16, 16)  # 2^31 + 2048 elements, 4.3 GB of float16


@pytest.fixture
def only_the_last_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.runtime import interpreter

    builder, getitem = interpreter.interpreter_builder, interpreter.InterpretedFunction.__getitem__

    def one(self: Any, grid: tuple[int, ...]) -> Any:
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (grid[0] - 1, 0, 0)))
        return getitem(self, (1,))

    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", one)
    with backend("triton"):
        yield


def far(last: Tensor) -> Tensor:
    """`[N, *SHAPE]` whose last sample is `last`; the others are never read."""
    x = torch.empty(N, *SHAPE, dtype=torch.float16)
    x[-1] = last
    return x


def tail(x: Tensor) -> Tensor:
    return x.flatten()[-512:]  # of the last sample, what its last program writes


LAST = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.usefixtures("only_the_last_program")
def test_ddim_step() -> None:
    y = ddim_step(far(LAST[0]), far(LAST[1]), 0.5, 0.6)
    assert torch.equal(tail(y), tail(ddim_step(LAST[:1], LAST[1:], 0.5, 0.6)))


@pytest.mark.usefixtures("only_the_last_program")
def test_solver_step() -> None:
    table, counter = torch.tensor([[2.0, 0.5, 0.3, 1.0, 0.7, 0.1]]), torch.zeros(2, dtype=torch.int32)
    seeds = torch.zeros(N, 2, dtype=torch.int64)
    seeds[-1] = torch.tensor([5, 9])
    y = solver_step(far(LAST[0]), far(LAST[1]), table, counter, seeds=seeds)
    alone = solver_step(LAST[:1], LAST[1:], table, counter.zero_(), seeds=torch.tensor([[5, 9]]))
    assert torch.equal(tail(y), tail(alone))


@pytest.mark.usefixtures("only_the_last_program")
def test_philox_normal() -> None:
    z = philox_normal((N, *SHAPE), 3, dtype=torch.float16)
    assert torch.equal(tail(z), tail(philox_normal((1, *SHAPE), 3, first_index=N - 1, dtype=torch.float16)))


@pytest.mark.usefixtures("only_the_last_program")
def test_mix_slices() -> None:
    x, volumes = far(LAST[0]), torch.ones(N, dtype=torch.int32)
    x[-2] = LAST[1]  # the neighbour below
    weight = torch.randn(1, 3, SHAPE[0]).expand(N, -1, -1)
    y = mix_slices(x, weight, volumes)
    alone = mix_slices(LAST.flip(0), weight[:2], volumes[:2])
    assert torch.equal(tail(y), tail(alone))
    rows = torch.empty(N, 2048, dtype=torch.float16)  # of a table whose last row begins beyond 2^31
    rows[-1] = LAST[0].flatten()
    taps = rows[:, 8:32].unflatten(1, (3, SHAPE[0]))
    assert torch.equal(tail(mix_slices(x, taps, volumes)), tail(mix_slices(LAST.flip(0), taps[-2:], volumes[:2])))


@pytest.mark.usefixtures("only_the_last_program")
def test_diffuse() -> None:
    bars, t = torch.tensor([0.3]), torch.zeros(N, dtype=torch.int64)
    whole, alone = diffuse(far(LAST[0]), t, bars, 1), diffuse(LAST[:1], t[:1], bars, 1, first_index=N - 1)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(tail(a), tail(b))


@pytest.mark.usefixtures("only_the_last_program")
@pytest.mark.parametrize("loss", [frequency_loss, spectral_mse])
def test_gradient_of_losses(loss: Any) -> None:
    op = getattr(torch.ops.sbldm_fast, loss.__name__)
    options = (1.0, 0.5, 0.25, True) if loss is frequency_loss else (256.0, True)
    grad = op(far(LAST[0]), far(LAST[1]), *options)[-1]
    alone = op(LAST[:1], LAST[1:], *options)[-1]
    # the mean is over N times as many elements; the last program of frequency_loss is the last image, of 256
    torch.testing.assert_close(tail(grad)[-256:] * N, tail(alone)[-256:], rtol=1e-5, atol=0)
