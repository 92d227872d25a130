"""DICOM folders: sorted by position, the right way up, mixed ones split, doubtful ones refused, nothing personal
kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from sbldm_fast.data import prepare
from sbldm_fast.data.dicom import load_dicom
from sbldm_fast.data.frame import SIZE
from sbldm_fast.data.sources import Subjects
from sbldm_fast.data.volumes import axial_slices, load_nifti

from .test_volumes import head, save

SHAPE = (90, 110, 12)


ZOOMS = (2.0, 2.0, 5.0)


def pixels() -> np.ndarray:
    """The head of the NIfTI tests as whole numbers, `[x, y, z]` in RAS."""
    array: np.ndarray = np.asarray(head(SHAPE, ZOOMS).dataobj).clip(0).round().astype(np.uint16)
    return array


def one(k: int, image: np.ndarray, **values: Any) -> FileDataset:
    """Axial slice k as a scanner stores it: rows to the back, columns to the patient's left."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(k), str(sorted(values))])
    ds = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientID, ds.PatientName, ds.SeriesInstanceUID, ds.InstanceNumber = "SECRET-7", "Secret^Name", "1.2.3", 1
    ds.StudyDate, ds.SeriesDescription = "19990101", "Secret ax"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [ZOOMS[1], ZOOMS[0]], ZOOMS[2]
    # LPS of the first pixel, which is the patient's right front
    ds.ImagePositionPatient = [
        -(SHAPE[0] - 1) / 2 * ZOOMS[0],
        -(SHAPE[1] - 1) / 2 * ZOOMS[1],
        (k - (SHAPE[2] - 1) / 2) * ZOOMS[2],
    ]
    ds.Rows, ds.Columns = image.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.ascontiguousarray(image).tobytes()
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def plane(k: int) -> np.ndarray:
    """`[row, column]`: in RAS x grows to the right, in DICOM columns run to the left and rows to the back."""
    return pixels()[::-1, ::-1, k].T


def series(folder: Path, change: Callable[[int, FileDataset], Any] = lambda k, ds: None, **values: Any) -> Path:
    """A folder of slices whose names and numbers say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(SHAPE[2]):
        image = plane(k).copy()
        if "PatientID" in values:  # another head
            image[50, 20 + len(values["PatientID"]) + ord(values["PatientID"][-1]) % 10] = 550
        ds = one(k, image, **values)
        ds.where = folder
        if change(k, ds) is not False:
            ds.save_as(
                folder / f"{(k * 5 + 3) % SHAPE[2]:02d}-{values.get('SeriesInstanceUID', '')}.dcm",
                enforce_file_format=True,
            )
    return folder


def set_in_one(name: str, value: Any) -> Callable[[int, FileDataset], None]:
    def change(k: int, ds: FileDataset) -> None:
        if k == 4:
            setattr(ds, name, value)

    return change


def load(folder: Path) -> tuple[list[Any], list[tuple[str, str]]]:
    return load_dicom(sorted(folder.iterdir()))


@pytest.fixture
def expected(tmp_path: Path) -> np.ndarray:
    return axial_slices(load_nifti(save(head(SHAPE, ZOOMS), tmp_path / "same.nii")))[0]


def slices_in(folder: Path) -> np.ndarray:
    got, left_out = load(folder)
    assert not left_out
    assert len(got) == 1
    return axial_slices(got[0].volume)[0]


def test_a_series_is_the_nifti_of_it(expected: np.ndarray, tmp_path: Path) -> None:
    np.testing.assert_allclose(slices_in(series(tmp_path / "d")), expected, atol=0.02)


@pytest.mark.parametrize("syntax", ["RLE", "JPEG 2000"])
def test_compressed_pixels_are_read(syntax: str, expected: np.ndarray, tmp_path: Path) -> None:
    def compress(k: int, ds: FileDataset) -> None:
        if syntax == "RLE":
            ds.compress(RLELossless, generate_instance_uid=False)
            return
        from io import BytesIO

        from PIL import Image
        from pydicom.encaps import encapsulate

        buffer = BytesIO()
        Image.fromarray(ds.pixel_array).save(buffer, "JPEG2000", irreversible=False)
        ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate([buffer.getvalue()]), JPEG2000Lossless
        ds["PixelData"].VR = "OB"

    np.testing.assert_allclose(slices_in(series(tmp_path / "d", compress)), expected, atol=0.02)


def test_slope_intercept_and_inverted_pixels(expected: np.ndarray, tmp_path: Path) -> None:
    def rescale(k: int, ds: FileDataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = 2 + k, -100  # its own for each slice, as in PET
        ds.PixelData = np.ascontiguousarray(((plane(k) * 12 + 100) / (2 + k)).round().astype(np.uint16)).tobytes()

    def invert(k: int, ds: FileDataset) -> None:
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.PixelData = np.ascontiguousarray(1000 - plane(k)).tobytes()

    np.testing.assert_allclose(slices_in(series(tmp_path / "a", rescale)), expected, atol=0.03)
    np.testing.assert_allclose(slices_in(series(tmp_path / "b", invert)), expected, atol=0.02)


@pytest.mark.parametrize(
    ("stored", "tags"),
    [
        (-32768, {"PixelPaddingValue": ("SS", -32768)}),
        (-2000, {"PixelPaddingValue": ("US", 63536)}),  # of the other sign than the pixels
        (-1800, {"PixelPaddingValue": ("SS", -2000), "PixelPaddingRangeLimit": ("SS", -1700)}),
        (4000, {"PixelPaddingValue": ("SS", 4000), "PhotometricInterpretation": ("CS", "MONOCHROME1")}),
    ],
)
def test_padding_is_air(stored: int, tags: dict[str, Any], expected: np.ndarray, tmp_path: Path) -> None:
    def pad(k: int, ds: FileDataset) -> None:
        image = plane(k).astype(np.int16)
        image = 1000 - image if "PhotometricInterpretation" in tags else image
        image[:, :8] = image[-8:] = stored
        ds.PixelData, ds.PixelRepresentation = np.ascontiguousarray(image).tobytes(), 1
        ds.RescaleSlope, ds.RescaleIntercept = 2, -100
        for name, (vr, value) in tags.items():
            if name in ds:
                del ds[name]
            ds.add_new(name, vr, value)

    np.testing.assert_allclose(slices_in(series(tmp_path / "d", pad)), expected, atol=0.03)


def test_a_sagittal_series_becomes_axial_slices(expected: np.ndarray, tmp_path: Path) -> None:
    fine = head((90, 110, 80), (2.0, 2.0, 2.0))
    array = np.asarray(fine.dataobj).clip(0).round().astype(np.uint16)
    (tmp_path / "d").mkdir()
    for i in range(90):
        ds = one(i, array[i, ::-1, ::-1].T)  # rows downwards, columns to the back
        ds.ImageOrientationPatient, ds.PixelSpacing = [0, 1, 0, 0, 0, -1], [2, 2]
        ds.ImagePositionPatient = [-(i - 44.5) * 2, -54.5 * 2, 39.5 * 2]
        ds.save_as(tmp_path / "d" / f"{i}.dcm", enforce_file_format=True)
    got = slices_in(tmp_path / "d")
    want = axial_slices(load_nifti(save(fine, tmp_path / "same.nii")))[0]
    np.testing.assert_allclose(got, want, atol=0.02)


def test_mixed_series_time_points_and_patients_are_split(tmp_path: Path) -> None:
    folder = series(tmp_path / "in" / "case" / "T1w")
    series(folder, SeriesInstanceUID="1.2.4", PatientID="OTHER")
    series(folder, SeriesInstanceUID="1.2.5", AcquisitionNumber=1, SOPInstanceUID="1.9")

    def later(k: int, ds: FileDataset) -> None:
        ds.SOPInstanceUID = f"1.8.{k}"

    def first(k: int, ds: FileDataset) -> None:
        ds.SOPInstanceUID = f"1.7.{k}"

    for file in folder.glob("*-1.2.5.dcm"):
        file.unlink()
    series(folder, first, SeriesInstanceUID="1.2.5", AcquisitionNumber=1)
    for file in folder.glob("*-1.2.5.dcm"):
        file.rename(file.with_suffix(".one.dcm"))
    series(folder, later, SeriesInstanceUID="1.2.5", AcquisitionNumber=2)
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert manifest["skipped"] == []
    found = sorted({(row["source"], row["subject"], row["modality"]) for row in manifest["slices"]})
    assert [source for source, _, _ in found] == [f"in/case/T1w#{i}" for i in range(4)]
    assert {subject for _, subject, _ in found} == {"in/case", "in/case-1"}
    assert {modality for _, _, modality in found} == {"T1"}
    assert len(manifest["slices"]) == 4 * SHAPE[2]


def test_one_patient_is_one_subject_wherever_the_series_lie(tmp_path: Path) -> None:
    """As archives hand them out: a folder for each study and series, none of them named after the patient."""
    series(tmp_path / "in" / "st1" / "a", SeriesDescription="T1", PatientID="P1")
    series(tmp_path / "in" / "st2" / "b", SeriesDescription="FLAIR", PatientID="P1", SeriesInstanceUID="1.9")
    series(tmp_path / "in" / "st2" / "c", SeriesDescription="T1", PatientID="P2", SeriesInstanceUID="1.8")
    rows = prepare([str(tmp_path / "in")], tmp_path / "out", every=6, progress=False)["slices"]
    found = {(row["source"], row["modality"]): row["subject"] for row in rows}
    assert found["in/st1/a", "T1"] == found["in/st2/b", "FLAIR"] == "in/st1"
    assert found["in/st2/c", "T1"] == "in/st2"


def test_a_person_in_nifti_and_dicom_is_one_subject(tmp_path: Path) -> None:
    """What a converter leaves: the DICOM files and, beside them, what it made of them."""
    for i in range(1, 4):
        save(head(person=i), tmp_path / "in" / f"sub-{i:02d}" / f"sub-{i:02d}_T1w.nii.gz")
        series(tmp_path / "in" / f"sub-{i:02d}" / "dicom", PatientID=f"P{i}", SeriesInstanceUID=f"1.2.{i}")
    rows = prepare([str(tmp_path / "in")], tmp_path / "out", every=6, progress=False)["slices"]
    assert {row["subject"] for row in rows} == {"in/sub-01", "in/sub-02", "in/sub-03"}


@pytest.mark.parametrize("first", [True, False])
def test_a_scan_without_an_id_may_be_of_each_patient_of_its_name(first: bool) -> None:
    subjects = Subjects()
    scans = [("case", "P1", ["a"]), ("case", "P2", ["b"]), ("other", "P3", ["c"])]
    apart = [subjects.add(*scan) for scan in scans]
    assert len({subjects.names()[node] for node in apart}) == 3
    subjects = Subjects()
    together = [
        subjects.add(*scan) for scan in sorted([*scans, ("Case", "", ["d"])], key=lambda scan: bool(scan[1]) == first)
    ]
    assert len({subjects.names()[node] for node in together}) == 2


def test_two_people_interleaved_in_one_series_are_refused(tmp_path: Path) -> None:
    """Nothing in the headers of two anonymous people tells them apart; their slices do."""
    fine = np.asarray(head((90, 110, 24), (2.0, 2.0, 2.5)).dataobj).clip(0).round().astype(np.uint16)
    (tmp_path / "d").mkdir()
    for k in range(24):
        image = fine[::-1, ::-1, k].T.copy()
        if k % 2:
            image = np.roll(image, 6, axis=0) // 2
        ds = one(k, image, PatientID="")
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 2.5 * k]
        ds.save_as(tmp_path / "d" / f"{k}.dcm", enforce_file_format=True)
    got, left_out = load(tmp_path / "d")
    assert not got
    assert "every other slice is of another scan: two stacks lie in one series" in left_out[0][1]


def test_no_header_text_reaches_a_log_or_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """pydicom warns of values that are not valid, and quotes them; in other processes, too."""
    for folder, change in (("a", set_in_one("EchoTime", 5)), ("b", set_in_one("PixelData", b"123"))):
        with pytest.warns(UserWarning, match="SECRET"):
            series(tmp_path / "in" / folder, change, SeriesInstanceUID=f"SECRET.{folder}")
    caplog.clear()
    capfd.readouterr()
    caplog.set_level("DEBUG")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for workers in (1, 2):
            prepare([str(tmp_path / "in")], tmp_path / "out", every=6, workers=workers, progress=False)
    assert "SECRET" not in "".join([*map(str, warned), *capfd.readouterr(), caplog.text])


def test_without_instance_numbers_every_slice_counts(tmp_path: Path) -> None:
    def anonymous(k: int, ds: FileDataset) -> None:
        del ds.SOPInstanceUID

    (got,), left_out = load(series(tmp_path / "d", anonymous))
    assert (got.volume.shape, left_out) == (SHAPE, [])


def test_the_layout_of_rsna_miccai(tmp_path: Path) -> None:
    for subject in ("00000", "00002"):
        for modality in ("FLAIR", "T1w", "T1wCE", "T2w"):
            series(
                tmp_path / "train" / subject / modality,
                SeriesInstanceUID=f"1.{modality[1]}.{len(modality)}",
                PatientID=subject,
            )
    rows = prepare([str(tmp_path / "train")], tmp_path / "out", every=6, progress=False)["slices"]
    assert {(row["subject"], row["modality"]) for row in rows} == {
        (f"train/{subject}", modality) for subject in ("00000", "00002") for modality in ("FLAIR", "T1", "T1CE", "T2")
    }


def test_nothing_personal_is_kept(tmp_path: Path) -> None:
    prepare([str(series(tmp_path / "scan", SeriesDescription="Secret t2 ax"))], tmp_path / "out", progress=False)
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert not [word for word in ("SECRET", "Secret", "19990101", "1.2.3") if word in text]
    assert json.loads(text)["slices"][0]["modality"] == "T2", "of the description only the contrast"
    assert b"Secret" not in (tmp_path / "out" / "contact_sheet.png").read_bytes()


def test_a_file_without_an_ending_is_known_by_its_preamble(tmp_path: Path) -> None:
    folder = series(tmp_path / "d")
    for file in folder.iterdir():
        file.rename(file.with_suffix(""))
    (folder / "README").write_text("no scan")
    assert len(prepare([str(folder)], tmp_path / "out", progress=False)["slices"]) == SHAPE[2]


def test_the_real_series(ms_scans: Path, tmp_path: Path) -> None:
    manifest = prepare([str(ms_scans.parent / "dicom_t1_axial")], tmp_path / "out", progress=False)
    rows = manifest["slices"]
    assert manifest["skipped"] == []
    assert {(row["source"], row["subject"], row["modality"]) for row in rows} == {
        ("dicom_t1_axial", "dicom_t1_axial", "T1")
    }
    positions = [row["position_mm"] for row in rows]
    assert positions == sorted(positions)
    assert 7 < rows[0]["tilt_deg"] < 8
    middle = np.load(tmp_path / "out" / "slices.npy").astype(float)[len(rows) // 2] > -0.8
    height, width = (np.ptp(np.flatnonzero(middle.any(axis=a))) * 220 / SIZE for a in (1, 0))
    assert 165 < height < 220
    assert 130 < width < 190
