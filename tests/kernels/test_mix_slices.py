"""mix_slices: known answers, the kernel against the reference in float64 terms, gradients, bad arguments."""

from __future__ import annotations

import pytest
import torch
from sbldm_fast.kernels import backend, mix_slices
from sbldm_fast.kernels.mix_slices import mix_slices_reference
from torch import Tensor

from .strategies import LAYOUTS as ANY_LAYOUT

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


@pytest.mark.usefixtures("poisoned")
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


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_an_empty_batch_has_gradients_of_zero(name: str) -> None:
    for rows in (0, 1):
        x, weight = torch.empty(0, 3, 2, 2, requires_grad=True), torch.ones(rows, 3, 3, requires_grad=True)
        with backend(name):
            y = mix_slices(x, weight, torch.empty(0, dtype=torch.int32))
        y.sum().backward()
        assert y.shape == (0, 3, 2, 2)
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize("layout", ANY_LAYOUT)
def test_a_graph_is_told_the_layout_that_a_launch_gives(layout: str, device: torch.device) -> None:
    x, residual = ANY_LAYOUT[layout](torch.randn(3, 4, 5, 7)).to(device), torch.randn(3, 4, 5, 7, device=device)
    # a row of a table: a view whose rows lie far apart and begin anywhere
    weight = torch.randn(5, 61, device=device)[2:5, 7:19].unflatten(1, (3, 4))
    given = (x, weight, _volumes(2, 1).to(device), torch.randn(4, device=device), residual)
    if layout in ("nhwc", "transposed"):
        torch.library.opcheck(torch.ops.sbldm_fast.mix_slices.default, given)
    with backend("triton"):
        y = mix_slices(*given)
        fake = torch.ops.sbldm_fast.mix_slices(*(t.to("meta") for t in given))
    torch.testing.assert_close(y, mix_slices_reference(*given))
    assert fake.is_contiguous() == y.is_contiguous() == (layout != "nhwc")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_dtypes_and_layout_and_need_no_values(layout: torch.memory_format, rows: int) -> None:
    x, residual = torch.randn(2, 3, 4, 5, 7).half()
    x, residual = (t.to(memory_format=layout).requires_grad_() for t in (x, residual))
    weight, bias = torch.randn(rows, 3, 4).bfloat16().requires_grad_(), torch.randn(4).requires_grad_()
    found = []
    for device in ("cpu", "meta"):  # on meta tensors a wait for a value is an error
        leaves = [t.detach().to(device).requires_grad_() for t in (x, weight, bias, residual)]
        with backend("triton"):
            y = mix_slices(leaves[0], leaves[1], _volumes(2, 1).to(device), *leaves[2:])
        found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for a, m, leaf in zip(*found, (x, weight, bias, residual), strict=True):
        assert a.dtype == m.dtype == leaf.dtype
        assert a.stride() == m.stride() == leaf.stride()


def test_one_channel_is_side_by_side_whatever_its_stride() -> None:
    weight = torch.tensor([2.0, 3.0, 5.0]).as_strided((1, 3, 1), (3, 1, 7))
    x = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    with backend("triton"):
        assert mix_slices(x, weight, _volumes(2)).flatten().tolist() == [4 + 50, 2 + 40]


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 3)
    with backend("triton"):
        y = mix_slices(x, weight, _volumes(2))
    with pytest.raises(RuntimeError, match="mix_slices: got create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


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
