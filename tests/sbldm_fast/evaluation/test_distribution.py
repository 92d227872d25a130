"""Distances of sets against closed forms and against other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sbldm_fast.evaluation.distribution import Features, compare, frechet_distance, kid, precision_recall


def features(values: Tensor, extractor: str = "e") -> Features:
    return Features(values, extractor)


def gaussian(n: int, mean: Tensor, cov: Tensor) -> Tensor:
    """n vectors with exactly that mean and covariance."""
    d = len(mean)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    own = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(own, x.T, upper=False).T @ torch.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_two_gaussians_is_its_closed_form() -> None:
    """Covariances that commute: `|m|^2 + sum (sqrt a - sqrt b)^2`; others, by the eigenvalues of their product."""
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x, y = gaussian(50, mean, a.diag()), gaussian(40, torch.zeros(3).double(), b.diag())
    wanted = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(features(x), features(y)) == pytest.approx(wanted, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    other = turn @ b.diag() @ turn.T
    z = gaussian(40, torch.zeros(3).double(), other)
    roots = torch.linalg.eigvals(a.diag().to(torch.float64) @ other).real.sqrt().sum()
    wanted = float(mean.square().sum() + a.sum() + b.sum() - 2 * roots)
    assert frechet_distance(features(x), features(z)) == pytest.approx(wanted, abs=1e-6)


def test_frechet_distance_of_few_images_is_that_of_the_square_root() -> None:
    """Fewer images than dimensions, where covariances are singular, against SciPy's square root of a matrix."""
    scipy = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (9, 12))
    root = torch.from_numpy(scipy.sqrtm((x.T.cov() @ y.T.cov()).numpy()).real)
    wanted = float((x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace())
    assert frechet_distance(features(x), features(y)) == pytest.approx(wanted, abs=1e-4)


def test_kid_is_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(30, 6, generator=generator).double(), torch.randn(30, 6, generator=generator).double() + 0.5
    assert kid(features(x), features(y))[0] == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kid_by_hand() -> None:
    """Eight times 0 and eight times 1, of one dimension: k is 1, 8 and 1."""
    x, y = torch.zeros(8, 1), torch.ones(8, 1)
    assert kid(features(x), features(y))[0] == pytest.approx(1 + 8 - 2 * 1)


def test_the_standard_error_of_kid_is_that_of_repetitions() -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = [kid(*(features(torch.randn(60, 4, generator=generator)) for _ in range(2))) for _ in range(60)]
    values, errors = (torch.tensor(v) for v in zip(*drawn, strict=True))
    assert 0.6 < float(errors.mean() / values.std()) < 1.7
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5, "unbiased"


def test_groups_are_left_out_whole() -> None:
    """Ten subjects of six equal slices each: the error of single slices is far too small, that of subjects is not."""
    generator = torch.Generator().manual_seed(5)
    of = torch.arange(10).repeat_interleave(6)
    found = []
    for _ in range(40):
        x, y = (torch.randn(10, 4, generator=generator).repeat_interleave(6, 0) for _ in range(2))
        grouped = kid(Features(x, "e", of), Features(y, "e", of))
        found.append((grouped[0], grouped[1], kid(features(x), features(y))[1]))
    values, whole, single = (torch.tensor(v) for v in zip(*found, strict=True))
    assert 0.5 < float(whole.mean() / values.std()) < 2
    assert float(single.mean()) < 0.7 * float(whole.mean())
    with pytest.raises(ValueError, match=r"groups: got shape \[3\], allowed is \[10\]"):
        Features(torch.randn(10, 2), "e", of[:3])


def test_precision_and_recall_of_sets_that_are_known() -> None:
    """Samples that are real ones, samples far away, and samples at half of the real places."""
    real = torch.arange(16.0)[:, None] * torch.tensor([[1.0, 0.0]])
    assert precision_recall(features(real), features(real)) == (1.0, 1.0)
    assert precision_recall(features(real + 1000), features(real)) == (0.0, 0.0)
    half = torch.cat([real[:4], real[:4] + 0.01])
    assert precision_recall(features(half), features(real), k=1) == (1.0, 4 / 16)


def test_the_report_warns_of_few_images() -> None:
    x = torch.randn(10, 20)
    found = compare(features(x), features(x + 1))
    assert found["warnings"] == ["10 images for 20 dimensions: the Fréchet distance is mostly bias"]
    assert found["extractor"] == "e"
    assert (found["samples"], found["real"], found["dimensions"]) == (10, 10, 20)
    many = torch.randn(30, 2)
    assert compare(features(many), features(many))["warnings"] == []


def test_bad_features_are_named() -> None:
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="features: got those of e and of f, allowed is one extractor for both"):
        compare(features(x), features(x, "f"))
    with pytest.raises(ValueError, match="features: got 3 and 2 dimensions"):
        frechet_distance(features(x), features(x[:, :2]))
    with pytest.raises(ValueError, match="values: got 7 images, allowed is 8 or more"):
        features(x[:7])
    with pytest.raises(ValueError, match=r"values: got shape \[10\], allowed is \[N, d\]"):
        features(x[:, 0])
    with pytest.raises(ValueError, match="values: NaN or infinity in features of e"):
        features(torch.full((10, 3), math.nan))
    with pytest.raises(ValueError, match="k: got 10, allowed is 1 to 9"):
        precision_recall(features(x), features(x), k=10)
