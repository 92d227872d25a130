"""ddim_step: the Triton kernel against float64 and against PyTorch in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, ddim_step
from sbldm_fast.kernels.ddim_step import PREDICTION_TYPES
from torch import Tensor

A, A_PREV = 0.36, 0.64


def stepped(
    x: Tensor, m: Tensor, a: Any, b: Any, eta: float, z: Tensor | None, kind: str, clip: float | None
) -> Tensor:
    """The formula, in whatever dtype the tensors have."""
    if kind == "epsilon":
        x0, e = (x - (1 - a) ** 0.5 * m) / a**0.5, m
    elif kind == "sample":
        x0, e = m, (x - a**0.5 * m) / (1 - a) ** 0.5
    else:
        x0, e = a**0.5 * x - (1 - a) ** 0.5 * m, a**0.5 * m + (1 - a) ** 0.5 * x
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    y: Tensor = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * e
    return y if z is None else y + sigma * z


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_parity(
    kind: str, eta: float, clip: float | None, dtype: torch.dtype, device: torch.device, three_way: Any
) -> None:
    x, m, z = torch.randn(3, 2, 3, 5, 7).to(device, dtype)
    with backend("triton"):
        ours = ddim_step(x, m, A, A_PREV, eta=eta, noise=z, prediction_type=kind, clip_range=clip)
    arguments = (A, A_PREV, eta, z if eta else None, kind, clip)
    same = stepped(x, m, *arguments)
    three_way(ours, same, stepped(x.double(), m.double(), *arguments[:3], z.double() if eta else None, *arguments[4:]))


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 0.9999), st.floats(0, 1), st.floats(0, 1), st.sampled_from(PREDICTION_TYPES), st.integers(1, 4))
def test_both_backends_agree_for_any_schedule(a: float, up: float, eta: float, kind: str, n: int) -> None:
    a_prev = a + (1 - a) * up
    x, m, z = torch.randn(3, n, 4, 3, 3)
    out = {}
    for name in ("torch", "triton"):
        with backend(name):
            out[name] = ddim_step(x, m, a, a_prev, eta=eta, noise=z, prediction_type=kind)
    torch.testing.assert_close(out["triton"], out["torch"], rtol=1e-5, atol=1e-4)


def test_known_answer(device: torch.device) -> None:
    # a = 0.36, a' = 0.64: x0 = (1 - 0.8 * 0.5) / 0.6 = 1, x' = 0.8 * 1 + 0.6 * 0.5 = 1.1
    x, m = torch.ones(1, 1, 1, 1, device=device), torch.full((1, 1, 1, 1), 0.5, device=device)
    with backend("triton"):
        assert ddim_step(x, m, A, A_PREV).item() == pytest.approx(1.1, abs=1e-6)
        # x0 clipped to 0.5, e kept: 0.8 * 0.5 + 0.6 * 0.5
        assert ddim_step(x, m, A, A_PREV, clip_range=0.5).item() == pytest.approx(0.7, abs=1e-6)
        # eta = 1: sigma^2 = 0.36/0.64 * (1 - 0.36/0.64); noise 1
        sigma = math.sqrt(0.36 / 0.64 * (1 - 0.36 / 0.64))
        expected = 0.8 + math.sqrt(0.36 - sigma**2) * 0.5 + sigma
        assert ddim_step(x, m, A, A_PREV, eta=1.0, noise=torch.ones_like(x)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_alpha_for_each_sample(channels_last: bool, device: torch.device) -> None:
    x, m = torch.randn(2, 3, 4, 4, 4, device=device)
    if channels_last:
        x, m = (t.contiguous(memory_format=torch.channels_last) for t in (x, m))
    a, b = torch.tensor([0.2, 0.5, 0.8], device=device), torch.tensor([0.3, 0.6, 1.0], device=device)
    with backend("triton"):
        together = ddim_step(x, m, a, b)
        alone = torch.cat([ddim_step(x[i : i + 1], m[i : i + 1], a[i], b[i]) for i in range(3)])
    assert torch.equal(together, alone)
    assert together.stride() == x.stride()


def test_nan_passes_clipping(device: torch.device) -> None:
    x = torch.full((1, 1, 1, 1), float("nan"), device=device)
    with backend("triton"):
        assert ddim_step(x, x, A, A_PREV, clip_range=1.0).isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_samples_than_a_grid_axis_holds() -> None:
    x, m = torch.randn(2, 70_000, 3, device="cuda")
    with backend("triton"):
        torch.testing.assert_close(ddim_step(x, m, A, A_PREV), stepped(x, m, A, A_PREV, 0.0, None, "epsilon", None))


def test_the_stride_of_a_batch_of_one_says_nothing(device: torch.device) -> None:
    x = torch.randn(1, 3, 4, 4, device=device)
    odd = torch.empty_strided((1, 3, 4, 4), (7, 16, 4, 1), device=device).copy_(x)
    with backend("triton"):
        assert torch.equal(ddim_step(x, odd, A, A_PREV), ddim_step(x, x, A, A_PREV))


def test_batch_of_none(device: torch.device) -> None:
    x = torch.empty(0, 4, 3, 3, device=device)
    with backend("triton"):
        assert ddim_step(x, x, A, A_PREV).shape == x.shape


def test_opcheck(device: torch.device) -> None:
    x, m, z = torch.randn(3, 2, 3, 4, 4, device=device)
    a, b = torch.tensor([A, A_PREV], device=device)
    for kind in PREDICTION_TYPES:
        torch.library.opcheck(torch.ops.sbldm_fast.ddim_step.default, (x, m, a, b, 0.5, z, kind, 1.0))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_without_a_graph_break(name: str) -> None:
    x, m = torch.randn(2, 2, 3, 4, 4)
    a, b = torch.tensor(A), torch.tensor(A_PREV)
    expected = ddim_step(x, m, a, b)
    with backend(name):
        torch.testing.assert_close(torch.compile(ddim_step, fullgraph=True, backend="aot_eager")(x, m, a, b), expected)


X = torch.randn(2, 3, 4, 4)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": X.double()}, "x: got torch.float64"),
    "shape": (
        {"model_output": X[:1]},
        r"model_output: got torch.float32 \(1, 3, 4, 4\) on cpu, allowed is the like of x",
    ),
    "mixed dtypes": ({"model_output": X.half()}, "model_output: got torch.float16"),
    "alpha_bar": ({"alpha_bar": torch.ones(3)}, r"alpha_bar: got shape \(3,\), allowed is \(\) or \(1,\) or \(2,\)"),
    "device": ({"model_output": X.to("meta")}, "model_output: got .* on meta"),
    "device of alpha": ({"alpha_bar": torch.ones((), device="meta")}, "alpha_bar: got device meta"),
    "eta": ({"eta": 1.5}, "eta: got 1.5, allowed is 0 to 1"),
    "no noise": ({"eta": 0.5}, "noise: got None"),
    "prediction": (
        {"prediction_type": "score"},
        "prediction_type: got 'score', allowed are epsilon, sample, v_prediction",
    ),
    "clip": ({"clip_range": -1.0}, "clip_range: got -1.0, allowed is > 0 or None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ddim_step(**({"x": X, "model_output": X, "alpha_bar": A, "alpha_bar_prev": A_PREV} | given))


def test_layouts_must_agree(device: torch.device) -> None:
    x = X.to(device)
    with backend("triton"), pytest.raises(ValueError, match="model_output: got strides"):
        ddim_step(x, x.contiguous(memory_format=torch.channels_last), A, A_PREV)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_noise_of_a_short_step_is_exact(name: str, device: torch.device) -> None:
    """1 - a/a' would lose all but two digits of a step this short."""
    a, b = (torch.tensor(v, device=device) for v in (0.625, 0.625004))
    x, z = torch.zeros(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)
    with backend(name):
        y = ddim_step(x, x, a, b, eta=1.0, noise=z)
    p, q = float(a), float(b)
    assert y.item() == pytest.approx(math.sqrt((1 - q) / (1 - p) * (1 - p / q)), rel=1e-6)
