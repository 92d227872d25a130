"""Metrics of pairs of images, of one image's sharpness and of a set's diversity.

Images are `[N, 1, H, W]` float in [-1, 1], so the data range is 2 wherever a formula has one; figures are one for each
image or pair, float64 `[N]`. SSIM and PSNR compare an image with its own original: of samples that have none they say
how alike brains are, not how good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtra, NotFinite, UserError

RANGE = 2.0
MS_SSIM_WINDOW, MS_SSIM_LEAST = 7, 112  # pixels; five scales of a window of 11 need 176
FFT_SIZE = 60 / 256  # of 002's metric, a part of the side
PAIRS = 200  # of a set, that diversity is told by
PRESERVED, SMOOTH = 0.12, 0.06  # of the largest gradient: Li & Bovik's thresholds


def check_images(name: str, images: Tensor, least: int = 1) -> Tensor:
    """The images as float32 on the CPU.

    Raises:
        ValueError: another shape, fewer than `least`, NaN, or values outside [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise UserError(f"{name}: got shape {list(images.shape)}, allowed is [N, 1, H, W]")
    if len(images) < least:
        raise UserError(f"{name}: got {len(images)} images, allowed is {least} or more")
    images = images.detach().cpu().float()
    if not images.isfinite().all():
        raise NotFinite(f"{name}: got NaN or infinity, allowed are numbers from -1 to 1")
    low, high = float(images.min()), float(images.max())
    if low < -1 - 1e-4 or high > 1 + 1e-4:
        raise UserError(f"{name}: got values from {low:.3g} to {high:.3g}, allowed is -1 to 1")
    return images


def _check_pair(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    a, b = check_images("images", images), check_images("originals", originals)
    if a.shape != b.shape:
        raise UserError(f"images, originals: got shapes {list(a.shape)} and {list(b.shape)}, allowed are equal ones")
    return a, b


def skimage_metrics(name: str) -> Any:
    try:
        import skimage.metrics
    except ImportError:
        raise MissingExtra(name, "scikit-image", "eval") from None
    return skimage.metrics


def _of_each(metric: Callable[[np.ndarray, np.ndarray], Any], images: Tensor, originals: Tensor) -> Tensor:
    a, b = (x[:, 0].double().numpy() for x in _check_pair(images, originals))
    found = [float(metric(original, image)) for image, original in zip(a, b, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity, -1 to 1, 1 is equal: `mean (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 +
    s_y^2 + c2))` over Gaussian windows of 11 pixels, sigma 1.5, with `c = (0.01 * 2)^2, (0.03 * 2)^2`.

    By scikit-image. Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    how: dict[str, Any] = {"data_range": RANGE, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    of = skimage_metrics("ssim").structural_similarity
    return _of_each(lambda x, y: of(x, y, **how), images, originals)


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB, larger is nearer: `10 log10(2^2 / mean (x - y)^2)`; infinity where equal. By
    scikit-image."""
    of = skimage_metrics("psnr").peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return _of_each(lambda x, y: of(x, y, data_range=RANGE), images, originals)


def nrmse(images: Tensor, originals: Tensor) -> Tensor:
    """Root mean squared error over the original's range, 0 is equal: `sqrt(mean (x - y)^2) / (max y - min y)`. By
    scikit-image.

    Raises:
        ValueError: as all metrics of pairs, or an original of one value.
    """
    flat = (originals.flatten(1).amax(1) == originals.flatten(1).amin(1)).nonzero().flatten().tolist()
    if flat:
        raise UserError(f"originals: image {flat[0]} has one value, allowed is a range to divide by")
    of = skimage_metrics("nrmse").normalized_root_mse
    return _of_each(lambda x, y: of(x, y, normalization="min-max"), images, originals)


def ms_ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Multi-scale structural similarity, 0 to 1, 1 is equal: contrast and structure of five halvings and the luminance
    of the last, to the powers .0448, .2856, .3001, .2363, .1333.

    Windows are even, of 7 pixels, not Gaussian of 11: those do not fit the last scale of 128 pixels. By torchmetrics.
    Source: Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216.

    Raises:
        ValueError: as all metrics of pairs, or a side below 112 pixels.
    """
    a, b = _check_pair(images, originals)
    if min(a.shape[2:]) < MS_SSIM_LEAST:
        raise UserError(f"images: got {a.shape[2]} x {a.shape[3]} pixels, allowed is {MS_SSIM_LEAST} or more a side")
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as of
    except ImportError:
        raise MissingExtra("ms_ssim", "torchmetrics", "eval") from None
    how: dict[str, Any] = {"gaussian_kernel": False, "kernel_size": MS_SSIM_WINDOW, "data_range": RANGE}
    chunks = zip(a.split(64), b.split(64), strict=True)
    return torch.cat([of(x, y, reduction="none", normalize="relu", **how).reshape(-1) for x, y in chunks]).double()


def four_g_r_ssim(images: Tensor, originals: Tensor) -> Tensor:
    """4-G-r*-SSIM, -1 to 1, 1 is equal: the structure `r* = s_xy / (s_x s_y)` of the gradients of both, averaged over
    four kinds of pixels, and these over one another.

    r* is 1 where both windows are flat and 0 where one is (Rouse & Hemami 2008); gradients are magnitudes of Sobel's
    (Chen et al. 2006); the kinds are edges of both, edges of one, smooth, and the rest, which is texture, by 0.12 and
    0.06 of the original's largest gradient (Li & Bovik 2010); a kind that is nowhere does not count. Windows as
    `ssim`'s. Source: Renieblas et al. 2017, doi:10.1117/1.JMI.4.3.035501, who put the four together; 003 has it from
    Pinaya et al. 2022.
    """
    a, b = (x.double() for x in _check_pair(images, originals))
    x, y = _gradient(a), _gradient(b)
    structure = _structure(x, y)
    largest = y.amax((2, 3), keepdim=True)
    of_x, of_y = x > PRESERVED * largest, y > PRESERVED * largest
    smooth = (y < SMOOTH * largest) & ~of_x
    kinds = (of_x & of_y, of_x ^ of_y, smooth, ~(of_x | of_y | smooth))
    means, there = [], []
    for kind in kinds:
        size = kind.sum((1, 2, 3))
        means.append((structure * kind).sum((1, 2, 3)) / size.clamp(min=1))
        there.append(size > 0)
    return (torch.stack(means) * torch.stack(there)).sum(0) / torch.stack(there).sum(0)


def _gradient(x: Tensor) -> Tensor:
    """Magnitudes of Sobel's gradient, edges continued."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=x.dtype) / 4
    both = torch.stack([kernel, kernel.T])[:, None]
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), both).square().sum(1, keepdim=True).sqrt()


def _structure(x: Tensor, y: Tensor) -> Tensor:
    """r* of every window."""
    ramp = torch.arange(-5, 6, dtype=x.dtype)
    line = (-(ramp**2) / (2 * 1.5**2)).exp()
    line = (line / line.sum())[None, None]

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(F.pad(z, (5, 5, 5, 5), mode="reflect"), line[:, :, None]), line[..., None])

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    flat_x, flat_y = var_x < 1e-12, var_y < 1e-12  # float64's rounding of values about 1
    r = (mean(x * y) - mean_x * mean_y) / (var_x.clamp(min=1e-12) * var_y.clamp(min=1e-12)).sqrt()
    return torch.where(flat_x | flat_y, (flat_x & flat_y).double(), r)


def laplacian_variance(images: Tensor) -> Tensor:
    """002's first sharpness: the variance of `x_up + x_down + x_left + x_right - 4 x` of the image in 0 to 255.

    It is no quality: noise, and the blocks of an enlarged image, raise it above the original's.
    """
    x = _to_255(images)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=x.dtype)[None, None]
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel).var((1, 2, 3), correction=0)


def fft_sharpness(images: Tensor) -> Tensor:
    """002's second sharpness, in its unit: `mean 20 ln |y|`, y the image in 0 to 255 without the frequencies whose
    numbers are below 60 / 256 of the side, in both directions.

    At 256 pixels that is PyImageSearch's `detect_blur_fft`, size 60, which fits 002's numbers (natural logarithm, so no
    dB). It is no quality: see `laplacian_variance`.
    """
    x = _to_255(images)
    height, width = x.shape[2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))
    down, right = round(FFT_SIZE * height), round(FFT_SIZE * width)
    spectrum[:, :, height // 2 - down : height // 2 + down, width // 2 - right : width // 2 + right] = 0
    left: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(2, 3))).abs()
    return 20 * (left + 1e-12).log().mean((1, 2, 3))


def _to_255(images: Tensor) -> Tensor:
    return ((check_images("images", images).double() + 1) * 127.5).round()


def radial_spectrum(images: Tensor) -> Tensor:
    """Power by radius, float64 `[N, side // 2]`, `side` the smaller one: the mean of `|FFT(x)|^2 / (H W)` over the
    frequencies whose distance from 0 rounds to k cycles along it, for k from 0."""
    x = check_images("images", images).double()
    side = min(x.shape[2:])
    power = torch.fft.fft2(x, norm="ortho").abs().square()[:, 0]
    down, right = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) * (side / n) for n in x.shape[2:])
    radius = (down[:, None] ** 2 + right[None] ** 2).sqrt().round().long().flatten()
    count = torch.bincount(radius).double()
    total = torch.zeros(len(x), len(count), dtype=torch.float64).index_add(1, radius, power.flatten(1))
    return (total / count)[:, : side // 2]


def pairs_of(n: int, seed: int = 0, most: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Two int64 `[pairs]`: all pairs of n things, or `most` of them drawn without replacement."""
    if n < 2:
        raise UserError(f"n: got {n} images, allowed is 2 or more: there is no pair")
    first, second = torch.triu_indices(n, n, 1)
    some = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:most]
    return first[some], second[some]


def diversity(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Of pairs of different images of one set: `rms`, `sqrt(mean (x - y)^2)`; `ms_ssim`, where images are large enough;
    and `4-g-r-ssim`; the smaller the last two, the more diverse. Source: Pinaya et al. 2022, table 1."""
    x = check_images("images", images, 2)
    first, second = pairs_of(len(x), seed)
    a, b = x[first], x[second]
    found = {"rms": (a - b).double().square().mean((1, 2, 3)).sqrt(), "4-g-r-ssim": four_g_r_ssim(a, b)}
    return found | ({"ms_ssim": ms_ssim(a, b)} if min(x.shape[2:]) >= MS_SSIM_LEAST else {})


def mean_and_std(values: Tensor) -> dict[str, float]:
    """`mean` and sample `std` of the values that are finite, and `n`, how many those are."""
    finite = values.double()[values.isfinite()]
    n = len(finite)
    spread = float(finite.std()) if n > 1 else 0.0
    return {"mean": float(finite.mean()) if n else math.nan, "std": spread, "n": n}
