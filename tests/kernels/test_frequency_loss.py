"""frequency_loss: both paths against a literal FFT in float64, loss, means and gradients."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, frequency_loss
from torch import Tensor

module = importlib.import_module("sbldm_fast.kernels.frequency_loss")  # the package's attribute is the function
BOTH = pytest.mark.parametrize("name", ["torch", "triton"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(pred: Tensor, target: Tensor, low: float, high: float, cutoff: float) -> Tensor:
    """A literal FFT, the mask by fftfreq, in the dtype of the tensors (float16 on a CPU has no FFT: float32 there)."""
    e = pred - target
    H, W = e.shape[-2:]
    work = torch.float64 if e.dtype == torch.float64 else torch.float32
    power = torch.fft.fft2(e.to(work)).abs() ** 2 / (H * W)
    fy, fx = torch.fft.fftfreq(H, dtype=torch.float64)[:, None], torch.fft.fftfreq(W, dtype=torch.float64)
    mask = (torch.sqrt(fy**2 + fx**2) <= cutoff).to(e.device)
    return (torch.where(mask, low, high) * power).mean()


def run(loss: Any, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [pred.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()]
    out = loss(*leaves)
    out.backward(torch.tensor(2.5, dtype=out.dtype, device=out.device))
    return out.detach(), *(leaf.grad for leaf in leaves)


SHAPES = [
    (2, 8, 16, 16),
    (1, 4, 32, 32),
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (1, 2, 1, 9),
    (1, 2, 40, 33),
    (1, 1, 64, 64),
    (1, 1, 33, 2),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.1), (1.0, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(
    shape: tuple[int, ...], weights: tuple[float, float], dtype: torch.dtype, device: torch.device, three_way: Any
) -> None:
    pred, target = (torch.randn(2, *shape) + 3).to(device, dtype)
    with backend("triton"):
        ours = run(lambda p, t: frequency_loss(p, t, low_weight=weights[0], high_weight=weights[1]), pred, target)
    same = run(lambda p, t: formula(p, t, *weights, 0.25), pred, target)
    exact = run(lambda p, t: formula(p, t, *weights, 0.25), pred.double(), target.double())
    for a, b, c in zip(ours, same, exact, strict=True):
        three_way(a, b, c, gradient=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 2),
    C=st.integers(1, 3),
    H=st.integers(1, 36),
    W=st.integers(1, 36),
    cutoff=st.floats(0, 0.75),
    last=st.booleans(),
    view=st.booleans(),
)
def test_any_shape_layout_and_cutoff(
    N: int, C: int, H: int, W: int, cutoff: float, last: bool, view: bool, three_way: Any
) -> None:
    pred, target = torch.randn(2, N, C, H, W)
    pred = pred.contiguous(memory_format=torch.channels_last) if last else pred
    target = target.repeat_interleave(2, 3)[..., ::2] if view else target
    with backend("triton"):
        ours = run(lambda p, t: frequency_loss(p, t, low_weight=0.3, cutoff=cutoff), pred, target)
    same = run(lambda p, t: formula(p, t, 0.3, 1.0, cutoff), pred, target)
    exact = run(lambda p, t: formula(p, t, 0.3, 1.0, cutoff), pred.double(), target.double())
    for a, b, c in zip(ours, same, exact, strict=True):
        three_way(a, b, c, gradient=True)


@BOTH
@pytest.mark.parametrize("side", [16, 40])
def test_equal_weights_are_the_mean_squared_error(name: str, side: int) -> None:
    pred, target = torch.randn(2, 2, 3, side, side)
    with backend(name):
        loss = frequency_loss(pred, target)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred, target), rtol=1e-5, atol=0)


@BOTH
@pytest.mark.parametrize(
    ("mode", "is_low"),
    [((0, 0), True), ((0, 4), True), ((4, 1), False), ((3, 2), True), ((0, 8), False), ((12, 0), True)],
)
def test_known_answer(name: str, mode: tuple[int, int], is_low: bool) -> None:
    # one cosine wave of 16 pixels, frequencies mode/16: mode 4 is 1/4, on the cutoff; 12 is -1/4; (4, 1) lies beyond.
    # Its mean square is 1/2, or 1 where the wave is its own mirror
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.cos(2 * torch.pi * (mode[0] * y + mode[1] * x) / 16)[None, None]
    power = 1.0 if mode in ((0, 0), (0, 8)) else 0.5
    with backend(name):
        loss, low, high = frequency_loss(
            wave, torch.zeros_like(wave), low_weight=2.0, high_weight=3.0, return_means=True
        )
    torch.testing.assert_close(
        torch.stack([low, high]), torch.tensor([power, 0.0] if is_low else [0.0, power]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(loss, torch.tensor(power * (2.0 if is_low else 3.0)), rtol=1e-5, atol=1e-5)


def test_basis_of_the_paper_has_49_columns_and_is_orthonormal() -> None:
    basis = module.low_basis(16, 16, 0.25, torch.device("cpu"))
    assert basis.shape == (49, 256)
    torch.testing.assert_close(basis @ basis.T, torch.eye(49), rtol=0, atol=1e-6)


@BOTH
def test_little_beside_much_is_not_lost(name: str) -> None:
    # a high part a millionth of the low one: total - low would leave nothing of it
    wave = torch.cos(torch.arange(16.0) * torch.pi)[None, None, None, :].expand(1, 1, 16, 16)
    pred = 1000.0 + 1e-3 * wave
    with backend(name):
        high = frequency_loss(pred.double().float(), torch.zeros(1, 1, 16, 16), return_means=True)[2]
    exact = float(((pred - 1000.0) ** 2).mean())  # what float32 left of the wave
    assert float(high) == pytest.approx(exact, rel=0.05)


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    pred, target = torch.randn(2, 3, 4, 16, 16, device=device)
    with backend("triton"):
        runs = [run(frequency_loss, pred, target) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_second_derivative_is_an_error(device: torch.device) -> None:
    pred = torch.randn(1, 1, 4, 4, device=device, requires_grad=True)
    with backend("triton"), pytest.raises(RuntimeError, match="frequency_loss, spectral_mse: got create_graph=True"):
        torch.autograd.grad(frequency_loss(pred, torch.zeros_like(pred)), pred, create_graph=True)


@pytest.mark.parametrize("side", [8, 40])
def test_opcheck(side: int, device: torch.device) -> None:
    pred, target = torch.randn(2, 1, 2, side, side, device=device)
    op = torch.ops.sbldm_fast.frequency_loss.default
    torch.library.opcheck(op, (pred.requires_grad_(), target, 1.0, 0.5, 0.25, True))
    torch.library.opcheck(op, (pred.detach(), target, 1.0, 0.5, 0.25, False))


@BOTH
@pytest.mark.parametrize("side", [8, 40])
def test_trains_compiled_without_a_graph_break(name: str, side: int) -> None:
    layer, x, target = torch.nn.Conv2d(2, 2, 1), torch.randn(1, 2, side, side), torch.randn(1, 2, side, side)

    def loss(x: Tensor) -> Any:
        return frequency_loss(layer(x), target, high_weight=0.5)

    got = []
    with backend(name):
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            value = f(x)
            value.backward()
            got.append([value.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    torch.testing.assert_close(*got)


@BOTH
def test_autocast_computes_in_float32(name: str) -> None:
    pred, target = torch.randn(2, 1, 2, 8, 8)
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        loss = frequency_loss(pred, target)
    assert loss.dtype == torch.float32
    with backend(name):
        assert torch.equal(loss, frequency_loss(pred, target))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_shows(name: str, value: float) -> None:
    pred = torch.randn(2, 1, 8, 8)
    pred[0, 0, 3, 3] = value
    with backend(name):
        assert not frequency_loss(pred, torch.zeros_like(pred)).isfinite()


@BOTH
def test_batch_of_none_is_nan_as_in_mse_loss(name: str) -> None:
    x = torch.empty(0, 2, 4, 4)
    with backend(name):
        assert frequency_loss(x, x).isnan()


X = torch.randn(1, 2, 4, 4)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dims": ({"pred": X[0]}, r"pred: got torch.float32 \(2, 4, 4\), allowed is \[N, C, H, W\]"),
    "dtype": ({"pred": X.double()}, "pred: got torch.float64"),
    "target": ({"target": X[:, :1]}, r"target: got torch.float32 \(1, 1, 4, 4\) on cpu, allowed is the like of pred"),
    "device": ({"target": X.to("meta")}, "target: got torch.float32 .* on meta"),
    "cutoff": ({"cutoff": -0.1}, "cutoff: got -0.1, allowed is 0 to 1"),
    "low": ({"low_weight": -1.0}, "low_weight: got -1.0"),
    "high": ({"high_weight": float("nan")}, "high_weight: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        frequency_loss(**({"pred": X, "target": X} | given))
