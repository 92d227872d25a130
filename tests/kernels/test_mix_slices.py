"""mix_slices: known answers, the kernel against the reference in float64 terms, gradients, bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, mix_slices
from sbldm_fast.kernels.mix_slices import mix_slices_reference
from torch import Tensor

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _volumes(*lengths: int) -> Tensor:
    return torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])


def _by_hand(h: Tensor, weight: Tensor, volumes: Tensor) -> Tensor:
    """In float64, slice by slice."""
    h, taps = h.double(), weight.double()[..., None, None].expand(len(h), -1, -1, -1, -1)
    out = []
    for n in range(len(h)):
        w = taps[n]
        y = h[n] + w[1] * h[n]
        if n > 0 and volumes[n - 1] == volumes[n]:
            y = y + w[0] * h[n - 1]
        if n < len(h) - 1 and volumes[n + 1] == volumes[n]:
            y = y + w[2] * h[n + 1]
        out.append(y)
    return torch.stack(out)


def test_three_slices_by_hand() -> None:
    x = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    weight = torch.tensor([[[2.0], [3.0], [5.0]]])
    assert mix_slices(x, weight, _volumes(3)).flatten().tolist() == [4 + 50, 2 + 40 + 500, 20 + 400]
    assert mix_slices(x, weight, _volumes(2, 1)).flatten().tolist() == [4 + 50, 2 + 40, 400]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_the_reference(dtype: torch.dtype, layout: torch.memory_format, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6, 5, 9).to(dtype, memory_format=layout)
    residual, bias, weight = torch.randn(7, 6, 5, 9).to(dtype), torch.randn(6).to(dtype), torch.randn(rows, 3, 6)
    volumes = _volumes(3, 1, 3)
    with backend("triton"):
        y = mix_slices(x, weight, volumes, bias, residual)
    expected = mix_slices_reference(x, weight, volumes, bias, residual)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    h = (x.float() + bias.float()[:, None, None] + residual.float()).to(dtype)
    exact = _by_hand(h, weight, volumes)
    scale = exact.abs().max()
    assert (y.double() - exact).abs().max() <= (expected.double() - exact).abs().max() + torch.finfo(dtype).eps * scale


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    channels=st.integers(1, 5),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths: list[int], channels: int, h: int, w: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, volumes = torch.randn(sum(lengths), channels, h, w), torch.randn(1, 3, channels), _volumes(*lengths)
    with backend("triton"):
        y = mix_slices(x, weight, volumes)
    torch.testing.assert_close(y.double(), _by_hand(x, weight, volumes), rtol=1e-6, atol=1e-6)


def test_zero_weights_leave_every_bit() -> None:
    x = torch.randn(4, 3, 5, 5)
    for name in ("torch", "triton"):
        with backend(name):
            assert torch.equal(mix_slices(x, torch.zeros(1, 3, 3), _volumes(4)), x)


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_those_of_the_reference(rows: int) -> None:
    torch.manual_seed(1)
    made = []
    for name in ("torch", "triton"):
        torch.manual_seed(1)
        leaves = [torch.randn(5, 4, 3, 3), torch.randn(rows, 3, 4), torch.randn(4), torch.randn(5, 4, 3, 3)]
        x, weight, bias, residual = (t.requires_grad_() for t in leaves)
        with backend(name):
            y = mix_slices(x, weight, _volumes(3, 2), bias, residual)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        made.append([t.grad for t in leaves])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_empty_batch() -> None:
    for name in ("torch", "triton"):
        with backend(name):
            assert mix_slices(
                torch.empty(0, 3, 2, 2), torch.ones(1, 3, 3), torch.empty(0, dtype=torch.int32)
            ).shape == (
                0,
                3,
                2,
                2,
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: got"),
        ({"weight": torch.zeros(3, 3)}, r"weight: got shape \(3, 3\), allowed is \(2, 3, 3\) or \(1, 3, 3\)"),
        ({"volumes": torch.zeros(2)}, "volumes: got torch.float32"),
        ({"volumes": torch.zeros(3, dtype=torch.int32)}, r"volumes: got shape \(3,\)"),
        ({"conv_bias": torch.zeros(4)}, "conv_bias: got shape"),
        ({"residual": torch.zeros(2, 3, 4, 5)}, "residual: got"),
        ({"weight": torch.zeros(1, 3, 3).mT}, "weight: got strides"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(1, 3, 3), "volumes": _volumes(2)} | change
    with pytest.raises(ValueError, match=message):
        mix_slices(**given)
