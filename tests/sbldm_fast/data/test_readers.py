"""Files that are broken or lie are named with the reason."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sbldm_fast.data.volumes import Unusable, axial_slices, load_nifti

from .test_volumes import head, patched, save, voxels


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
