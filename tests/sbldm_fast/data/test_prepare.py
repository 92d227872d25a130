"""What prepare writes, reads and refuses."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.frame import SIZE

from .test_readers import broken, changed
from .test_volumes import head, patched, save


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


def test_positions_are_counted_from_the_top_of_the_head(tmp_path: Path) -> None:
    """Whatever origin the scanner had, however much air is above, and whichever slices are kept."""
    image = head()
    array, affine = np.asarray(image.dataobj), image.affine
    moved, above = affine.copy(), np.concatenate([array, np.zeros_like(array[..., :4])], axis=2)
    moved[2, 3] += 300
    save(image, tmp_path / "in" / "sub-1_T1w.nii")
    save(nib.Nifti1Image(array, moved), tmp_path / "in" / "sub-2_T1w.nii")
    save(nib.Nifti1Image(above, affine), tmp_path / "in" / "sub-3_T1w.nii")
    save(nib.Nifti1Image(array[..., ::-1], affine @ np.diag([1, 1, -1, 1])), tmp_path / "in" / "sub-4_T1w.nii")

    def levels(every: int) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in prepare([str(tmp_path / "in")], tmp_path / "out", every=every, progress=False)["slices"]:
            found.setdefault(row["source"][3:8], []).append((row["covariates"]["position"], row["position_mm"]))
        return found

    whole = levels(1)
    for scan in whole.values():
        assert [level for level, _ in scan] == [71.0 - 5 * i for i in range(11, -1, -1)]
    heights = {name: scan[-1][1] for name, scan in whole.items()}
    assert heights["sub-2"] == heights["sub-1"] + 300, "the scanner's heights are kept beside"
    for name, scan in levels(5).items():
        assert scan == whole[name][::5]


def test_the_template_is_at_its_own_heights_and_a_picture_at_none(tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="nilearn, of the extra data, brings the template")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (60, 1))).save(tmp_path / "in" / "a.png")
    manifest = prepare(["mni152", str(tmp_path / "in")], tmp_path / "out", every=10, progress=False)
    *template, picture = manifest["slices"]
    assert len(template) > 10
    for row in template:
        assert row["covariates"] == {"position": pytest.approx(row["position_mm"], abs=0.01)}
    assert (picture["covariates"], picture["modality"]) == ({}, "unknown")
    assert manifest["covariates"]["modality"]["slices"] == len(template)


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


def test_a_picture_that_lies_on_its_head(tmp_path: Path) -> None:
    grey = np.zeros((64, 64), np.uint8)
    grey[50:60] = 200
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    (tmp_path / "in").mkdir()
    Image.fromarray(grey).save(tmp_path / "in" / "a.jpg", exif=exif)
    prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert np.argwhere(np.load(tmp_path / "out" / "slices.npy")[0] > 0)[:, 0].mean() < 30


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
