"""Metrics against known answers and against the libraries that have them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sbldm_fast.evaluation import metrics as m

skimage = pytest.importorskip("skimage.metrics")
PAIRED = (m.ssim, m.psnr, m.nrmse, m.ms_ssim, m.four_g_r_ssim)


def images(n: int = 3, side: int = 128, seed: int = 0) -> Tensor:
    """Smooth, unequal, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 9, 9, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def noisy(x: Tensor, level: float = 0.1) -> Tensor:
    return (x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))).clamp(-1, 1)


def test_ssim_and_psnr_are_scikit_images() -> None:
    x = images()
    y = noisy(x)
    for i in range(len(x)):
        a, b = x[i, 0].double().numpy(), y[i, 0].double().numpy()
        wanted = skimage.structural_similarity(
            a, b, data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(m.ssim(y, x)[i]) == pytest.approx(wanted, abs=1e-12)
        assert float(m.psnr(y, x)[i]) == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=2.0), abs=1e-9)


def test_psnr_and_nrmse_by_hand() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[..., 8:] = 1.0
    y = x - 0.25
    assert float(m.psnr(y, x)) == pytest.approx(10 * math.log10(4 / 0.0625))
    assert float(m.nrmse(y, x)) == pytest.approx(0.25)  # over a range of 1


def test_ms_ssim_is_torchmetrics() -> None:
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    x = images()
    y = noisy(x)
    of = MultiScaleStructuralSimilarityIndexMeasure(
        gaussian_kernel=False, kernel_size=7, data_range=2.0, normalize="relu"
    )
    assert float(m.ms_ssim(y, x).mean()) == pytest.approx(float(of(y, x)), abs=1e-6)
    least = images(1, 112)
    assert float(m.ms_ssim(least, least)) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="got 111 x 111 pixels, allowed is 112 or more a side"):
        m.ms_ssim(images(1, 111), images(1, 111))


@pytest.mark.parametrize("metric", PAIRED)
def test_of_equal_images_and_of_worse_ones(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = images()
    best = {m.psnr: math.inf, m.nrmse: 0.0}.get(metric, 1.0)
    assert metric(x, x).tolist() == pytest.approx([best] * 3, abs=1e-6)
    near, far = metric(noisy(x, 0.05), x), metric(noisy(x, 0.3), x)
    assert bool((far > near).all() if metric is m.nrmse else (far < near).all())


def test_r_star_of_gradients_does_not_see_contrast() -> None:
    """`x / 2` has gradients of half the size: r* of each window is 1; of `-x`, whose gradients' magnitudes are equal,
    too. Only the kinds of pixels change, and these weigh ones."""
    x = noisy(images())  # no window is so flat that half of it counts as flat
    for y in (x / 2, -x):
        assert m.four_g_r_ssim(y, x).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_r_star_of_flat_windows() -> None:
    """1 where both are flat, 0 where one is: a flat image beside a ramp, whose gradient is flat, too, and beside an
    edge."""
    flat = torch.zeros(1, 1, 32, 32)
    ramp = torch.linspace(-0.5, 0.5, 32).expand(1, 1, 32, 32).contiguous()
    structure = m._structure(m._gradient(flat.double())[..., 8:-8], m._gradient(ramp.double())[..., 8:-8])
    assert structure.unique().tolist() == [1.0]
    edge = torch.where(torch.arange(32) < 16, -1.0, 1.0).expand(1, 1, 32, 32).double()
    structure = m._structure(m._gradient(flat.double()), m._gradient(edge))
    near = structure[0, 0, 16]
    assert near[12:20].tolist() == [0.0] * 8
    assert near[:8].tolist() == [1.0] * 8


def test_laplacian_variance_by_hand() -> None:
    """One pixel of 255 in black: the Laplacian is -1020 there and 255 at four neighbours."""
    x = -torch.ones(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    values = [-1020.0, *[255.0] * 4, *[0.0] * 76]
    assert float(m.laplacian_variance(x)) == pytest.approx(np.var(values))


def test_sharpness_of_a_blurred_ramp_by_hand() -> None:
    """A step in columns of 0 and 200 has a Laplacian of 200 at two columns; as a ramp over two more pixels, of half and
    less; by 002's other metric it is blurred, too."""
    step = torch.where(torch.arange(16) < 8, 0.0, 200.0)
    ramp = step.clone()
    ramp[7:9] = torch.tensor([50.0, 150.0])
    found = []
    for line, laplacian in ((step, [200.0, -200.0]), (ramp, [50.0, 50.0, -50.0, -50.0])):
        x = (line / 127.5 - 1).expand(1, 1, 16, 16)
        values = np.array(laplacian + [0.0] * (16 - len(laplacian)))
        assert float(m.laplacian_variance(x)) == pytest.approx(values.var(), rel=1e-6)
        found.append(float(m.fft_sharpness(x)))
    assert found[1] < found[0]


def test_fft_sharpness_by_its_source() -> None:
    """PyImageSearch's formula, literally, at its size."""
    x = images(1, 256, 3)
    x = noisy(x)
    grey = ((x[0, 0].double().numpy() + 1) * 127.5).round()
    shifted = np.fft.fftshift(np.fft.fft2(grey))
    shifted[128 - 60 : 128 + 60, 128 - 60 : 128 + 60] = 0
    wanted = np.mean(20 * np.log(np.abs(np.fft.ifft2(np.fft.ifftshift(shifted)))))
    assert float(m.fft_sharpness(x)) == pytest.approx(wanted, rel=1e-6)


def test_blocks_are_called_sharper_than_what_they_are_of() -> None:
    x = noisy(images(4), 0.02)
    blocks = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 4), scale_factor=4.0, mode="nearest")
    smooth = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    assert bool((m.laplacian_variance(blocks) > m.laplacian_variance(smooth)).all())


def test_a_wave_has_its_power_at_its_radius() -> None:
    """`cos(2 pi 5 x / 64)` has two modes of (64 * 64 / 2)^2 / 64^2 each; on the ring of 5 there are 32 more."""
    x = (2 * math.pi * 5 * torch.arange(64) / 64).cos().expand(1, 1, 64, 64)
    power = m.radial_spectrum(x)[0]
    f = torch.fft.fftfreq(64, 1 / 64)
    ring = int(((f[:, None] ** 2 + f[None] ** 2).sqrt().round() == 5).sum())
    assert power.argmax() == 5
    assert float(power[5]) == pytest.approx(2 * 64 * 64 / 4 / ring, rel=1e-5)
    assert float(power[[0, 1, 2, 3, 4, 6, 7]].abs().max()) < 1e-9


@pytest.mark.parametrize("along", [2, 3])
def test_a_wave_of_an_oblong_image_has_its_power_at_its_frequency(along: int) -> None:
    """A cycle in 12.8 pixels is 5 in the smaller side, 64, along either axis."""
    n = (192, 64)[along - 2]
    wave = (2 * math.pi * 5 * n / 64 * torch.arange(n) / n).cos()
    x = wave.reshape(1, 1, *((-1, 1) if along == 2 else (1, -1))).expand(1, 1, 192, 64)
    power = m.radial_spectrum(x)[0]
    assert power.shape == (32,)
    assert power.argmax() == 5
    others = torch.cat([power[:5], power[6:]])
    assert float(others.abs().max()) < 1e-9


def test_pairs_are_different_and_drawn_once() -> None:
    first, second = m.pairs_of(5)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [
        (i, j) for i in range(5) for j in range(i + 1, 5)
    ]
    first, second = m.pairs_of(100, most=50)
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == 50
    assert bool((first < second).all())
    with pytest.raises(ValueError, match="n: got 1 images, allowed is 2 or more"):
        m.pairs_of(1)


def test_copies_are_not_diverse() -> None:
    same, other = m.diversity(images(1).expand(6, -1, -1, -1)), m.diversity(images(6))
    assert float(same["rms"].max()) == 0
    assert float(same["ms_ssim"].min()) == pytest.approx(1, abs=1e-6)
    assert float(other["rms"].mean()) > 0.2
    assert set(m.diversity(images(3, 64))) == {"rms", "4-g-r-ssim"}, "64 pixels have no five scales"


def test_infinite_values_do_not_count() -> None:
    assert m.mean_and_std(torch.tensor([1.0, 3.0, math.inf])) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}


BAD = [
    (torch.zeros(2, 1, 32), r"images: got shape \[2, 1, 32\], allowed is \[N, 1, H, W\]"),
    (torch.zeros(2, 3, 32, 32), r"images: got shape \[2, 3, 32, 32\]"),
    (torch.full((1, 1, 128, 128), math.nan), "images: got NaN or infinity"),
    (torch.full((1, 1, 128, 128), 1.5), "images: got values from 1.5 to 1.5, allowed is -1 to 1"),
    (torch.zeros(0, 1, 128, 128), "images: got 0 images, allowed is 1 or more"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_bad_images_are_named(bad: Tensor, said: str) -> None:
    for metric in (m.laplacian_variance, m.fft_sharpness, m.radial_spectrum):
        with pytest.raises(ValueError, match=said):
            metric(bad)
    with pytest.raises(ValueError, match=said):
        m.ssim(bad, images(1))


def test_bad_pairs_are_named() -> None:
    with pytest.raises(ValueError, match=r"images, originals: got shapes \[2, 1, 128, 128\] and \[3, 1, 128, 128\]"):
        m.ssim(images(2), images(3))
    with pytest.raises(ValueError, match="originals: image 0 has one value"):
        m.nrmse(images(1), torch.zeros(1, 1, 128, 128))
    with pytest.raises(ValueError, match="got 64 x 64 pixels, allowed is 112 or more a side"):
        m.ms_ssim(images(1, 64), images(1, 64))
