"""What a frame allows, and that slices show it: pixels of one physical size, whatever their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbldm_fast.data.frame import FRAME, Frame
from sbldm_fast.data.readers import load_picture
from sbldm_fast.data.volumes import Unusable, axial_slices, axial_slices_with, load_nifti, whole_volume

from .test_volumes import head, save, voxels


def test_the_frame_of_the_bundled_weights_is_220_mm_by_128_pixels() -> None:
    assert FRAME.size == (128, 128)
    assert FRAME.spacing == 1.71875
    assert FRAME.field == (220.0, 220.0)
    assert FRAME.enough == 0.10
    assert Frame.of(None, None) == Frame.of("128", None) == Frame.of("128x128", 1.71875) == FRAME


def test_a_size_is_width_by_height() -> None:
    assert Frame.of("160x224", 1.0) == Frame(224, 160, 1.0)
    assert Frame.of("160x224", 1.0).field == (224.0, 160.0)
    assert Frame.of("160x224", None).spacing == 220 / 160, "220 mm lie along the smaller side"
    # 48.4 cm^2 of head, 10 % of 220 mm squared, are a larger part of a smaller field
    assert Frame.of("160x224", 1.0).enough == pytest.approx(4840 / (160 * 224))


@pytest.mark.parametrize(
    ("size", "spacing", "message"),
    [
        ("160by224", None, "size: got '160by224', allowed is WIDTHxHEIGHT in pixels, such as 160x224, or one side"),
        ("160x", 1.0, "size: got '160x'"),
        ("-16x16", 10.0, "size: got '-16x16'"),
        ("٣٢", None, "size: got"),
        ("8x224", 1.0, "size: got 8 x 224 pixels, allowed are 16 to 1024 a side"),
        ("160x0", None, "size: got 160 x 0 pixels, allowed are 16 to 1024 a side"),
        ("0", None, "size: got 0 x 0 pixels"),
        ("160x2000", 1.0, "size: got 160 x 2000 pixels, allowed are 16 to 1024 a side"),
        (
            "160x224",
            0.5,
            "spacing: got 0.5 mm a pixel, which shows 80 x 112 mm; allowed is 100 to 500 mm a side, 0.625 to 2.23 mm"
            " of this size",
        ),
        ("160x224", 3.0, "which shows 480 x 672 mm"),
        ("16x1000", 1.0, "none of this size"),
        (None, 0.0, "spacing: got 0 mm a pixel"),
        (None, float("nan"), "spacing: got nan mm a pixel"),
        (None, float("inf"), "spacing: got inf mm a pixel"),
    ],
)
def test_what_is_no_frame_is_refused(size: str | None, spacing: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frame.of(size, spacing)


def extent(image: np.ndarray) -> tuple[float, float]:
    """Pixels of the head along rows and columns."""
    inside = image > -0.8
    return float(inside.any(1).sum()), float(inside.any(0).sum())


@pytest.mark.parametrize(
    "frame", [FRAME, Frame(224, 160, 1.0), Frame(160, 224, 1.0), Frame(112, 96, 2.0), Frame(24, 16, 10.0)]
)
def test_a_head_measures_in_mm_what_it_measures(tmp_path: Path, frame: Frame) -> None:
    """A disc of 150 mm, brighter by a spot in its right half, 40 mm beside the middle."""
    slices, positions = axial_slices(load_nifti(save(head(), tmp_path / "a.nii")), frame)
    assert slices.shape == (12, *frame.size)
    assert slices.min() == -1
    np.testing.assert_allclose(np.diff(positions), 5)
    for pixels in extent(slices[6]):
        assert pixels * frame.spacing == pytest.approx(150, abs=max(4.0, 2 * frame.spacing))
    row, column = np.argwhere(slices[6] > 0.9).mean(axis=0)
    middle = (frame.height - 1) / 2, (frame.width - 1) / 2
    assert (row - middle[0]) * frame.spacing == pytest.approx(0, abs=0.3 * max(4.0, frame.spacing))
    assert (column - middle[1]) * frame.spacing == pytest.approx(40, abs=0.3 * max(4.0, frame.spacing))


def test_labels_are_cut_as_the_scan_is(tmp_path: Path) -> None:
    volume, frame = load_nifti(save(head(), tmp_path / "a.nii")), Frame(224, 160, 1.0)
    spot = (np.asarray(head().dataobj) > 500).astype(np.float32)
    slices, _, maps = axial_slices_with(volume, spot, frame)
    assert maps is not None
    assert maps.shape == slices.shape
    assert (maps.min(), maps.max()) == (0, 1)
    assert maps[3].sum() == pytest.approx(np.pi * 15**2, rel=0.05), "a disc of 15 mm, in pixels of 1 mm"
    np.testing.assert_allclose(np.argwhere(maps[3] > 0.5).mean(0), np.argwhere(slices[3] > 0.9).mean(0), atol=0.5)


def with_thin(at: int, brightness: float) -> np.ndarray:
    """A head, of one slice of which but a spot of 4 cm, or nothing, is there."""
    array = np.asarray(head().dataobj).copy()
    array[..., at] = 0
    array[35:55, 45:65, at] = brightness
    return array


def test_a_volume_is_whole_between_its_ends(tmp_path: Path) -> None:
    thin = load_nifti(save(voxels(with_thin(5, 200.0)), tmp_path / "thin.nii"))
    some, heights = axial_slices(thin, FRAME)
    whole, every = whole_volume(thin, FRAME)
    assert (len(some), len(whole)) == (11, 12)
    np.testing.assert_allclose(np.diff(every), 5)
    np.testing.assert_array_equal(np.delete(whole, 5, axis=0), some)
    np.testing.assert_array_equal(np.delete(every, 5), heights)
    ends = load_nifti(save(voxels(with_thin(0, 200.0)), tmp_path / "ends.nii"))
    assert len(whole_volume(ends, FRAME)[0]) == 11, "an end that holds too little is not of the head"
    empty = load_nifti(save(voxels(with_thin(5, 0.0)), tmp_path / "empty.nii"))
    with pytest.raises(Unusable, match="a gap: 1 of 12 slices between the lowest and the highest are empty"):
        whole_volume(empty, FRAME)


@pytest.mark.parametrize(("width", "height"), [(60, 30), (30, 60), (48, 48)])
def test_a_picture_lies_whole_in_the_middle(tmp_path: Path, width: int, height: int) -> None:
    grey = np.full((height, width), 200, np.uint8)
    grey[:, : width // 2] = 100
    grey[0, 0] = 0
    Image.fromarray(grey).save(tmp_path / "a.png")
    got = load_picture(tmp_path / "a.png", (48, 32))
    assert got.shape == (48, 32)
    scale = min(32 / width, 48 / height)
    for axis, side, sides in ((1, height, 48), (0, width, 32)):
        inside = np.flatnonzero((got > -0.5).any(axis))
        assert abs(len(inside) - side * scale) <= 2
        assert abs(inside.mean() - (sides - 1) / 2) <= 1
