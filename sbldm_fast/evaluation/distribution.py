"""How far two sets of images are apart, by features: KID, the Fréchet distance, precision and recall.

A figure is of an extractor and of a number of images; both stand beside it, and a distance between features of two
extractors is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NotFinite, UserError

NEIGHBOURS = 3  # k of precision and recall
LEAST = 8  # images of a set
PARTS = 10  # of the jackknife


@dataclass(frozen=True)
class Features:
    """`values` float `[N, d]` of N images, the name of the `extractor` that they are from, and int64 `groups` `[N]` of
    images that belong together, as those of one subject do; None: each stands alone.

    Raises:
        ValueError: another shape, fewer than 8 images, NaN or infinity.
    """

    values: Tensor
    extractor: str
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise UserError(f"values: got shape {list(self.values.shape)}, allowed is [N, d]")
        if len(self.values) < LEAST:
            raise UserError(f"values: got {len(self.values)} images, allowed is {LEAST} or more")
        if not self.values.isfinite().all():
            raise NotFinite(f"values: NaN or infinity in features of {self.extractor}, allowed are numbers")
        if self.groups is not None and self.groups.shape != self.values.shape[:1]:
            raise UserError(f"groups: got shape {list(self.groups.shape)}, allowed is [{len(self.values)}]")

    @property
    def parts(self) -> Tensor:
        """The part of the jackknife that each image is in, `[N]`: groups stay whole."""
        of = torch.arange(len(self.values)) if self.groups is None else self.groups.unique(return_inverse=True)[1]
        return of % min(PARTS, int(of.max()) + 1)


def _check(a: Features, b: Features) -> tuple[Tensor, Tensor]:
    if a.extractor != b.extractor:
        raise UserError(f"features: got those of {a.extractor} and of {b.extractor}, allowed is one extractor for both")
    if a.values.shape[1] != b.values.shape[1]:
        raise UserError(
            f"features: got {a.values.shape[1]} and {b.values.shape[1]} dimensions, allowed are equal numbers"
        )
    return a.values.double(), b.values.double()


def frechet_distance(a: Features, b: Features) -> float:
    """The Fréchet distance of the Gaussians of both sets, 0 or more: `|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr sqrt(C_a
    C_b)`.

    The last trace is the sum of the singular values of `A B^T`, for centred features A, B over `sqrt(N - 1)`: no square
    root of a matrix, and right for fewer images than dimensions, too. It is biased upwards by about one over N, so it
    is read beside the distance of two real sets of the same sizes. Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    x, y = _check(a, b)
    centred = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    # the triangle of a QR decomposition has the same covariance in no more than d rows
    small = [torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z for z in centred]
    root = torch.linalg.svdvals(small[0] @ small[1].T).sum()
    traces = sum(z.square().sum() for z in centred)
    return float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * root)


def kid(a: Features, b: Features) -> tuple[float, float]:
    """The kernel distance and its standard error: the unbiased estimate of `E k(a, a') + E k(b, b') - 2 E k(a, b)` with
    `k(x, y) = (x y / d + 1)^3`, over all images; about 0 of one distribution, and below it by chance.

    The error is a jackknife's that leaves out tenths of both sets, of whole `groups`. Source: Bińkowski et al. 2018,
    arXiv:1801.01401.
    """
    x, y = _check(a, b)
    d = x.shape[1]
    within_x, within_y, between = ((u @ v.T / d + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))

    def estimate(i: Tensor, j: Tensor) -> float:
        inner = (k[s][:, s] for k, s in ((within_x, i), (within_y, j)))
        alike = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in inner)
        return float(alike - 2 * between[i][:, j].mean())

    i, j = torch.arange(len(x)), torch.arange(len(y))
    number = 1 + max(int(a.parts.max()), int(b.parts.max()))
    left = torch.tensor([estimate(i[a.parts != p], j[b.parts != p]) for p in range(number)], dtype=torch.float64)
    error = ((number - 1) * left.var(correction=0)) ** 0.5
    return estimate(i, j), float(error)


def precision_recall(samples: Features, real: Features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of samples that lie within the real set, and of real images that lie within the samples: nearer to one
    of its members than that one's k-th neighbour in its own set.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 to 3.
    """
    x, y = _check(samples, real)
    if not 1 <= k < min(len(x), len(y)):
        raise UserError(f"k: got {k}, allowed is 1 to {min(len(x), len(y)) - 1}")
    reach = [torch.cdist(z, z).kthvalue(k + 1, dim=1).values for z in (x, y)]  # the nearest is itself
    between = torch.cdist(x, y)
    return float((between <= reach[1]).any(1).double().mean()), float(
        (between <= reach[0][:, None]).any(0).double().mean()
    )


def compare(samples: Features, real: Features) -> dict[str, Any]:
    """All of it as a report: `kid` leads, with its standard error; what is to be known of the numbers is in
    `warnings`."""
    n, d = min(len(samples.values), len(real.values)), samples.values.shape[1]
    distance, error = kid(samples, real)
    precision, recall = precision_recall(samples, real)
    return {
        "extractor": samples.extractor,
        "samples": len(samples.values),
        "real": len(real.values),
        "dimensions": d,
        "kid": distance,
        "kid_standard_error": error,
        "frechet_distance": frechet_distance(samples, real),
        "precision": precision,
        "recall": recall,
        "warnings": [f"{n} images for {d} dimensions: the Fréchet distance is mostly bias"] if n < d else [],
    }
