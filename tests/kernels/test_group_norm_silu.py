"""group_norm_silu: the Triton kernel against float64 and against PyTorch in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbldm_fast.kernels import GroupNormSiLU, backend, group_norm_silu
from torch import Tensor

from .strategies import LAYOUTS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # N, C, spatial, groups
    (2, 64, 16, 16, 32),
    (1, 12, 5, 7, 4),  # three channels a group, odd sides
    (2, 6, 3, 3, 1),  # one group
    (3, 8, 1, 1, 8),  # one element a group
    (2, 24, 8, 8, 3),
    (1, 4, 96, 90, 2),  # cut into tiles, the last one ragged
    (0, 8, 4, 4, 2),
    (2, 8, 7, 4),  # one axis
    (2, 12, 3, 4, 5, 4),  # volumes
    (1, 2, 20, 24, 18, 1),
    (0, 8, 2, 2, 2, 2),
]


Problem = tuple[Tensor, int, dict[str, Tensor | None]]


def formula(
    x: Tensor, groups: int, weight: Any, bias: Any, scale: Any, shift: Any, conv_bias: Any, residual: Any, silu: bool
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch operators, in whatever dtype the tensors have: y and h."""
    ones = [1] * (x.dim() - 2)
    h = x if conv_bias is None else x + conv_bias.reshape(-1, *ones)
    h = h if residual is None else h + residual
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch 2.13's gradient fails on a bias alone
    # NCHW: channels_last on a CPU computes E[x^2] - m^2 and would allow too much
    y = torch.group_norm(h.contiguous(), groups, weight, bias)
    y = y if scale is None else y * (1 + scale.reshape(*scale.shape, *ones))
    y = y if shift is None else y + shift.reshape(*shift.shape, *ones)
    return (F.silu(y) if silu else y), h


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.0, channels_last: bool = False
) -> Problem:
    N, C, *spatial, groups = shape
    x, residual = (torch.randn(2, N, C, *spatial) + mean).to(device, dtype)
    if channels_last:
        x = LAYOUTS["nhwc"](x)
    weight, bias, conv_bias = torch.randn(3, C).to(device, dtype)
    scale, shift = torch.randn(2, N, C).to(device, dtype)
    return (
        x,
        groups,
        {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "conv_bias": conv_bias, "residual": residual},
    )


def gradients(
    run: Any, tensors: dict[str, Tensor | None], dtype: torch.dtype, dy: Tensor, dh: Tensor
) -> dict[str, Tensor]:
    """y, h and the gradient of every tensor, computed in `dtype`."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
    y, h = run(**leaves)
    if h is leaves["x"]:
        y.backward(dy.to(dtype))
    else:
        torch.autograd.backward([y, h], [dy.to(dtype), dh.to(dtype)])
    return {"y": y.detach(), "h": h.detach()} | {f"d{k}": t.grad for k, t in leaves.items() if t is not None}


def compare(x: Tensor, groups: int, others: dict[str, Tensor | None], silu: bool, three_way: Any) -> Tensor:
    """Forward and every gradient by the three-way rule; the kernel's y."""

    def ours(x: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        out: Any = group_norm_silu(x, groups, **rest, activation="silu" if silu else "none", return_sum=True)
        return out  # type: ignore[no-any-return]  # a pair, with return_sum

    def theirs(**tensors: Any) -> tuple[Tensor, Tensor]:
        return formula(groups=groups, silu=silu, **tensors)

    tensors = {"x": x, **others}
    dy, dh = torch.randn(2, *x.shape, device=x.device)
    dy, dh = (d.to(x.dtype) for d in (dy, dh))
    with backend("triton"):
        found = gradients(ours, tensors, x.dtype, dy, dh)
    same, exact = gradients(theirs, tensors, x.dtype, dy, dh), gradients(theirs, tensors, torch.float64, dy, dh)
    for name in found:
        three_way(found[name], same[name], exact[name], gradient=name.startswith("d"))
    return found["y"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: torch.device, three_way: Any
) -> None:
    x, *rest = problem(shape, dtype, device, channels_last=channels_last)
    y = compare(x, *rest, True, three_way)
    for axis, size in enumerate(x.shape):
        assert size == 1 or not len(x) or y.stride(axis) == x.stride(axis)


@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize(
    "given",
    [(), ("weight", "bias"), ("scale", "shift"), ("weight", "residual"), ("shift",), ("bias", "scale"), ("conv_bias",)],
)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 32, 8, 8, 8), (1, 4, 96, 90, 2)])
def test_parity_far_from_zero(
    shape: tuple[int, ...], silu: bool, given: tuple[str, ...], mean: float, device: torch.device, three_way: Any
) -> None:
    x, groups, others = problem(shape, torch.float32, device, mean, channels_last=True)
    compare(x, groups, {k: v if k in given else None for k, v in others.items()}, silu, three_way)


@pytest.mark.parametrize("view", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 12, 6, 5, 4), (2, 12, 4, 3, 5, 4)], ids=["image", "volume"])
def test_views_are_read_in_place(shape: tuple[int, ...], view: str, device: torch.device, three_way: Any) -> None:
    x, groups, others = problem(shape, torch.float32, device)
    x = LAYOUTS[view](x)
    compare(x, groups, others | {"scale": None, "shift": None, "conv_bias": None, "residual": None}, True, three_way)
    compare(x, groups, others | {"scale": None, "shift": None, "residual": None}, True, three_way)


@pytest.mark.parametrize("shape", [(2, 16, 6, 6, 4), (2, 4, 12, 12, 4), (1, 4, 96, 90, 2)])
def test_a_large_bias_costs_no_digits_where_a_tile_is_not_full(
    shape: tuple[int, ...], device: torch.device, three_way: Any
) -> None:
    x, groups, others = problem(shape, torch.float32, device)
    bias = 10 + torch.rand(shape[1], device=device)
    compare(0.01 * x, groups, dict.fromkeys(others) | {"conv_bias": bias}, True, three_way)
    with backend("triton"):
        ours, of_the_sum = (
            group_norm_silu(0.01 * x, groups, conv_bias=bias),
            group_norm_silu(0.01 * x + bias[:, None, None], groups),
        )
    assert (ours - of_the_sum).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8, 4), (1, 4, 96, 90, 2)])
def test_a_bias_before_the_norm_is_not_written_where_nobody_asks(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Without gradient y alone leaves the kernel, and is to the bit what comes beside the sum."""
    x, groups, others = problem(shape, dtype, device)
    given = {k: others[k] for k in ("weight", "bias", "conv_bias")}
    with backend("triton"):
        y, h = group_norm_silu(x, groups, **given, return_sum=True)
        alone = group_norm_silu(x, groups, **given)
        without = torch.ops.sbldm_fast.group_norm_silu(
            x, given["conv_bias"], None, groups, None, None, 1e-5, None, None, True, False
        )
    assert torch.equal(y, alone)
    assert torch.equal(h, (x.float() + others["conv_bias"].float()[:, None, None]).to(dtype))  # type: ignore[union-attr]
    assert without[1].numel() == 0


def test_a_sum_of_one_term_is_that_term(device: torch.device) -> None:
    x, groups, _ = problem((2, 8, 4, 4, 2), torch.float32, device)
    for name in ("torch", "triton"):
        with backend(name):
            assert group_norm_silu(x, groups, return_sum=True)[1].data_ptr() == x.data_ptr()


def test_one_row_of_scale_and_shift_serves_the_batch(device: torch.device) -> None:
    x, groups, others = problem((3, 8, 4, 4, 2), torch.float32, device)
    out = []
    for shared in (True, False):
        rows = {k: others[k][:1].clone().requires_grad_() for k in ("scale", "shift")}  # type: ignore[index]
        with backend("triton"):
            y = group_norm_silu(
                x, groups, **{k: r if shared else r.expand(3, -1).contiguous() for k, r in rows.items()}
            )
        y.square().sum().backward()
        out.append((y, rows["scale"].grad, rows["shift"].grad))
    assert torch.equal(out[0][0], out[1][0])
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_gives_what_the_reference_gives(value: float, device: torch.device) -> None:
    x, groups, _ = problem((2, 8, 4, 4, 4), torch.float32, device)
    x[0, 3, 1, 1] = value
    out = {}
    for name in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with backend(name):
            y = group_norm_silu(leaf, groups)
        y.backward(torch.ones_like(y))
        out[name] = y.detach(), leaf.grad
    assert out["triton"][0][0, 2:4].isnan().all()  # the whole group
    for ours, expected in zip(out["triton"], out["torch"], strict=True):
        assert ours is not None
        assert expected is not None
        assert torch.equal(ours.isnan(), expected.isnan())
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_known_answer(device: torch.device) -> None:
    # the group (1, 3) has mean 2 and variance 1: normalised to -1 and 1 but for eps
    x = torch.tensor([1.0, 3.0], device=device).reshape(1, 2, 1, 1)
    with backend("triton"):
        y = group_norm_silu(x, 1, eps=1e-12, activation="none").flatten()
        z = group_norm_silu(x, 1, eps=1e-12).flatten()
        halves = group_norm_silu(x / 2, 1, eps=1e-12, residual=x / 2)
    torch.testing.assert_close(y, torch.tensor([-1.0, 1.0], device=device))
    torch.testing.assert_close(z, torch.tensor([-0.2689414, 0.7310586], device=device))
    torch.testing.assert_close(halves[0].flatten(), z)
    assert torch.equal(halves[1], x)


def test_opcheck(device: torch.device) -> None:
    x, groups, others = problem((2, 8, 4, 4, 2), torch.float32, device)
    w, b, scale, shift, conv_bias, residual = (t.requires_grad_() for t in others.values() if t is not None)
    op = torch.ops.sbldm_fast.group_norm_silu.default
    torch.library.opcheck(op, (x.requires_grad_(), conv_bias, residual, groups, w, b, 1e-5, scale, shift, True, True))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(op, (last, None, None, groups, None, None, 1e-5, None, None, False, False))
    _, h, stats = (t.detach() for t in op(x, conv_bias, residual, groups, w, b, 1e-5, scale, shift, True, True))
    backward = torch.ops.sbldm_fast.group_norm_silu_backward.default
    torch.library.opcheck(
        backward, (torch.randn_like(h), None, h, stats, *(t.detach() for t in (w, b, scale, shift)), True)
    )


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_trains_compiled_without_a_graph_break(name: str) -> None:
    layer = GroupNormSiLU(32, 64)
    x, scale, shift = torch.randn(2, 64, 4, 4), torch.randn(2, 64), torch.randn(2, 64)
    got = []
    with backend(name):
        for forward in (layer, torch.compile(layer, fullgraph=True, backend="inductor")):
            layer.zero_grad()
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
            y = forward(x, scale, shift)
            y.square().mean().backward()
            optimizer.step()
            got.append([y, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(got[0]) == 3
    torch.testing.assert_close(*got)


def test_autocast_leaves_the_dtype_of_x(device: torch.device) -> None:
    layer = GroupNormSiLU(4, 16).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 16, 4, 4, device=device, dtype=dtype)
        for name in ("torch", "triton"):
            with backend(name), torch.autocast(device.type, torch.bfloat16):
                y = layer(x)
            assert y.dtype == dtype
            layer.zero_grad()
            y.sum().backward()
            assert layer.weight is not None
            assert layer.weight.grad is not None
            assert layer.weight.grad.dtype == torch.float32


def test_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """Samples 2^31 elements apart, in memory that is reserved and hardly touched."""
    far = 2**31 + 64
    room = torch.empty(far + 256, dtype=torch.float16, device=device)
    x = room.as_strided((2, 8, 4, 4), (far, 16, 4, 1))
    x.copy_(torch.randn(2, 8, 4, 4))
    with backend("triton"):
        assert torch.equal(group_norm_silu(x, 2), group_norm_silu(x.contiguous(), 2))
    wide = room.as_strided((1, 2, 2, 2), (0, 64, 16, 2**31))
    wide.copy_(torch.randn(1, 2, 2, 2))
    with backend("triton"):
        assert torch.equal(group_norm_silu(wide, 2), group_norm_silu(wide.contiguous(), 2))


def test_module_is_group_norm_then_silu() -> None:
    ours, theirs = GroupNormSiLU(4, 16), torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(ours(x), F.silu(theirs(x)))
    assert repr(ours) == "GroupNormSiLU(4, 16, eps=1e-05, affine=True, activation='silu')"
    assert not list(GroupNormSiLU(4, 16, affine=False).parameters())


X = torch.randn(2, 8, 3, 3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two dimensions": (
        {"x": X[0, 0]},
        r"x: got torch.float32 \(3, 3\), allowed is \[N, C, L\] or \[N, C, H, W\] or \[N, C, D, H, W\] in float32",
    ),
    "six dimensions": ({"x": X[None, None]}, r"x: got torch.float32 \(1, 1, 2, 8, 3, 3\), allowed is"),
    "float64": ({"x": X.double()}, "x: got torch.float64"),
    "groups that do not divide": ({"num_groups": 3}, "num_groups: got 3, allowed are the divisors of the 8 channels"),
    "no groups": ({"num_groups": 0}, "num_groups: got 0"),
    "eps": ({"eps": 0.0}, "eps: got 0.0, allowed is > 0"),
    "activation": ({"activation": "gelu"}, "activation: got 'gelu', allowed are silu, none"),
    "eps that is no number": ({"eps": float("nan")}, "eps: got nan"),
    "weight dtype": ({"weight": torch.ones(8).double()}, "weight: got torch.float64, allowed is torch.float32 or"),
    "weight": ({"weight": torch.ones(4)}, r"weight: got shape \(4,\), allowed is \(8,\)"),
    "bias": ({"bias": torch.ones(9)}, r"bias: got shape \(9,\)"),
    "conv_bias": ({"conv_bias": torch.ones(2, 8)}, r"conv_bias: got shape \(2, 8\), allowed is \(8,\)"),
    "scale": ({"scale": torch.ones(3, 8)}, r"scale: got shape \(3, 8\), allowed is \(2, 8\) or \(1, 8\)"),
    "shift strides": ({"shift": torch.ones(8, 2).t()}, "shift: got strides"),
    "residual": ({"residual": X[:1]}, r"residual: got torch.float32 \(1, 8, 3, 3\) on cpu, allowed is the like of x"),
    "residual dtype": ({"residual": X.half()}, "residual: got torch.float16"),
    "device": ({"weight": torch.ones(8, device="meta")}, "weight: got device meta, allowed is that of x, cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**({"x": X, "num_groups": 4} | given))


def test_bad_module() -> None:
    with pytest.raises(ValueError, match="num_groups: got 3, allowed are the divisors of num_channels = 8"):
        GroupNormSiLU(3, 8)
