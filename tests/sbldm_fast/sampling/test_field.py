"""The noise of a volume: white in a slice, alike along z as its formula says, the same wherever it is read."""

from __future__ import annotations

import math

import pytest
import torch

from sbldm_fast.sampling.field import COARSE, LENGTH, SHARED, _cosines, draw_field, node_weights, to_slices

CPU = torch.device("cpu")


def test_a_slice_reads_its_height_alone() -> None:
    whole = draw_field([2.0 * i for i in range(-10, 11)], 3, (2, 4, 6), CPU)
    every_other = draw_field([4.0 * i for i in range(-5, 6)], 3, (2, 4, 6), CPU)
    torch.testing.assert_close(whole[::2], every_other, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[7:9], draw_field([-6.0, -4.0], 3, (2, 4, 6), CPU), rtol=0, atol=1e-6)
    assert not torch.allclose(whole, draw_field([2.0 * i for i in range(-10, 11)], 4, (2, 4, 6), CPU))


def test_noise_between_the_nodes_is_of_unit_variance_too() -> None:
    weights, _ = node_weights([0.3 * i for i in range(20)])
    torch.testing.assert_close(weights.square().sum(1), torch.ones(20))


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0, 7.0, 12.0])
def test_it_correlates_along_z_as_the_formula_says(distance: float) -> None:
    """By the algebra of its weights, not by drawing: g, and with it each mode."""
    weights, _ = node_weights([0.0, distance])
    expected = math.exp(-((distance / LENGTH) ** 2) / 2)
    assert float(weights[0] @ weights[1]) == pytest.approx(expected, abs=2e-3)


def test_modes_share_what_the_formula_says() -> None:
    shared, own = torch.randn(1, 8, 12), torch.randn(1, 8, 12)
    noise = to_slices(shared, own)[0].double()
    modes = _cosines(8) @ noise @ _cosines(12).T
    for m, n in ((0, 0), (1, 0), (0, 1), (3, 5), (7, 11)):
        s = SHARED * math.exp(-math.hypot(m * 12 / 8, n) / COARSE)
        expected = math.sqrt(s) * float(shared[0, m, n]) + math.sqrt(1 - s) * float(own[0, m, n])
        assert float(modes[m, n]) == pytest.approx(expected, abs=1e-5)


def test_the_cosine_transform_is_scipys() -> None:
    from scipy.fft import dctn

    x = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(_cosines(6) @ x @ _cosines(9).T, torch.from_numpy(dctn(x.numpy(), norm="ortho")))


def test_a_slice_is_white() -> None:
    noise = torch.cat([draw_field([0.0], seed, (8, 8, 8), CPU) for seed in range(40)])
    values = noise.flatten()
    assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
    assert float(values.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / values.numel()))
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean()
    assert abs(float(neighbours)) < 5 / math.sqrt(values.numel())
