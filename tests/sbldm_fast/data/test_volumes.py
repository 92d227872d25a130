"""One scan to axial slices: orientation, pixels, heights, memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sbldm_fast.data.frame import SIZE
from sbldm_fast.data.sources import expand
from sbldm_fast.data.volumes import axial_slices, load_nifti


def head(
    shape: tuple[int, int, int] = (90, 110, 12),
    zooms: tuple[float, float, float] = (2.0, 2.0, 5.0),
    radius: float = 75.0,
    person: int = 0,
) -> nib.Nifti1Image:
    """A round head of 150 mm in RAS, brighter at the front, with a bright spot in its right half."""
    x, y = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * z for n, z in zip(shape[:2], zooms[:2], strict=True)), indexing="ij"
    )
    disc = (x**2 + y**2 < radius**2) * (200.0 + y)
    disc[(x - radius * 8 / 15) ** 2 + y**2 < (radius / 5) ** 2] = 600
    volume = np.repeat(disc[..., None], shape[2], axis=2).astype(np.float32) + np.random.default_rng(person).normal(
        0, 0.5, shape
    )
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * z for n, z in zip(shape, zooms, strict=True)]
    return nib.Nifti1Image(volume.astype(np.float32), affine)


def save(image: nib.Nifti1Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def patched(path: Path, at: int, content: bytes) -> None:
    """Bytes in the header that nibabel would not write."""
    save(head(), path)
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def voxels(array: np.ndarray, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    return nib.Nifti1Image(array, head().affine if affine is None else affine)


def slices_of(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    return axial_slices(load_nifti(save(image, path)))[0]


def test_front_is_up_and_right_is_right(tmp_path: Path) -> None:
    middle = slices_of(head(), tmp_path / "a.nii.gz")[6]
    assert middle.shape == (SIZE, SIZE)
    row, column = np.argwhere(middle > 0.9).mean(axis=0)
    # 40 mm to the right at 220 / 128 mm a pixel
    assert abs(column - (63.5 + 40 * SIZE / 220)) < 1.5
    assert abs(row - 63.5) < 1.5
    assert middle[63 - 35, 63] > middle[63 + 35, 63], "the front, which is brighter, is up"


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_orientation_in_the_file_does_not_matter(axes: tuple[int, ...], flips: tuple[int, ...], tmp_path: Path) -> None:
    image = head()
    turned = image.as_reoriented(np.array(list(zip(axes, flips, strict=True)), dtype=float))
    assert nib.aff2axcodes(turned.affine) != ("R", "A", "S") or (axes == (0, 1, 2) and flips == (1, 1, 1))
    expected, got = slices_of(image, tmp_path / "a.nii"), slices_of(turned, tmp_path / "b.nii")
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("zooms", [(1.0, 2.0, 5.0), (2.0, 1.0, 3.0), (0.9, 0.9, 5.0)])
def test_pixels_are_square(zooms: tuple[float, float, float], tmp_path: Path) -> None:
    shape = (round(180 / zooms[0]), round(200 / zooms[1]), 6)
    middle = slices_of(head(shape, zooms), tmp_path / "a.nii.gz")[3] > -0.8
    height, width = (np.flatnonzero(middle.any(axis=a)) for a in (1, 0))
    expected = 150 * SIZE / 220
    assert abs(np.ptp(height) + 1 - expected) <= 2
    assert abs(np.ptp(width) + 1 - expected) <= 2


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    image = head()
    stored = nib.Nifti1Image((np.asarray(image.dataobj) * 4).round().astype(np.int16), image.affine)
    stored.header.set_slope_inter(0.25, 0)
    np.testing.assert_allclose(slices_of(stored, tmp_path / "b.nii"), slices_of(image, tmp_path / "a.nii"), atol=5e-3)


@pytest.mark.parametrize("degrees", [10, 30, 40])
def test_an_oblique_scan_is_straightened_when_it_is_far_off(degrees: float, tmp_path: Path) -> None:
    image = head((90, 110, 60), (2.0, 2.0, 2.0))
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    # the head itself is turned: its spot with it
    turned = nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)
    volume = load_nifti(save(turned, tmp_path / "a.nii"))
    assert (volume.straighten is not None) == (degrees > 20)
    assert volume.tilt == pytest.approx(0, abs=1e-6), "turned within its slices"
    slices, positions = axial_slices(volume)
    row, column = np.argwhere(slices[len(slices) // 2] > 0.9).mean(axis=0)
    away = 0 if degrees == 10 else angle  # planes that were acquired stay as they are
    assert abs(column - (63.5 + 40 * np.cos(away) * SIZE / 220)) < 2
    assert abs(row - (63.5 - 40 * np.sin(away) * SIZE / 220)) < 2
    assert np.allclose(np.diff(positions), 2)


def test_formats_of_one_scan_give_the_same_slices(tmp_path: Path) -> None:
    array = np.asarray(head().dataobj)
    expected = slices_of(head(), tmp_path / "a.nii")
    swapped = nib.Nifti1Image(array, head().affine, head().header.as_byteswapped(">"))
    metres = head()
    metres.set_sform(np.diag([1e-3, 1e-3, 1e-3, 1]) @ metres.affine, code=1)
    metres.header.set_xyzt_units("meter")
    same = {
        "gz": save(head(), tmp_path / "b.nii.gz"),
        "big-endian": save(swapped, tmp_path / "c.nii"),
        "pair": save(nib.Nifti1Pair(array, head().affine), tmp_path / "d.hdr"),
        "compressed pair": save(nib.Nifti1Pair(array, head().affine), tmp_path / "e.hdr.gz"),
        "NIfTI-2": save(nib.Nifti2Image(array, head().affine), tmp_path / "f.nii"),
        "4-D of one": save(voxels(array[..., None]), tmp_path / "g.nii"),
        "metres": save(metres, tmp_path / "h.nii"),
        "float64": save(voxels(array.astype(np.float64)), tmp_path / "i.nii"),
        "capitals": save(head(), tmp_path / "J.NII.GZ"),
    }
    for name, path in same.items():
        np.testing.assert_allclose(axial_slices(load_nifti(path))[0], expected, atol=1e-5, err_msg=name)
    assert swapped.header.endianness == ">"
    jobs = list(expand(str(tmp_path)))
    assert sorted(job.name.rpartition("/")[2] for job in jobs) == sorted(["a.nii", *(p.name for p in same.values())]), (
        "a pair is one scan"
    )


def test_one_axial_slice_is_a_scan(tmp_path: Path) -> None:
    whole = slices_of(head(), tmp_path / "a.nii")
    assert slices_of(voxels(np.asarray(head().dataobj)[..., 6:7]), tmp_path / "b.nii").shape == (1, *whole.shape[1:])


def test_slabs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = load_nifti(save(head(), tmp_path / "a.nii"))
    expected = axial_slices(volume)
    monkeypatch.setattr("sbldm_fast.data.volumes.CHUNK", 90 * 110 * 5)
    assert len(list(volume.slabs())) == 3
    for a, b in zip(expected, axial_slices(volume), strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A scan of 200 MB takes less than three times that: as it is stored, once more as slices, and a slab of 8 M
    voxels."""
    array = np.zeros((512, 512, 400), np.int16)
    array[60:450, 30:480] = np.random.default_rng(0).integers(100, 1000, (390, 450, 1))
    path = save(nib.Nifti1Image(array, np.diag([0.45, 0.45, 0.4, 1])), tmp_path / "a.nii.gz")
    count, used = peak_memory(path, None)
    assert count == 400
    assert used < 3 * array.nbytes / 2**20, f"{used} MiB for a scan of {array.nbytes / 2**20} MiB"
    series = np.repeat(np.asarray(head().dataobj)[..., None], 100, axis=3)
    image = nib.Nifti1Image((series * 4).astype(np.int16), head().affine)
    image.header.set_slope_inter(0.25, 0)
    _, used = peak_memory(save(image, tmp_path / "b.nii"), 3)
    assert used < series.nbytes / 2**20, f"{used} MiB for one of 100 volumes, {series.nbytes / 2**20} MiB in all"


def peak_memory(path: Path, volume: int | None) -> tuple[int, float]:
    """How many slices a scan has, and the MiB that reading it takes at its peak, in a process of its own."""
    code = """
import pathlib, re, sys, torch, nibabel, scipy.ndimage
from sbldm_fast.data.volumes import axial_slices, load_nifti
peak = lambda: int(re.search("VmHWM: *(.*) kB", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: a fork inherits its parent's
before = peak()
print(len(axial_slices(load_nifti(pathlib.Path(sys.argv[1]), VOLUME))[0]), (peak() - before) / 1024)
"""
    code = code.replace("VOLUME", repr(volume))
    count, used = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(count), float(used)


def test_a_speck_does_not_move_the_window(tmp_path: Path) -> None:
    image = head((150, 110, 12))
    array = np.roll(np.asarray(image.dataobj), 20, axis=0).copy()
    plain = slices_of(voxels(array, image.affine), tmp_path / "a.nii")
    array[[0, 0, 149], [0, 109, 50], 3] = 900
    specked = slices_of(voxels(array, image.affine), tmp_path / "b.nii")
    others = [i for i in range(12) if i != 3]
    np.testing.assert_allclose(specked[others], plain[others], atol=0.02)


def test_heights_of_a_tilted_scan_are_heights(tmp_path: Path) -> None:
    angle = np.radians(18)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = load_nifti(save(voxels(np.asarray(head().dataobj), turn @ head().affine), tmp_path / "a.nii"))
    assert volume.straighten is None
    assert volume.tilt == pytest.approx(18, abs=0.01)
    _, positions = axial_slices(volume)
    np.testing.assert_allclose(positions, (np.arange(12) - 5.5) * 5 * np.cos(angle), atol=1e-3)


def test_a_sheared_scan_is_straightened(tmp_path: Path) -> None:
    sheared = head((90, 110, 60), (2.0, 2.0, 2.0))
    shear = np.eye(4)
    shear[0, 2] = 0.5  # each slice 1 mm further to the right
    got, positions = axial_slices(
        load_nifti(save(voxels(np.asarray(sheared.dataobj), shear @ sheared.affine), tmp_path / "a.nii"))
    )
    columns = np.array([np.argwhere(image > 0.9).mean(axis=0)[1] for image in got]) * 220 / SIZE
    assert np.polyfit(positions[5:-5], columns[5:-5], 1)[0] == pytest.approx(0.5, abs=0.02)


def test_slices_without_a_head_are_dropped_and_positions_are_mm(tmp_path: Path) -> None:
    image = head()
    array = np.asarray(image.dataobj).copy()
    array[..., :4] = 0
    slices, positions = axial_slices(load_nifti(save(nib.Nifti1Image(array, image.affine), tmp_path / "a.nii")))
    assert len(slices) == 8
    np.testing.assert_allclose(positions, (np.arange(4, 12) - 5.5) * 5)
