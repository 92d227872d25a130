"""The first stage: its losses, its augmented views, and the latents that it leaves."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sbldm_fast.training import train_pipeline
from sbldm_fast.training.autoencoder import augment, encode, l1_with_edges, zoom

from .test_stages import SMALL, config, curve


def test_augmentation_keeps_air_dark_and_flips_half(device: torch.device) -> None:
    x = torch.full((64, 1, 32, 32), -1.0, device=device)
    x[:, :, 10:22, 18:26] = 1.0
    y = augment(x, torch.rand(64, 5, device=device))
    assert y.shape == x.shape
    assert y.min() >= -1.0001
    assert y.max() <= 1.0001
    assert (y[..., 0] < -0.9).all()
    right = (y[..., 16:] > 0).flatten(1).sum(1) > (y[..., :16] > 0).flatten(1).sum(1)
    assert 16 < int(right.sum()) < 48


def disc(n: int) -> Tensor:
    """Discs of 40 pixels in air, their border a pixel wide, `[n, 1, 96, 96]`."""
    y, x = torch.meshgrid(*[torch.arange(96) - 47.5] * 2, indexing="ij")
    return (2 * (20.5 - (x**2 + y**2).sqrt()).clamp(0, 1) - 1).expand(n, 1, 96, 96)


def area(images: Tensor) -> Tensor:
    return ((images.double() + 1) / 2).sum((1, 2, 3))


def test_what_a_view_shows_is_larger_by_the_factor_that_is_told() -> None:
    """As counted: pixels of a disc before and after."""
    draws = torch.rand(200, 5, generator=torch.Generator().manual_seed(1))
    grown = area(augment(disc(200), draws)) / area(disc(1))
    assert grown.min() < 0.93
    assert grown.max() > 1.07
    torch.testing.assert_close(grown, zoom(draws).double() ** -2, rtol=2e-3, atol=0)


def test_a_turn_is_one_of_pixels_whatever_the_sides() -> None:
    """A view of the middle is the middle of a view; of a square it is what it was, to the bit."""
    x = disc(20).clone()
    x[:, :, 40:44, 30:60] = 0.5
    draws = torch.rand(20, 5)
    draws[:, 3:] = 0.5  # shifts go with the side
    whole = augment(x, draws)
    torch.testing.assert_close(augment(x[:, :, :, 18:78], draws), whole[:, :, :, 18:78], rtol=0, atol=1e-4)
    torch.testing.assert_close(augment(x[:, :, 20:76], draws), whole[:, :, 20:76], rtol=0, atol=1e-4)
    within = 2 * draws - 1
    angle, flip = within[:, 0] * math.radians(10), torch.where(within[:, 2] < 0, -1.0, 1.0)
    cos, sin, no = angle.cos() * zoom(draws), angle.sin() * zoom(draws), torch.zeros(20)
    theta = torch.stack([cos * flip, -sin, no, sin * flip, cos, no], dim=1).view(20, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    assert torch.equal(whole, F.grid_sample(x + 1, grid, align_corners=False) - 1)


class Discs:
    """A split of 70 slices, a disc each."""

    index = torch.arange(70)

    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: Tensor) -> Tensor:
        return disc(len(index))


class Mirror(torch.nn.Module):
    """An autoencoder whose latents are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1))

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(mean=x)


def test_each_latent_comes_with_the_area_of_its_own_view() -> None:
    vae: Any = Mirror()
    data: Any = Discs()
    views, areas = encode(vae, data, 3, 5, progress=False)
    assert (len(views), areas.shape) == (210, (210,))
    assert torch.equal(views[:70], disc(70)), "the first view is the slice"
    assert areas[:70].eq(1).all()
    assert areas[70:].unique().numel() > 130
    torch.testing.assert_close(area(views) / area(disc(1)), areas.double(), rtol=2e-3, atol=0)


def test_l1_with_edges_by_hand() -> None:
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    y = x.clone()
    y[0, 0, 0, 0] += 1
    # one pixel of 64; at each scale its mean against the neighbour below and the one beside: 56, 12 and 2 differences
    by_hand = 1 / 64 + (2 * 1 / 56 + 2 * (1 / 4) / 12 + 2 * (1 / 16) / 2) / 3
    assert float(l1_with_edges(y, x)) == pytest.approx(by_hand, rel=1e-12)
    assert float(l1_with_edges(x - 0.25, x)) == pytest.approx(0.25, rel=1e-12), "a shift has no edges"


def test_edges_are_trained_on_and_validated_as_l1(told: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"vae": config(2), "unet": config(2), "progress": False, "views": 1}
    result = train_pipeline(SMALL, told, tmp_path, recon="l1_edges", **arguments)
    rows = [row for row in curve(tmp_path) if row["stage"] == "vae"]
    (trained,) = [row for row in rows if "loss" in row]
    assert trained["l1_edges"] > min(row["val"] for row in rows if "val" in row), "edges are added"
    assert result["val_l1"] == min(row["val"] for row in rows if "val" in row)


def test_latents_are_encoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"vae": config(2), "unet": config(2), "progress": False, "resume": True}
    train_pipeline(SMALL, data, tmp_path, views=2, **arguments)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("encoded again")

    monkeypatch.setattr("sbldm_fast.training.autoencoder.encode", refuse)
    train_pipeline(SMALL, data, tmp_path, views=2, **arguments)
    with pytest.raises(AssertionError, match="encoded again"):
        train_pipeline(SMALL, data, tmp_path, views=1, **arguments)


def test_bad_recon_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recon: got 'l3', allowed are mse, l1"):
        train_pipeline(SMALL, data, tmp_path, vae=config(1), unet=config(1), recon="l3", progress=False)
    shutil.rmtree(tmp_path)
