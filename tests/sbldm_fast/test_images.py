"""Pictures that say whose they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sbldm_fast.images import save_grid


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
