"""Series and files of DICOM that cannot be used are named with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import FileDataset

from sbldm_fast.data import prepare

from .test_dicom import SHAPE, load, one, plane, series, set_in_one


def drop(k: int, ds: FileDataset) -> bool:
    return k not in (4, 5)


def double(k: int, ds: FileDataset) -> None:
    if k == 4:
        ds.ImagePositionPatient = one(5, plane(5)).ImagePositionPatient


def without(name: str) -> Callable[[int, FileDataset], None]:
    def change(k: int, ds: FileDataset) -> None:
        if k == 4:
            delattr(ds, name)

    return change


def not_a_number(k: int, ds: FileDataset) -> None:
    with warnings.catch_warnings(action="ignore"):
        ds.RescaleSlope, ds.RescaleIntercept = "NaN", 0


def shear(k: int, ds: FileDataset) -> None:
    ds.ImagePositionPatient = [ds.ImagePositionPatient[0] + 6 * k, *ds.ImagePositionPatient[1:]]


def each_its_time(k: int, ds: FileDataset) -> None:
    """Two time points whose slices are told apart by the time of each slice alone: that is no time point."""
    ds.AcquisitionTime = f"1200{k:02d}"
    again = copy.deepcopy(ds)
    again.SOPInstanceUID, again.AcquisitionTime = f"1.6.{k}", f"1300{k:02d}"
    again.save_as(Path(ds.where) / f"again-{k}.dcm", enforce_file_format=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "slices are missing: gaps of 5.00 to 15.00 mm"),
        (double, "1 slices lie where another one lies, and none of"),
        (without("ImagePositionPatient"), "no ImagePositionPatient of 3 numbers: where the slice lies cannot be known"),
        (without("ImageOrientationPatient"), "no ImageOrientationPatient of 6 numbers"),
        (set_in_one("ImagePositionPatient", [1.0, 2.0]), "no ImagePositionPatient of 3 numbers"),
        (set_in_one("Rows", [1, 2]), "not a readable DICOM file (TypeError)"),
        (shear, "slices are shifted sideways by up to 66.0 mm (a tilted gantry?)"),
        (each_its_time, "12 slices lie where another one lies, and none of"),
        (set_in_one("NumberOfFrames", 9), "many frames in one file"),
        (set_in_one("PhotometricInterpretation", "RGB"), "pixels are not grey, allowed are MONOCHROME1 and 2"),
        (set_in_one("PixelData", b"123"), "are not readable"),
        (set_in_one("PixelSpacing", [0, 0]), "the affine is singular"),
        (
            set_in_one("ImageType", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]),
            "a Siemens mosaic: many slices as the tiles of one picture",
        ),
        (set_in_one("PixelData", bytes(110 * 90 * 4)), "are more than its Rows x Columns"),
        (set_in_one("ImagePositionPatient", [0, 0, "1e300"]), "ImagePositionPatient is further away than 10 m"),
        (not_a_number, "are NaN or infinite"),
    ],
)
def test_a_doubtful_series_is_refused_with_the_reason(
    change: Callable[[int, FileDataset], Any], message: str, tmp_path: Path
) -> None:
    got, left_out = load(series(tmp_path / "d", change))
    assert not got
    assert any(message in reason for _, reason in left_out)
    for name, _ in left_out:
        assert ".dcm" in name


def test_files_that_are_no_slices_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = series(tmp_path / "d")
    (folder / "garbage.dcm").write_bytes(b"not DICOM at all" * 20)
    report = one(0, plane(0))
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    report.SOPInstanceUID = "1.5"
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    copy = folder / "zz-copy.dcm"
    copy.write_bytes((folder / "00-.dcm").read_bytes())
    got, left_out = load(folder)
    assert len(got) == 1
    assert got[0].volume.shape == SHAPE
    assert dict(left_out)["report.dcm"] == "no image in it"
    assert dict(left_out)["zz-copy.dcm"] == "a copy of 00-.dcm"
    assert dict(left_out)["garbage.dcm"].startswith("not a readable DICOM file")


def test_names_do_not_act_on_a_terminal(tmp_path: Path) -> None:
    folder = series(tmp_path / "in" / "red\x1b[31m\nskipped all")
    (folder / "\udcff\x1b.dcm").write_bytes(b"")
    (folder / "\udcff.png").write_bytes(b"")
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", every=6, progress=False)
    named = [row["source"] for row in manifest["slices"]] + [s["source"] + s["reason"] for s in manifest["skipped"]]
    assert len(named) == 4
    assert all(name.startswith(r"in/red\x1b[31m\nskipped all") and name.isprintable() for name in named)
