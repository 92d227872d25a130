"""The gradients of group_norm_silu: by hand, from run to run, and what they cost."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import backend, group_norm_silu
from sbldm_fast.kernels.group_norm_silu_backward import group_norm_silu_backward_reference
from torch.utils._python_dispatch import TorchDispatchMode

from .strategies import LAYOUTS
from .test_group_norm_silu import formula, gradients, problem


class Ops(TorchDispatchMode):
    """The operators that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("view", sorted(set(LAYOUTS) - {"nchw"}))
def test_gradients_may_lie_in_another_way(view: str, device: torch.device, three_way: Any) -> None:
    """To rounding: where dy lies otherwise, Triton spreads the pixels over threads otherwise, and sums in another
    order."""
    x, groups, others = problem((3, 12, 6, 5, 4), torch.float32, device)
    dy = LAYOUTS[view](torch.randn_like(x))
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
