"""Scans to slices: the right way up, not mirrored, square; broken files named; subjects kept apart."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.prepare import assign_splits
from sbldm_fast.data.synthetic import CONTRASTS, synthetic_brain
from sbldm_fast.data.volumes import SIZE, Unusable, axial_slices, load_nifti


def head(shape: tuple[int, int, int] = (90, 110, 12), zooms: tuple[float, float, float] = (2.0, 2.0, 5.0)) -> nib.Nifti1Image:
    """A round head of 150 mm in RAS, brighter at the front, with a bright spot in its right half."""
    x, y = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * z for n, z in zip(shape[:2], zooms[:2], strict=True)), indexing="ij")
    disc = (x**2 + y**2 < 75**2) * (200.0 + y)
    disc[(x - 40) ** 2 + y**2 < 15**2] = 600
    volume = np.repeat(disc[..., None], shape[2], axis=2).astype(np.float32) + np.random.default_rng(0).normal(0, 0.5, shape)
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


def test_slices_without_a_head_are_dropped_and_positions_are_mm(tmp_path: Path) -> None:
    image = head()
    array = np.asarray(image.dataobj).copy()
    array[..., :4] = 0
    slices, positions = axial_slices(load_nifti(save(nib.Nifti1Image(array, image.affine), tmp_path / "a.nii")))
    assert len(slices) == 8
    np.testing.assert_allclose(positions, (np.arange(4, 12) - 5.5) * 5)


def broken(kind: str, path: Path) -> Path:
    image = head()
    array = np.asarray(image.dataobj).copy()
    if kind == "truncated":
        save(image, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "not a NIfTI":
        path.write_bytes(gzip.compress(b"hello"))
    elif kind == "NaN":
        array[3, 3, 3] = np.nan
        save(nib.Nifti1Image(array, image.affine), path)
    elif kind == "constant":
        save(nib.Nifti1Image(np.ones_like(array), image.affine), path)
    elif kind == "4-D":
        save(nib.Nifti1Image(np.stack([array, array], 3), image.affine), path)
    elif kind == "label map":
        save(nib.Nifti1Image((array > 100).astype(np.uint8), image.affine), path)
    return path


BROKEN = {
    "missing": "no such file",
    "truncated": "not a readable NIfTI file",
    "not a NIfTI": "not a readable NIfTI file",
    "NaN": "1 voxels are NaN or infinite",
    "constant": "every voxel has the same value",
    "4-D": r"shape \(90, 110, 12, 2\): one 3-D volume is needed, pick one of a 4-D file with --volume",
    "label map": "a label map, not a scan",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named_with_its_reason(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=BROKEN[kind]):
        load_nifti(broken(kind, tmp_path / "scan.nii.gz"))


def test_one_volume_of_a_4d_file(tmp_path: Path) -> None:
    path = broken("4-D", tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(load_nifti(path, 1).array, np.asarray(head().dataobj))
    with pytest.raises(Unusable, match="volume 2 asked for, the file has 2"):
        load_nifti(path, 2)


def test_broken_files_are_skipped_and_counted_or_strictly_refused(tmp_path: Path) -> None:
    save(head(), tmp_path / "in" / "sub-01_T1w.nii.gz")
    broken("NaN", tmp_path / "in" / "sub-02_T1w.nii.gz")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert manifest["skipped"] == [{"source": "in/sub-02_T1w.nii.gz", "reason": "1 voxels are NaN or infinite"}]
    assert {row["source"] for row in manifest["slices"]} == {"in/sub-01_T1w.nii.gz"}
    with pytest.raises(ValueError, match=r"in/sub-02_T1w\.nii\.gz: 1 voxels are NaN"):
        prepare([str(tmp_path / "in")], tmp_path / "strict", strict=True, progress=False)
    assert not (tmp_path / "strict").exists()


def test_prepared_folder(tmp_path: Path) -> None:
    for subject, modality in itertools.product(range(1, 8), ("T1w", "FLAIR")):
        save(head(), tmp_path / "in" / f"sub-{subject:02d}_{modality}.nii.gz")
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
    assert train.images.shape == (40, 1, SIZE, SIZE)
    assert str(tmp_path) not in json.dumps(manifest)


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
        ("IXI002-Guys-0828-T1.nii.gz", "in/IXI002-Guys-0828", "T1"),
        ("BraTS-GLI-00005-000-t2w.nii.gz", "in/BraTS-GLI-00005-000", "T2"),
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
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert [row["subject"] for row in manifest["slices"]] == ["in/case1", "in/case1"]
    assert manifest["skipped"][0]["source"] == "in/case1/bad.png"
    array = np.load(tmp_path / "out" / "slices.npy").astype(float)
    np.testing.assert_allclose(array[0], array[1], atol=0.02)
    inside = array[0] > 0
    assert np.ptp(np.flatnonzero(inside.any(1))) / np.ptp(np.flatnonzero(inside.any(0))) == pytest.approx(40 / 20, rel=0.06)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nothing"], "nothing does not exist"),
        (["synthetic:0"], "synthetic:0: allowed is synthetic or synthetic:COUNT"),
        (["synthetic:x"], "synthetic:x: allowed"),
    ],
)
def test_bad_sources_are_named(sources: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(sources, tmp_path / "out", progress=False)


def test_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no .nii, .nii.gz, .png or .jpg file"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", progress=False)
    broken("constant", tmp_path / "empty" / "a.nii.gz")
    with pytest.raises(ValueError, match=r"no usable slice in .*\(empty/a.nii.gz: every voxel has the same value\)"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", progress=False)
    for arguments, message in (({"split": "volume"}, "split: got 'volume'"), ({"every": 0}, "every: got 0")):
        bad: dict[str, Any] = arguments
        with pytest.raises(ValueError, match=message):
            prepare(["synthetic:1"], tmp_path / "out", progress=False, **bad)


def test_synthetic_population_is_what_it_says() -> None:
    a, modality, covariates = synthetic_brain(3)
    again, *_ = synthetic_brain(3)
    np.testing.assert_array_equal(a.array, again.array)
    assert modality in CONTRASTS
    assert 20 <= float(covariates["age"]) <= 85
    assert covariates["sex"] in ("F", "M")
    assert not np.array_equal(a.array, synthetic_brain(4)[0].array)
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


def test_real_scans(ms_scans: Path, tmp_path: Path) -> None:
    manifest = prepare([str(ms_scans)], tmp_path / "out", progress=False)
    array = np.load(tmp_path / "out" / "slices.npy").astype(np.float32)
    rows = manifest["slices"]
    assert len({row["source"] for row in rows}) == 17
    assert {row["subject"] for row in rows} == {f"ms/patient{i:02d}" for i in (1, 3, 4, 12)}
    assert {s["source"] for s in manifest["skipped"]} == {f"ms/patient{i:02d}_lesions_gt.nii.gz" for i in (1, 3, 4, 12)}
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
