"""What a user names to files, subjects, modalities and splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sbldm_fast.data import prepare
from sbldm_fast.data.prepare import assign_splits

from .test_readers import broken
from .test_volumes import head, save, voxels


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
