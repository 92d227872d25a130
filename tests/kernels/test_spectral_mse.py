"""spectral_mse: Parseval's form against a literal FFT in float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, spectral_mse
from torch import Tensor

module = importlib.import_module("sbldm_fast.kernels.spectral_mse")  # the package's attribute is the function
BOTH = pytest.mark.parametrize("name", ["torch", "triton"])
NORMS = pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])


def literal(pred: Tensor, target: Tensor, norm: str) -> Tensor:
    e = pred - target
    E = torch.fft.fft2(e if e.dtype == torch.float64 else e.float(), norm=norm)
    return (E.abs() ** 2).mean()


def run(loss: Any, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [pred.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()]
    out = loss(*leaves)
    out.backward()
    return out.detach(), *(leaf.grad for leaf in leaves)


@NORMS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 3, 5, 7), (1, 1, 1, 1), (1, 2, 40, 33)])
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, norm: str, device: torch.device, three_way: Any) -> None:
    pred, target = (torch.randn(2, *shape) + 3).to(device, dtype)
    with backend("triton"):
        ours = run(lambda p, t: spectral_mse(p, t, norm=norm), pred, target)
    same = run(lambda p, t: literal(p, t, norm), pred, target)
    exact = run(lambda p, t: literal(p, t, norm), pred.double(), target.double())
    for a, b, c in zip(ours, same, exact, strict=True):
        three_way(a, b, c, gradient=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 3),
    C=st.integers(1, 3),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    last=st.booleans(),
    view=st.booleans(),
)
def test_any_shape_and_layout(N: int, C: int, H: int, W: int, last: bool, view: bool, three_way: Any) -> None:
    pred, target = torch.randn(2, N, C, H, W)
    pred = pred.contiguous(memory_format=torch.channels_last) if last else pred
    target = target.repeat_interleave(2, 2)[:, :, ::2] if view else target
    with backend("triton"):
        ours = run(spectral_mse, pred, target)
    same, exact = (
        run(lambda p, t: literal(p, t, "backward"), pred.to(d), target.to(d)) for d in (torch.float32, torch.float64)
    )
    for a, b, c in zip(ours, same, exact, strict=True):
        three_way(a, b, c, gradient=True)


@BOTH
def test_known_answer(name: str) -> None:
    # e = 1 on a 2x4 image: the FFT is 8 at the origin and 0 elsewhere, |8|^2 / 8 elements = 8
    one, zero = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    with backend(name):
        assert [float(spectral_mse(one, zero, norm=norm)) for norm in ("backward", "ortho", "forward")] == [
            8.0,
            1.0,
            0.125,
        ]


def test_reference_is_the_literal_transform() -> None:
    pred, target = torch.randn(2, 1, 2, 6, 5)
    for norm in ("backward", "ortho", "forward"):
        torch.testing.assert_close(
            module.spectral_mse_reference(pred, target, norm), spectral_mse(pred, target, norm=norm)
        )


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    pred, target = torch.randn(2, 2, 4, 40, 40, device=device)
    with backend("triton"):
        runs = [run(spectral_mse, pred, target) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_opcheck(device: torch.device) -> None:
    pred, target = torch.randn(2, 1, 2, 5, 5, device=device)
    op = torch.ops.sbldm_fast.spectral_mse.default
    torch.library.opcheck(op, (pred.requires_grad_(), target, 25.0, True))
    torch.library.opcheck(op, (pred.detach(), target, 25.0, False))


@BOTH
def test_trains_compiled_without_a_graph_break(name: str) -> None:
    layer, x, target = torch.nn.Conv2d(2, 2, 1), torch.randn(1, 2, 6, 6), torch.randn(1, 2, 6, 6)

    def loss(x: Tensor) -> Tensor:
        return spectral_mse(layer(x), target)

    got = []
    with backend(name):
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            f(x).backward()
            got.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(*got)


@BOTH
def test_batch_of_none_is_nan_as_in_mse_loss(name: str) -> None:
    x = torch.empty(0, 2, 4, 4)
    with backend(name):
        assert spectral_mse(x, x).isnan()


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_shows(name: str, value: float) -> None:
    pred = torch.full((1, 1, 4, 4), value)
    with backend(name):
        assert not spectral_mse(pred, torch.zeros_like(pred)).isfinite()


X = torch.randn(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pred": X[0]}, "pred: got torch.float32"),
        ({"target": X.to("meta")}, "target: got torch.float32 .* on meta, allowed is the like of pred"),
        ({"norm": "none"}, "norm: got 'none', allowed are backward, ortho, forward"),
    ],
)
def test_bad_input_names_the_argument(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_mse(**({"pred": X, "target": X} | given))
