"""Scans to slices: the right way up, not mirrored, square; broken files named; subjects kept apart."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.prepare import assign_splits
from sbldm_fast.data.sources import expand
from sbldm_fast.data.synthetic import CONTRASTS, synthetic_brain
from sbldm_fast.data.volumes import SIZE, Unusable, axial_slices, load_nifti


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


def patched(path: Path, at: int, content: bytes) -> None:
    """Bytes in the header that nibabel would not write."""
    save(head(), path)
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def voxels(array: np.ndarray, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    return nib.Nifti1Image(array, head().affine if affine is None else affine)


def changed(*values: float) -> nib.Nifti1Image:
    array = np.asarray(head().dataobj).copy()
    array[3, 3, : len(values)] = values
    return voxels(array)


def two_orientations() -> nib.Nifti1Image:
    image = head()
    image.set_qform(image.affine @ np.diag([-1, 1, 1, 1]), code=1)
    return image


def lying_much(path: Path) -> None:
    """A header that promises 21 TB in a small compressed file."""
    save(head(), path)
    whole = bytearray(gzip.decompress(path.read_bytes()))
    for at in (42, 44, 46):
        whole[at : at + 2] = (17_500).to_bytes(2, "little")
    path.write_bytes(gzip.compress(whole))


def cut(path: Path) -> None:
    save(head(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("scan.nii", b"0" * 5000)


def analyze(path: Path) -> None:
    nib.save(nib.AnalyzeImage(np.asarray(head().dataobj), np.eye(4)), path)


def half_a_pair(path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.asarray(head().dataobj), head().affine), path)
    path.with_suffix(".img").unlink()


def unreadable(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # opens, and reading address 0 is an input/output error


def wrong_sum(path: Path) -> None:
    """Other voxels under the checksum of the old ones, as a disk leaves them."""
    save(changed(300), path)
    changed_bytes = path.read_bytes()
    save(head(), path)
    path.write_bytes(changed_bytes[:-8] + path.read_bytes()[-8:])


def without_sum(path: Path) -> None:
    save(head(), path)
    path.write_bytes(path.read_bytes()[:-8])


def endless(path: Path) -> None:
    save(head(), path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**26 + 2**21), 1))


def tiny_oblique_voxels() -> nib.Nifti1Image:
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    return voxels(
        np.random.default_rng(0).normal(0, 1, (60, 64, 20)).astype(np.float32), turn @ np.diag([3, 0.03, 4, 1.0])
    )


def far_away() -> nib.Nifti1Image:
    affine = head().affine.copy()
    affine[2, 3] = 2e4
    return voxels(np.asarray(head().dataobj), affine)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.nii", lambda p: None, "no such file"),
    "a link that leads nowhere": ("a.nii", lambda p: p.symlink_to("gone"), "or a link that leads nowhere"),
    "a link to itself": ("a.nii", lambda p: p.symlink_to(p.name), "or a link that leads nowhere"),
    "unreadable": ("a.nii", unreadable, "not a readable NIfTI file"),
    "truncated gz": ("a.nii.gz", cut, "not a readable NIfTI file"),
    "gz of another checksum": (
        "a.nii.gz",
        wrong_sum,
        "not a readable NIfTI file: damaged or cut off, it does not match its checksum",
    ),
    "gz without its checksum": ("a.nii.gz", without_sum, "not a readable NIfTI file: damaged or cut off"),
    "gz that goes on": (
        "a.nii.gz",
        endless,
        "the compressed file goes on long after the 475200 bytes of voxels that the header promises",
    ),
    "a straight grid of fifty times the voxels": (
        "a.nii",
        lambda p: save(tiny_oblique_voxels(), p),
        "so oblique or sheared that its",
    ),
    "20 m away": ("a.nii", lambda p: save(far_away(), p), "voxels lie further from the origin than 10 m"),
    "a type that is none": ("a.nii", lambda p: patched(p, 70, b"er"), r"not a readable NIfTI file \(HeaderDataError\)"),
    "a pipe": ("a.nii", os.mkfifo, "no such file"),
    "truncated": ("a.nii", cut, r"the header promises 475200 bytes of voxels, the file has 2\d+"),
    "not a NIfTI": ("a.nii.gz", lambda p: p.write_bytes(gzip.compress(b"hello")), "not a readable NIfTI file"),
    "empty": ("a.nii", lambda p: p.write_bytes(b""), "not a readable NIfTI file"),
    "a zip": ("a.nii.gz", zipped, "not a readable NIfTI file"),
    "half a pair": ("a.hdr", half_a_pair, "not a readable NIfTI file"),
    "Analyze": ("a.hdr", analyze, r"a .*Analyze.*, which does not say its orientation; allowed is NIfTI"),
    "a header that lies": (
        "a.nii",
        lambda p: patched(p, 42, (2000).to_bytes(2, "little")),
        r"the header promises 10560000 bytes of voxels, the file has \d+",
    ),
    "a header that lies, compressed": ("a.nii.gz", lying_much, r"the header promises 21437500000000 bytes of voxels"),
    "NaN": ("a.nii", lambda p: save(changed(np.nan), p), "1 voxels are NaN or infinite"),
    "Inf": ("a.nii", lambda p: save(changed(np.inf, -np.inf), p), "2 voxels are NaN or infinite"),
    "constant": (
        "a.nii",
        lambda p: save(voxels(np.ones((90, 110, 12), np.float32)), p),
        "every voxel has the same value",
    ),
    "2-D": (
        "a.nii",
        lambda p: save(voxels(np.eye(64, dtype=np.float32)), p),
        r"shape \(64, 64\): one 3-D volume is needed",
    ),
    "4-D": (
        "a.nii",
        lambda p: save(voxels(np.ones((9, 9, 9, 2), np.float32)), p),
        r"shape \(9, 9, 9, 2\).*pick one .* with --volume",
    ),
    "one sagittal slice": (
        "a.nii",
        lambda p: save(voxels(np.asarray(head().dataobj)[44:45]), p),
        "axial slices would have 1 x 110 pixels",
    ),
    "thick sagittal slices": (
        "a.nii",
        lambda p: save(head((24, 110, 90), (7.0, 2.0, 2.0)), p),
        "24 x 110 pixels of 7.0 x 2.0 mm",
    ),
    "label map": (
        "a.nii",
        lambda p: save(voxels((np.asarray(head().dataobj) > 100).astype(np.uint8)), p),
        "a label map, not a scan",
    ),
    "RGB": (
        "a.nii",
        lambda p: save(voxels(np.zeros((64, 64, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])), p),
        "voxels are .*'R'",
    ),
    "complex": (
        "a.nii",
        lambda p: save(voxels(np.ones((64, 64, 8), np.complex64)), p),
        "voxels are complex64, allowed are whole",
    ),
    "no orientation": ("a.nii", lambda p: patched(p, 252, bytes(4)), "qform_code and sform_code are 0"),
    "two orientations": ("a.nii", lambda p: save(two_orientations(), p), "two orientations: sform RAS, qform LAS"),
    "singular affine": ("a.nii", lambda p: patched(p, 252, bytes([0, 0, 1, 0, *[0] * 40])), "the affine is singular"),
    "nothing": (
        "a.nii",
        lambda p: patched(p, 46, bytes(2)),
        r"shape \(90, 110, 0\): nothing in it|not a readable NIfTI",
    ),
    "a mouse": (
        "a.nii",
        lambda p: save(head(zooms=(0.2, 0.2, 0.5), radius=7.5), p),
        "measures 15 mm: no head, or wrong voxel sizes",
    ),
}


def broken(kind: str, folder: Path) -> Path:
    name, make, _ = BROKEN[kind]
    folder.mkdir(parents=True, exist_ok=True)
    make(folder / name)
    return folder / name


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named_with_its_reason(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=BROKEN[kind][2]):
        axial_slices(load_nifti(broken(kind, tmp_path)))


def test_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    array = np.asarray(head().dataobj)
    path = save(voxels(np.stack([array / 2, array], 3)), tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(load_nifti(path, 1).array, np.asarray(head().dataobj))
    with pytest.raises(Unusable, match="volume 2 asked for, the file has 2"):
        load_nifti(path, 2)


def test_broken_files_are_skipped_and_counted_or_strictly_refused(tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / "sub-01_T1w.nii.gz")
    save(changed(np.nan), tmp_path / "in" / "sub-02_T1w.nii.gz")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert manifest["skipped"] == [{"source": "in/sub-02_T1w.nii.gz", "reason": "1 voxels are NaN or infinite"}]
    assert {row["source"] for row in manifest["slices"]} == {"in/sub-01_T1w.nii.gz"}
    with pytest.raises(ValueError, match=r"in/sub-02_T1w\.nii\.gz: 1 voxels are NaN"):
        prepare([str(tmp_path / "in")], tmp_path / "strict", strict=True, progress=False)
    assert not (tmp_path / "strict").exists()


def test_prepared_folder(tmp_path: Path) -> None:
    for subject, modality in itertools.product(range(1, 8), ("T1w", "FLAIR")):
        save(head(person=subject), tmp_path / "in" / f"sub-{subject:02d}_{modality}.nii.gz")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False, every=3)
    array = np.load(tmp_path / "out" / "slices.npy")
    assert (array.shape, array.dtype) == ((7 * 2 * 4, SIZE, SIZE), np.float16)
    assert array.min() >= -1
    assert array.max() <= 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    for stored, row in zip(array, manifest["slices"], strict=True):
        assert row["sha256"] == hashlib.sha256(stored.tobytes()).hexdigest()
    assert {row["modality"] for row in manifest["slices"]} == {"T1", "FLAIR"}
    by_subject: dict[str, set[str]] = {}
    for row in manifest["slices"]:
        by_subject.setdefault(row["subject"], set()).add(row["split"])
    assert len(by_subject) == 7
    assert all(len(splits) == 1 for splits in by_subject.values())
    train = Slices(tmp_path / "out")
    assert len(train) == 5 * 2 * 4
    batch = train[torch.tensor([3, 0])]
    assert (batch.shape, batch.dtype) == ((2, 1, SIZE, SIZE), torch.float32)
    first = manifest["slices"].index(train.rows[3])
    np.testing.assert_array_equal(batch[0, 0], array[first].astype(np.float32))
    assert train.array.untyped_storage().nbytes() == array.nbytes, "one map of the file, no copy of a split"
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (
        3 * SIZE,
        2 * SIZE + 14,
    ), "six tiles: every tenth of 56 slices"
    assert str(tmp_path) not in json.dumps(manifest)


def test_processes_change_nothing(tmp_path: Path) -> None:
    for i in range(3):
        save(head(person=i), tmp_path / "in" / f"sub-{i}_T1w.nii.gz")
    broken("NaN", tmp_path / "in")
    alone = prepare([str(tmp_path / "in"), "synthetic:1"], tmp_path / "a", every=5, progress=False)
    assert prepare([str(tmp_path / "in"), "synthetic:1"], tmp_path / "b", every=5, workers=2, progress=False) == alone
    assert (tmp_path / "a" / "slices.npy").read_bytes() == (tmp_path / "b" / "slices.npy").read_bytes()


def test_reading_ends_at_once_with_who_stops_it(tmp_path: Path) -> None:
    """At the first broken file, and when the command is killed: its processes hold its standard error as long as they
    live."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "sbldm_fast", "prepare", "a.png", "synthetic:5000", "-o", "out", "--workers", "2"]
    done = subprocess.run(
        [*command, "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert "sbldm-fast: a.png: not a readable picture" in done.stderr
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while not re.search(rb" [1-9]\d*/5001", said):
            said += process.stderr.read(20)
        process.kill()
        process.communicate(timeout=300)


def test_links_are_followed_once_and_archives_are_named(tmp_path: Path) -> None:
    save(head(), tmp_path / "elsewhere" / "sub-1_T1w.nii.gz")
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "below" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "more.zip").write_bytes(b"PK")
    (tmp_path / "in" / "prepared").mkdir()
    for name in ("slices.npy", "manifest.json", "contact_sheet.png"):
        (tmp_path / "in" / "prepared" / name).write_bytes(b"what an earlier run made is no source")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert {row["source"] for row in manifest["slices"]} == {"in/linked/sub-1_T1w.nii.gz"}
    assert manifest["skipped"] == [{"source": "in/more.zip", "reason": "an archive; unpack it first"}]


def test_a_person_named_twice_is_one_subject(tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / "sub-1_T1w.nii.gz")
    save(voxels(np.asarray(head().dataobj) + 1, head().affine), tmp_path / "in" / "Sub-1_T2w.nii.gz")
    save(head((100, 100, 9)), tmp_path / "in" / "a7_T1w.nii.gz")
    save(head((100, 100, 9)), tmp_path / "in" / "b8_T1w.nii.gz")  # the same scan under another name
    arguments: dict[str, Any] = {"every": 4, "progress": False}
    manifest = prepare([str(tmp_path / "in"), *map(str, (tmp_path / "in").iterdir())], tmp_path / "out", **arguments)
    assert {row["subject"] for row in manifest["slices"]} == {"in/Sub-1", "in/a7"}
    assert len(manifest["slices"]) == 2 * 3 + 2 * 3, "each file once"
    named = prepare([str(tmp_path / "in")], tmp_path / "named", subject=r"/(.)", **arguments)
    assert {row["subject"] for row in named["slices"]} == {"S", "a"}
    for pattern, message in (
        ("(x)", "subject: got '[(]x[)]', which finds no group in in/"),
        ("(x)|b", "subject: got '[(]x[)][|]b', which finds no group in in/"),
        ("x", "subject: got 'x', allowed is a regular expression with a group"),
        ("(", "subject: got '[(]', which is no regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([str(tmp_path / "in")], tmp_path / "named", subject=pattern, **arguments)
    with pytest.raises(ValueError, match=r"subject: got '[(]', which is no regular expression"):
        prepare(["synthetic:1"], tmp_path / "named", subject="(", **arguments)


def test_a_picture_that_lies_on_its_head(tmp_path: Path) -> None:
    grey = np.zeros((64, 64), np.uint8)
    grey[50:60] = 200
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    (tmp_path / "in").mkdir()
    Image.fromarray(grey).save(tmp_path / "in" / "a.jpg", exif=exif)
    prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert np.argwhere(np.load(tmp_path / "out" / "slices.npy")[0] > 0)[:, 0].mean() < 30


def test_splits() -> None:
    where = assign_splits([f"s{i}" for i in range(100)], 42)
    assert [list(where.values()).count(s) for s in ("train", "val", "test")] == [70, 15, 15]
    assert where == assign_splits([f"s{i}" for i in reversed(range(100))], 42)
    assert where != assign_splits([f"s{i}" for i in range(100)], 43)
    assert sorted(assign_splits(["a", "b", "c"], 0).values()) == ["test", "train", "val"]
    assert set(assign_splits(["a", "b"], 0).values()) == {"train"}


def test_slice_split_leaks_as_asked(tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / "a.nii")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", split="slice", progress=False)
    assert {row["split"] for row in manifest["slices"]} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("name", "subject", "modality"),
    [
        ("patient01_study2_FLAIR.nii", "in/patient01", "FLAIR"),
        ("BraTS20_Training_007_t1ce.nii", "in/BraTS20_Training_007", "T1CE"),
        ("sub-A3/anat/sub-A3_T2w.nii", "in/sub-A3", "T2"),
        ("scan.nii", "in/scan", "unknown"),
        ("case1/T1.nii.gz", "in/case1", "T1"),
        ("case1/FLAIR.nii.gz", "in/case1", "FLAIR"),
        ("IXI002-Guys-0828-T1.nii.gz", "in/IXI002", "T1"),
        ("IXI-T1/IXI002-Guys-0828-T1.nii.gz", "in/IXI002", "T1"),
        ("002_S_0295/MPRAGE/2006-04-18/I13721/scan.nii", "in/002_S_0295", "unknown"),
        ("OAS1_0001_MR1/OAS1_0001_MR1_mpr-2.nii", "in/OAS1_0001", "unknown"),
        ("UPENN-GBM-00001_21/UPENN-GBM-00001_21_T2.nii", "in/UPENN-GBM-00001", "T2"),
        ("P01_T1_pre.nii", "in/P01", "T1"),
        ("train/case3/run1/T2.nii", "in/case3", "T2"),
        ("PD/case3/scan.nii", "in/case3", "unknown"),
        ("BraTS-GLI-00005-000/BraTS-GLI-00005-000-t2w.nii.gz", "in/BraTS-GLI-00005", "T2"),
        ("BraTS-GLI-00005-001/BraTS-GLI-00005-001-t2f.nii.gz", "in/BraTS-GLI-00005", "FLAIR"),
        ("BraTS-GLI-00005-001/BraTS-GLI-00005-001-t1n.nii.gz", "in/BraTS-GLI-00005", "T1"),
        ("BraTS2021_00621/BraTS2021_00621_t1ce.nii.gz", "in/BraTS2021_00621", "T1CE"),
        ("HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_flair.nii.gz", "in/Brats18_CBICA_AAB_1", "FLAIR"),
        ("HGG/Brats18_2013_10_1/Brats18_2013_10_1_t1.nii.gz", "in/Brats18_2013_10_1", "T1"),
        ("sub-04/ses-01/anat/sub-04_ses-01_T1w.nii.gz", "in/sub-04", "T1"),
        ("Zoë-头部/T1.nii.gz", "in/Zoë-头部", "T1"),
    ],
)
def test_names_tell_subject_and_modality(name: str, subject: str, modality: str, tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / name)
    row = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)["slices"][0]
    assert (row["subject"], row["modality"]) == (subject, modality)


@pytest.mark.parametrize(("name", "subject"), [("vol1_slice01", "in/vol1"), ("vol1_slice02", "in/vol1"), ("007", "in")])
def test_slices_of_one_volume_are_one_subject(name: str, subject: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(tmp_path / "in" / f"{name}.png")
    assert prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)["slices"][0]["subject"] == subject


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "in" / "case1").mkdir(parents=True)
    grey = np.zeros((60, 40), np.uint8)
    grey[10:50, 15:35] = 200
    Image.fromarray(grey).save(tmp_path / "in" / "case1" / "001.png")
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "in" / "case1" / "002.png")
    (tmp_path / "in" / "case1" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "in" / "case1" / "cut.png").write_bytes((tmp_path / "in" / "case1" / "001.png").read_bytes()[:60])
    Image.new("L", (9, 9)).save(tmp_path / "in" / "case1" / "flat.png")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "in" / "case1" / "huge.png")
    with_nan = np.linspace(0, 1, 2400, dtype=np.float32).reshape(60, 40)
    with_nan[3, 3] = np.nan
    Image.fromarray(with_nan).save(tmp_path / "in" / "case1" / "nan.png", "TIFF")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert [row["subject"] for row in manifest["slices"]] == ["in/case1", "in/case1"]
    reasons = {s["source"].rpartition("/")[2]: s["reason"] for s in manifest["skipped"]}
    assert reasons["flat.png"] == "every pixel has the same value"
    assert all(
        reasons[name].startswith("not a readable picture") for name in ("bad.png", "cut.png", "huge.png", "nan.png")
    )
    assert not any("/" in reason for reason in reasons.values()), "nothing of what Pillow says of a file"
    array = np.load(tmp_path / "out" / "slices.npy").astype(float)
    np.testing.assert_allclose(array[0], array[1], atol=0.02)
    inside = array[0] > 0
    assert np.ptp(np.flatnonzero(inside.any(1))) / np.ptp(np.flatnonzero(inside.any(0))) == pytest.approx(
        40 / 20, rel=0.06
    )


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nothing"], "nothing does not exist"),
        (["synthetic:0"], "synthetic:0: allowed is synthetic or synthetic:COUNT"),
        (["synthetic:x"], "synthetic:x: allowed"),
        (["synthetic:" + "9" * 5000], "9: allowed is synthetic or synthetic:COUNT with COUNT of 1 to 999999"),
        ([""], "'' does not exist"),
    ],
)
def test_bad_sources_are_named(sources: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(sources, tmp_path / "out", progress=False)


def test_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no NIfTI \(.nii, .nii.gz, .hdr\), DICOM, .png or .jpg file"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", progress=False)
    broken("constant", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no usable slice in .*\(empty/a.nii: every voxel has the same value\)"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", progress=False)
    for arguments, message in (
        ({"split": "volume"}, "split: got 'volume'"),
        ({"every": 0}, "every: got 0"),
        ({"workers": 0}, "workers: got 0"),
        ({"volume": -1}, "volume: got -1, allowed is 0 or more"),
        ({"seed": -1}, "seed: got -1, allowed is 0 to 4294967295"),
        ({"seed": 2**32}, "seed: got 4294967296, allowed"),
    ):
        bad: dict[str, Any] = arguments
        with pytest.raises(ValueError, match=message):
            prepare(["synthetic:1"], tmp_path / "out", progress=False, **bad)


def test_what_would_be_waited_for_is_passed_over(tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / "sub-1_T1w.nii.gz")
    for name in ("pipe.nii", "pipe.png", "pipe.dcm", "pipe"):
        os.mkfifo(tmp_path / "in" / name)
    (tmp_path / "in" / "gone.nii").symlink_to("nowhere")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", every=4, progress=False)
    assert [s["source"] for s in manifest["skipped"]] == ["in/gone.nii"]
    assert {row["source"] for row in manifest["slices"]} == {"in/sub-1_T1w.nii.gz"}
    with pytest.raises(ValueError, match=r"pipe.nii is a pipe, a socket or a device; allowed are files and folders"):
        prepare([str(tmp_path / "in" / "pipe.nii")], tmp_path / "out", progress=False)


def test_only_a_folder_that_prepare_wrote_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(["synthetic:1"], out, every=20, progress=False)
    prepare(["synthetic:1"], out, every=10, progress=False)
    with pytest.raises(
        ValueError, match=r"out holds the source contact_sheet.png, which would be lost; allowed is another folder"
    ):
        prepare([str(out / "contact_sheet.png")], out, progress=False)
    (out / "manifest.json").write_text('{"name": "of an app"}')
    with pytest.raises(ValueError, match=r"out holds contact_sheet.png, which would be lost"):
        prepare(["synthetic:1"], out, every=20, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "slices.npy").write_bytes(b"a user's own")
    with pytest.raises(ValueError, match=r"mine holds slices.npy, which would be lost"):
        prepare(["synthetic:1"], tmp_path / "mine", every=20, progress=False)


def test_readers_keep_silent_and_speak_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """nibabel logs what it mends in a header."""
    logger = logging.getLogger("nibabel.global")
    patched(tmp_path / "in" / "a.nii", 80, np.float32(-2).tobytes())
    prepare([str(tmp_path / "in")], tmp_path / "out", every=6, progress=False)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
    nib.load(tmp_path / "in" / "a.nii")
    assert "pixdim" in caplog.text
    assert logger.getEffectiveLevel() <= logging.WARNING


def test_synthetic_population_is_what_it_says() -> None:
    a, modality, covariates = synthetic_brain(3)
    again, *_ = synthetic_brain(3)
    np.testing.assert_array_equal(a.array, again.array)
    assert modality in CONTRASTS
    assert 20 <= float(covariates["age"]) <= 85
    assert covariates["sex"] in ("F", "M")
    assert not np.array_equal(a.array, synthetic_brain(4)[0].array)
    ages, volumes = np.array(
        [[c["age"], c["ventricle_volume"]] for c in (synthetic_brain(i)[2] for i in range(12))], dtype=float
    ).T
    assert np.corrcoef(ages, volumes)[0, 1] > 0.6
    assert 10 < volumes.min() < volumes.max() < 40
    slices, positions = axial_slices(a)
    assert 50 < len(slices) < 90
    assert np.all(np.diff(positions) == 2)


def test_mni152_goes_through(tmp_path: Path) -> None:
    manifest = prepare(["mni152"], tmp_path / "out", every=8, progress=False)
    assert {row["source"] for row in manifest["slices"]} == {"mni152"}
    assert len(manifest["slices"]) > 10


def test_damaged_prepared_folder_is_named(tmp_path: Path) -> None:
    prepare(["synthetic:1"], tmp_path / "out", every=20, progress=False)
    with pytest.raises(ValueError, match="the val split is empty"):
        Slices(tmp_path / "out", "val")
    with pytest.raises(ValueError, match="split: got 'dev'"):
        Slices(tmp_path / "out", "dev")
    np.save(tmp_path / "out" / "slices.npy", np.zeros((1, SIZE, SIZE), np.float16))
    with pytest.raises(ValueError, match="the manifest lists"):
        Slices(tmp_path / "out")
    (tmp_path / "out" / "slices.npy").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"slices.npy is not readable"):
        Slices(tmp_path / "out")
    with pytest.raises(ValueError, match=r"manifest.json does not exist"):
        Slices(tmp_path)
    manifest = tmp_path / "out" / "manifest.json"
    np.save(tmp_path / "out" / "slices.npy", np.zeros((1, SIZE, SIZE), np.float16))
    for content, message in (
        ({"format": 1, "slices": [{}]}, "has format 1, allowed is 2; run prepare again"),
        ({"format": 2, "slices": []}, "lists no slices"),
        ({"format": 2, "slices": [{"split": "train"}]}, "lists no slices"),
        (
            {"format": 2, "slices": [{"split": "train", "subject": "a", "sha256": "b"}]},
            r"slice 0 is not the one .* \(its checksum differs\)",
        ),
        ([], "holds a JSON list"),
    ):
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Slices(tmp_path / "out")


def test_a_hostile_array_is_named(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "slices.npy"
    manifest = prepare(["synthetic:1"], out, every=20, progress=False)
    whole = path.read_bytes()

    def header(text: str) -> bytes:
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def npz() -> bytes:
        np.savez(tmp_path / "a.npz", np.zeros(3))
        return (tmp_path / "a.npz").read_bytes()

    for content in (
        npz(),
        header("(" * 5000),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 128, 128)}"),
        whole[:-9],
        whole[:40],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"slices.npy is not readable as a .npy file \(\w+\); run prepare again"):
            Slices(out)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"slices.npy does not exist, or is no file"):
        Slices(out)
    path.unlink()
    array = np.full((len(manifest["slices"]), SIZE, SIZE), np.nan, np.float16)
    np.save(path, array)
    for row in manifest["slices"]:
        row["sha256"] = hashlib.sha256(array[0].tobytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"slice 0 holds values that are not in -1 to 1"):
        Slices(out)
    (out / "manifest.json").write_text('{"format": 2, "slices": 5}')
    with pytest.raises(ValueError, match=r"manifest.json lists no slices"):
        Slices(out)


def test_real_scans(ms_scans: Path, tmp_path: Path) -> None:
    manifest = prepare([str(ms_scans)], tmp_path / "out", progress=False)
    array = np.load(tmp_path / "out" / "slices.npy").astype(np.float32)
    rows = manifest["slices"]
    assert len({row["source"] for row in rows}) == 17
    assert {row["subject"] for row in rows} == {f"ms/patient{i:02d}" for i in (1, 3, 4, 12)}
    assert manifest["skipped"] == [
        {"source": f"ms/patient{i:02d}_lesions_gt.nii.gz", "reason": "a label map, by its name"} for i in (1, 3, 4, 12)
    ]
    for source in {row["source"] for row in rows}:
        index = [i for i, row in enumerate(rows) if row["source"] == source]
        middle = array[index[len(index) // 2]] > -0.8
        height, width = (np.ptp(np.flatnonzero(middle.any(axis=a))) * 220 / SIZE for a in (1, 0))
        # a head is longer from front to back than it is wide, and of human size: square pixels, right way round
        assert 165 < height < 220, source
        assert 130 < width < 190, source
        assert height > width, source
        positions = [rows[i]["position_mm"] for i in index]
        assert positions == sorted(positions)
        # the skull narrows to the top: slices run upwards
        assert (array[index[-1]] > -0.8).sum() < middle.sum()
