"""group_norm_silu: the Triton kernel against float64 and against PyTorch in the same dtype."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbldm_fast.kernels import GroupNormSiLU, _group_tiles, backend, group_norm_silu
from sbldm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

modules = tuple(importlib.import_module(f"sbldm_fast.kernels.group_norm_silu{part}") for part in ("", "_backward"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # N, C, H, W, groups
    (2, 64, 16, 16, 32),
    (1, 12, 5, 7, 4),  # three channels a group, odd sides
    (2, 6, 3, 3, 1),  # one group
    (3, 8, 1, 1, 8),  # one element a group
    (2, 24, 8, 8, 3),
    (1, 4, 96, 90, 2),  # cut into tiles, the last one ragged
    (0, 8, 4, 4, 2),
]


Problem = tuple[Tensor, int, dict[str, Tensor | None]]


def formula(
    x: Tensor, groups: int, weight: Any, bias: Any, scale: Any, shift: Any, conv_bias: Any, residual: Any, silu: bool
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch operators, in whatever dtype the tensors have: y and h."""
    h = x if conv_bias is None else x + conv_bias[:, None, None]
    h = h if residual is None else h + residual
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch 2.13's gradient fails on a bias alone
    # NCHW: channels_last on a CPU computes E[x^2] - m^2 and would allow too much
    y = torch.group_norm(h.contiguous(), groups, weight, bias)
    y = y if scale is None else y * (1 + scale[..., None, None])
    y = y if shift is None else y + shift[..., None, None]
    return (F.silu(y) if silu else y), h


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.0, channels_last: bool = False
) -> Problem:
    N, C, H, W, groups = shape
    x, residual = (torch.randn(2, N, C, H, W) + mean).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
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
    assert y.stride() == x.stride()


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


VIEWS = {
    "half of a concatenation": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one sample for all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_place(view: str, device: torch.device, three_way: Any) -> None:
    x, groups, others = problem((2, 12, 6, 5, 4), torch.float32, device)
    x = VIEWS[view](x)
    compare(x, groups, others | {"scale": None, "shift": None, "conv_bias": None, "residual": None}, True, three_way)
    compare(x, groups, others | {"scale": None, "shift": None, "residual": None}, True, three_way)


@pytest.mark.parametrize("view", VIEWS)
def test_gradients_may_lie_in_another_way(view: str, device: torch.device, three_way: Any) -> None:
    """To rounding: where dy lies otherwise, Triton spreads the pixels over threads otherwise, and sums in another
    order."""
    x, groups, others = problem((3, 12, 6, 5, 4), torch.float32, device)
    dy = VIEWS[view](torch.randn_like(x))
    assert dy.stride() != x.stride()
    got = []
    for d in (dy, dy.contiguous()):
        leaf = x.clone().requires_grad_()
        with backend("triton"):
            y, h = group_norm_silu(leaf, groups, **others)  # type: ignore[call-overload]  # the residual is there
        torch.autograd.backward([y, h], [d, d])
        got.append(leaf.grad)
    exact = gradients(lambda **t: formula(groups=groups, silu=True, **t), {"x": x, **others}, torch.float64, dy, dy)
    three_way(*got, exact["dx"], gradient=True)


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


def test_a_bias_that_asks_for_no_gradient_costs_none(device: torch.device) -> None:
    x, groups, others = problem((2, 8, 4, 4, 2), torch.float32, device)
    for asks in (False, True):
        bias = others["conv_bias"].detach().requires_grad_(asks)  # type: ignore[union-attr]
        with backend("triton"):
            y = group_norm_silu(x.detach().requires_grad_(), groups, conv_bias=bias)
        with Ops() as ops:
            y.sum().backward()
        assert (torch.ops.aten.sum.dim_IntList in ops.seen) == asks
        assert (bias.grad is not None) == asks


class Ops(TorchDispatchMode):
    """The operators that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


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


def test_known_gradient(device: torch.device) -> None:
    # one group (0, 0, 3, 3): u = (-1, -1, 1, 1), rstd = 2/3; dy = (1, 0, 0, 0): mean dy = 1/4, mean dy u = -1/4
    x = torch.tensor([0.0, 0.0, 3.0, 3.0], device=device).reshape(1, 4, 1, 1).requires_grad_()
    weight = torch.ones(4, device=device, requires_grad=True)
    with backend("triton"):
        y = group_norm_silu(x, 1, weight, eps=1e-12, activation="none")
    y.backward(torch.tensor([1.0, 0, 0, 0], device=device).reshape(1, 4, 1, 1))
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad.flatten().cpu(), torch.tensor([0.5, -0.5, 0.0, 0.0]) * 2 / 3)
    torch.testing.assert_close(weight.grad.cpu(), torch.tensor([-1.0, 0, 0, 0]))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_and_two_agree(
    channels_last: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, three_way: Any
) -> None:
    x, groups, others = problem((2, 12, 16, 15, 2), torch.float32, device, 10.0, channels_last)
    assert _group_tiles.plan(x.shape, groups, channels_last, 4, 8192)[0][3] == 1
    whole = compare(x, groups, others, True, three_way)
    for m in modules:
        monkeypatch.setattr(m, "register_tile", lambda _: 256)
    for tile, chunks in ((4096, 2), (256, 8)):
        _group_tiles.plan.cache_clear()
        monkeypatch.setattr(_group_tiles, "SPLIT_TILE", tile)
        assert _group_tiles.plan(x.shape, groups, channels_last, 4, 256)[0][3] == chunks
        torch.testing.assert_close(whole, compare(x, groups, others, True, three_way), rtol=1e-5, atol=1e-5)
    _group_tiles.plan.cache_clear()


def test_the_crossover_of_an_unmeasured_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _group_tiles.register_tile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card that nobody has measured")
    _group_tiles.register_tile.cache_clear()
    assert _group_tiles.register_tile(torch.device("cuda")) == default == 8192
    _group_tiles.register_tile.cache_clear()


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    x, groups, others = problem((2, 16, 8, 8, 4), torch.float32, device)
    leaves = {"x": x, **others}
    dy = torch.randn_like(x)
    with backend("triton"):
        runs = [
            gradients(lambda x, **o: group_norm_silu(x, groups, **o), leaves, torch.float32, dy, dy) for _ in range(3)
        ]
    for name, first in runs[0].items():
        assert all(torch.equal(first, other[name]) for other in runs[1:])


def test_only_h_is_used(device: torch.device) -> None:
    x, groups, others = problem((2, 8, 4, 4, 2), torch.float32, device)
    x.requires_grad_()
    with backend("triton"):
        _, h = group_norm_silu(x, groups, **others)  # type: ignore[call-overload]  # the residual is there
    h.backward(torch.full_like(h, 3.0))
    assert x.grad is not None
    assert (x.grad == 3).all()


def test_a_second_derivative_is_an_error(device: torch.device) -> None:
    x = torch.randn(1, 4, 3, 3, device=device, requires_grad=True)
    with backend("triton"), pytest.raises(RuntimeError, match="group_norm_silu: got create_graph=True"):
        torch.autograd.grad(group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    with backend("torch"):
        (g,) = torch.autograd.grad(group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


def test_backward_reference_is_the_derivative(device: torch.device) -> None:
    x, groups, others = problem((2, 6, 4, 3, 3), torch.float64, torch.device("cpu"))
    dy, dh = torch.randn(2, *x.shape, dtype=torch.float64)
    for silu in (False, True):
        of = partial(formula, groups=groups, silu=silu)
        expected = gradients(of, {"x": x, **others}, torch.float64, dy, dh)
        h = expected["h"].reshape(2, groups, -1)
        stats = torch.stack([h.mean(-1), 1 / (h.var(-1, correction=0) + 1e-5).sqrt()], 1)
        affine = [others[k] for k in ("weight", "bias", "scale", "shift")]
        got = group_norm_silu_backward_reference(dy, dh, expected["h"], stats, *affine, silu)
        for name, g in zip(("dx", "dweight", "dbias", "dscale", "dshift"), got, strict=True):
            torch.testing.assert_close(g, expected[name])


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
    "three dimensions": ({"x": X[0]}, r"x: got torch.float32 \(8, 3, 3\), allowed is \[N, C, H, W\]"),
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
