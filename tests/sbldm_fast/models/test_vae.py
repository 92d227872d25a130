"""The posterior of the autoencoder."""

from __future__ import annotations

import pytest
import torch

from sbldm_fast.models import DiagonalGaussian


def test_kl_by_hand() -> None:
    # KL(N(1, 1) || N(0, 1)) = 1/2 per element; KL(N(0, e^2) || N(0, 1)) = (e^2 - 1 - 2) / 2
    one, zero = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    assert DiagonalGaussian(one, zero).kl().item() == pytest.approx(1.0)
    assert DiagonalGaussian(zero, 2 * one).kl().item() == pytest.approx(2 * (torch.e**2 - 3) / 2)
    assert DiagonalGaussian(zero, zero).kl().item() == 0


def test_posterior_samples_have_its_moments() -> None:
    q = DiagonalGaussian(
        torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2 * torch.log(torch.tensor(0.5)).item())
    )
    z = q.sample(torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(3.0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(z, q.sample(torch.Generator().manual_seed(0)))
