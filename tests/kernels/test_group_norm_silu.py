"""group_norm_silu: the Triton kernel against float64 and against PyTorch in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import GroupNormSiLU, backend, group_norm_silu
from sbldm_fast.kernels.group_norm_silu import REGISTER_TILE, group_norm_silu_reference
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # N, C, H, W, groups
    (2, 64, 16, 16, 32),
    (1, 12, 5, 7, 4),  # three channels a group, odd sides
    (2, 6, 3, 3, 1),  # one group
    (3, 8, 1, 1, 8),  # one element a group
    (2, 24, 8, 8, 3),
    (1, 4, 96, 90, 2),  # beyond the register tile, a ragged last chunk
    (0, 8, 4, 4, 2),
]


def exact(x: Tensor, groups: int, w: Tensor, b: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    """The formula in float64, written out."""
    N, C, H, W = x.shape
    v = x.double().reshape(N, groups, C // groups * H * W)
    v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = v.reshape(x.shape) * w.double()[:, None, None] + b.double()[:, None, None]
    if scale is not None and shift is not None:
        y = y * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
    return y * y.sigmoid() if silu else y


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.0, channels_last: bool = False) -> Any:
    N, C, H, W, groups = shape
    x = (torch.randn(N, C, H, W) + mean).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(2, C).to(device, dtype)
    scale, shift = torch.randn(2, N, C).to(device, dtype)
    return x, groups, w, b, scale, shift


def compare(x: Tensor, groups: int, w: Tensor, b: Tensor, scale: Any, shift: Any, silu: bool, three_way: Any) -> Tensor:
    activation = "silu" if silu else "none"
    with backend("triton"):
        ours = group_norm_silu(x, groups, w, b, scale=scale, shift=shift, activation=activation)
    # eager PyTorch in NCHW: channels_last on a CPU computes E[x^2] - m^2 and would allow too much
    same = torch.group_norm(x.contiguous(), groups, w, b)
    if scale is not None:
        same = same * (1 + scale[..., None, None]) + shift[..., None, None]
    same = F.silu(same) if silu else same
    three_way(ours, same, exact(x, groups, w, b, scale, shift, silu))
    return ours


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: torch.device, three_way: Any) -> None:
    x, *rest = problem(shape, dtype, device, channels_last=channels_last)
    y = compare(x, *rest, True, three_way)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 32, 8, 8, 8), (1, 4, 96, 90, 2)])
def test_parity_far_from_zero(
    shape: tuple[int, ...], silu: bool, modulated: bool, mean: float, device: torch.device, three_way: Any
) -> None:
    x, groups, w, b, scale, shift = problem(shape, torch.float32, device, mean, channels_last=True)
    compare(x, groups, w, b, *((scale, shift) if modulated else (None, None)), silu, three_way)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 3), groups=st.integers(1, 6), per_group=st.integers(1, 5), H=st.integers(1, 9), W=st.integers(1, 9),
    channels_last=st.booleans(), silu=st.booleans(), dtype=st.sampled_from(DTYPES), mean=st.sampled_from([0.0, 1.0, 100.0]),
)  # fmt: skip
def test_any_shape(
    N: int, groups: int, per_group: int, H: int, W: int, channels_last: bool, silu: bool, dtype: torch.dtype, mean: float, three_way: Any
) -> None:
    x, *rest = problem((N, groups * per_group, H, W, groups), dtype, torch.device("cpu"), mean, channels_last)
    compare(x, *rest, silu, three_way)


VIEWS = {
    "half of a concatenation": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one sample for all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_place(view: str, device: torch.device, three_way: Any) -> None:
    x, groups, w, b, _, _ = problem((2, 12, 6, 5, 4), torch.float32, device)
    x = VIEWS[view](x)
    compare(x, groups, w, b, None, None, True, three_way)


def test_one_row_of_scale_and_shift_serves_the_batch(device: torch.device) -> None:
    x, groups, w, b, scale, shift = problem((3, 8, 4, 4, 2), torch.float32, device)
    with backend("triton"):
        shared = group_norm_silu(x, groups, w, b, scale=scale[:1], shift=shift[:1])
        each = group_norm_silu(x, groups, w, b, scale=scale[:1].repeat(3, 1), shift=shift[:1].repeat(3, 1))
    assert torch.equal(shared, each)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_gives_what_the_reference_gives(value: float, device: torch.device) -> None:
    x, groups, w, b, _, _ = problem((2, 8, 4, 4, 4), torch.float32, device)
    x[0, 3, 1, 1] = value
    with backend("triton"):
        ours = group_norm_silu(x, groups, w, b)
    expected = group_norm_silu_reference(x, groups, w, b)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours[0, 2:4].isnan().all()  # the whole group
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_known_answer(device: torch.device) -> None:
    # the group (1, 3) has mean 2 and variance 1: normalised to -1 and 1 but for eps
    x = torch.tensor([1.0, 3.0], device=device).reshape(1, 2, 1, 1)
    with backend("triton"):
        y = group_norm_silu(x, 1, eps=1e-12, activation="none").flatten()
        z = group_norm_silu(x, 1, eps=1e-12).flatten()
    torch.testing.assert_close(y, torch.tensor([-1.0, 1.0], device=device))
    torch.testing.assert_close(z, torch.tensor([-0.2689414, 0.7310586], device=device))


def test_both_sides_of_the_register_tile_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    x, groups, w, b, _, _ = problem((1, 8, 16, 16, 2), torch.float32, device, 10.0)
    module = importlib.import_module("sbldm_fast.kernels.group_norm_silu")
    with backend("triton"):
        whole = group_norm_silu(x, groups, w, b)
        monkeypatch.setattr(module, "REGISTER_TILE", 64)
        monkeypatch.setattr(module, "LOOP_TILE", 64)
        looped = group_norm_silu(x, groups, w, b)
    assert REGISTER_TILE >= 8 // 2 * 256
    torch.testing.assert_close(whole, looped, rtol=1e-5, atol=1e-5)


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    x, *rest = problem((2, 16, 8, 8, 4), torch.float32, device)
    groups, w, b, scale, shift = rest
    with backend("triton"):
        runs = [group_norm_silu(x, groups, w, b, scale=scale, shift=shift) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_opcheck(device: torch.device) -> None:
    x, groups, w, b, scale, shift = problem((2, 8, 4, 4, 2), torch.float32, device)
    op = torch.ops.sbldm_fast.group_norm_silu.default
    torch.library.opcheck(op, (x, groups, w, b, 1e-5, scale, shift, True))
    torch.library.opcheck(op, (x.contiguous(memory_format=torch.channels_last), groups, None, None, 1e-5, None, None, False))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_without_a_graph_break(name: str) -> None:
    layer = GroupNormSiLU(4, 16).requires_grad_(False)
    x = torch.randn(2, 16, 4, 4)
    expected = layer(x)
    with backend(name):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_module_is_group_norm_then_silu() -> None:
    ours, theirs = GroupNormSiLU(4, 16), torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(ours(x), F.silu(theirs(x)))
    assert repr(ours) == "GroupNormSiLU(4, 16, eps=1e-05, affine=True, activation='silu')"
    assert not list(GroupNormSiLU(4, 16, affine=False).parameters())


def test_gradients_go_through_the_reference() -> None:
    layer = GroupNormSiLU(2, 4).double()
    layer(torch.randn(1, 4, 3, 3)).sum().backward()
    assert layer.weight is not None
    assert layer.weight.grad is not None
    with backend("triton"), pytest.raises(ValueError, match="no backward"):
        layer(torch.randn(1, 4, 3, 3))


X = torch.randn(2, 8, 3, 3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"x": X[0]}, r"x: got shape \(8, 3, 3\), allowed is \[N, C, H, W\]"),
    "float64": ({"x": X.double()}, "x: got torch.float64"),
    "groups that do not divide": ({"num_groups": 3}, "num_groups: got 3, allowed are the divisors of the 8 channels"),
    "no groups": ({"num_groups": 0}, "num_groups: got 0"),
    "eps": ({"eps": 0.0}, "eps: got 0.0, allowed is > 0"),
    "activation": ({"activation": "gelu"}, "activation: got 'gelu', allowed are silu, none"),
    "weight": ({"weight": torch.ones(4)}, r"weight: got shape \(4,\), allowed is \(8,\)"),
    "bias": ({"bias": torch.ones(9)}, r"bias: got shape \(9,\)"),
    "scale": ({"scale": torch.ones(3, 8)}, r"scale: got shape \(3, 8\), allowed is \(2, 8\) or \(1, 8\)"),
    "shift strides": ({"shift": torch.ones(8, 2).t()}, "shift: got strides"),
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
