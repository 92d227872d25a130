"""Pictures that say whose they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sbldm_fast.images import NOTICE, save_grid, save_png, to_uint8


def test_labels_and_marks_are_drawn_on_their_tiles(tmp_path: Path) -> None:
    tiles = np.zeros((2, 128, 128), np.uint8)
    save_grid(tiles, tmp_path / "a.png", labels=["T1 train\nsub-01", ""], marks=["", "L"])
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image)
    first, second = sheet[:128, :128], sheet[:128, 128:]
    assert first[:30].any()
    assert not first[40:].any()
    assert second[55:75, :12].any(), "at the left, in the middle"
    assert not second[:40].any()
    assert not second[:, 20:].any()


def test_a_name_that_the_font_does_not_have_is_no_reason_to_end(tmp_path: Path) -> None:
    save_grid(np.zeros((1, 64, 64), np.uint8), tmp_path / "a.png", labels=["\u8133"])
    assert (tmp_path / "a.png").is_file()


def test_pictures_say_what_they_are(tmp_path: Path) -> None:
    images = torch.stack([torch.full((1, 8, 8), v) for v in (-2.0, -1.0, 0.0, 1.0, 3.0)])
    assert to_uint8(images)[:, 0, 0].tolist() == [0, 0, 128, 255, 255]
    save_png(to_uint8(images)[3], tmp_path / "one.png")
    save_grid(to_uint8(images), tmp_path / "grid.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.info["Description"] == NOTICE
        assert np.asarray(one).min() == 255
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.info["Description"] == NOTICE
        assert grid.size == (24, 16 + 14)
