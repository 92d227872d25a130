"""Volumes as files: at the right place, the right way round, and known as synthetic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbldm_fast import save_volume
from sbldm_fast.data.volumes import axial_slices, load_nifti
from sbldm_fast.images import NOTICE, to_uint8

SPACING, DISTANCE, LOWEST = 220 / 128, 3.0, -30.0
DEPTH, HEIGHT, WIDTH = 20, 96, 112
POSITIONS = [LOWEST + DISTANCE * k for k in range(DEPTH)]
SPOT = (15, 30, 70)  # slice, row, column: in the upper front right quarter
# of the spot: right of the middle, in front of the middle, and its slice's height
AT = ((70 - 55.5) * SPACING, (47.5 - 30) * SPACING, LOWEST + 15 * DISTANCE)


def brain() -> Tensor:
    """A round head `[D, 1, H, W]`, brighter at the front and at the top, with a bright spot."""
    z, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (DEPTH, HEIGHT, WIDTH)), indexing="ij")
    inside = (x - 55.5) ** 2 + (y - 47.5) ** 2 < 42**2
    values = torch.where(inside, -0.2 - y / 300 + z / 200, -1.0)
    values[SPOT] = 1.0
    return values[:, None]


@pytest.mark.parametrize("name", ["brain.nii.gz", "brain.nii", "Brain.NII"])
def test_a_voxel_lies_where_nibabel_says(tmp_path: Path, name: str) -> None:
    nib = pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    save_volume(brain(), tmp_path / name, positions=POSITIONS, spacing=SPACING, description="seed 3; age 70, sex F")
    found = nib.load(tmp_path / name)
    assert found.shape == (WIDTH, HEIGHT, DEPTH)
    assert nib.aff2axcodes(found.affine) == ("R", "A", "S")
    np.testing.assert_allclose(found.header.get_zooms(), (SPACING, SPACING, DISTANCE), rtol=1e-6)
    assert found.header.get_xyzt_units()[0] == "mm"
    array = np.asarray(found.dataobj)
    voxel = np.unravel_index(array.argmax(), array.shape)
    assert voxel == (70, HEIGHT - 1 - 30, 15)
    for affine in (found.affine, found.header.get_qform(coded=True)[0], found.header.get_sform(coded=True)[0]):
        np.testing.assert_allclose((affine @ [*voxel, 1])[:3], AT, atol=1e-4)
    corners = found.affine @ np.array([[0, 0, 0, 1], [WIDTH - 1, HEIGHT - 1, DEPTH - 1, 1]]).T
    np.testing.assert_allclose(corners[:2].sum(1), 0, atol=1e-4)  # x and y are 0 in the middle
    assert np.array_equal(array, brain()[:, 0].numpy()[:, ::-1].transpose(2, 1, 0))
    said = f"{NOTICE}; seed 3; age 70, sex F"
    assert bytes(found.header["descrip"]).rstrip(b"\0").decode() == said
    (comment,) = found.header.extensions
    assert (comment.get_code(), comment.get_content().decode().rstrip("\0")) == (6, said)


def test_a_long_description_is_whole_in_the_comment(tmp_path: Path) -> None:
    nib = pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    long = "seed 1; group " + "ä" * 200
    save_volume(brain(), tmp_path / "a.nii.gz", positions=POSITIONS, spacing=SPACING, description=long)
    header = nib.load(tmp_path / "a.nii.gz").header
    assert bytes(header["descrip"]) == f"{NOTICE}; {long}".encode("ascii", "replace")[:80]
    assert header.extensions[0].get_content().decode().rstrip("\0") == f"{NOTICE}; {long}"


def test_prepare_reads_both_forms_the_right_way_round(tmp_path: Path) -> None:
    """Row 0 is anterior and column 0 the patient's left again, at the heights that were given."""
    pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    from sbldm_fast.data.dicom import load_dicom

    volume = brain()
    save_volume(volume, tmp_path / "a.nii.gz", positions=POSITIONS, spacing=SPACING)
    save_volume(volume, tmp_path / "series", positions=POSITIONS, spacing=SPACING)
    series, left_out = load_dicom(sorted((tmp_path / "series").iterdir()))
    assert (len(series), left_out) == (1, [])
    for scan in (load_nifti(tmp_path / "a.nii.gz"), series[0].volume):
        slices, positions = axial_slices(scan)
        np.testing.assert_allclose(positions, POSITIONS, atol=1e-3)
        row, column = np.unravel_index((slices[15] - slices[14]).argmax(), slices[15].shape)
        # of 128 pixels of 220 / 128 mm, centred on the head as this volume is
        assert abs(row - (30 + 16)) <= 1
        assert abs(column - (70 + 8)) <= 1
        assert slices[15, 30, 64] > slices[15, 90, 64], "brighter at the front, which is up"
        assert slices[19, 64, 64] > slices[0, 64, 64], "brighter at the top, which is last"


def series(folder: Path) -> list[Any]:
    pydicom = pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


def test_a_series_says_that_it_is_synthetic_and_where_it_lies(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    save_volume(brain(), tmp_path / "s", positions=POSITIONS, spacing=SPACING, description="seed 3; grüße")
    slices = series(tmp_path / "s")
    assert len(slices) == DEPTH
    for k, one in enumerate(slices):
        assert (one.PatientName, one.PatientID, one.SeriesDescription) == ("Synthetic", "SYNTHETIC", NOTICE)
        assert (list(one.ImageType), one.BurnedInAnnotation) == (["DERIVED", "SECONDARY"], "NO")
        assert (one.SOPClassUID.name, one.ConversionType) == ("Secondary Capture Image Storage", "SYN")
        assert one.ImageComments == f"{NOTICE}; seed 3; grüße"
        assert (one.InstanceNumber, float(one.ImagePositionPatient[2])) == (k + 1, POSITIONS[k])
        assert float(one.SpacingBetweenSlices) == DISTANCE
        assert (one.StudyDate, one.PatientBirthDate) == ("", "")
    one = slices[15]
    pixels = one.pixel_array
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert pixels[row, column] == 4095
    # PS3.3 C.7.6.2.1.1: the position of the first pixel, and along a row and down a column from it, in LPS
    along, down = (np.array(one.ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    lps = np.array(one.ImagePositionPatient, float) + along * SPACING * column + down * SPACING * row
    np.testing.assert_allclose(lps, (-AT[0], -AT[1], AT[2]), atol=1e-4)
    assert pixels[0, 0] == 0


def test_uids_follow_from_the_content(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    given: dict[str, Any] = {"positions": POSITIONS, "spacing": SPACING, "description": "seed 3"}
    other = brain()
    other[0, 0, 40, 40] = 0.5
    for name, volume, more in (
        ("a", brain(), {}),
        ("b", brain(), {}),
        ("c", other, {}),
        ("d", brain(), {"spacing": 1.0}),
    ):
        save_volume(volume, tmp_path / name, **(given | more))
    assert all((tmp_path / "a" / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "b").iterdir()), (
        "the same volume is the same files"
    )
    uids = {
        uid
        for name in "acd"
        for one in series(tmp_path / name)
        for uid in (one.SOPInstanceUID, one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID)
    }
    assert len(uids) == 3 * (DEPTH + 3)
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_three_views_are_of_the_head_in_millimetres(tmp_path: Path) -> None:
    save_volume(brain(), tmp_path / "a.png", positions=POSITIONS, spacing=SPACING)
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image)
        assert NOTICE in image.info["Description"]
    height, width = round(HEIGHT * SPACING), round(WIDTH * SPACING)
    assert sheet.shape == (height + 14, 3 * width)
    axial, coronal, sagittal = (sheet[:height, i * width : (i + 1) * width] for i in range(3))
    thick = DEPTH * DISTANCE
    for view in (coronal, sagittal):
        lit = np.flatnonzero((view[15:, 40:-40] > 60).any(1)) + 15  # below the label
        assert lit[0] == pytest.approx((height - thick) / 2, abs=2)
        assert lit[-1] - lit[0] + 1 == pytest.approx(thick, abs=3)
        assert view[lit[0] + 3, width // 2] > view[lit[-1] - 3, width // 2], "the top is up"
    wide = np.flatnonzero(axial[height // 2, 15:] > 60) + 15
    assert wide[-1] - wide[0] + 1 == pytest.approx(84 * SPACING, abs=4)
    assert axial[40, width // 2] > axial[-40, width // 2], "the front is up"
    middle = sagittal[height // 2]
    left = (width - round(HEIGHT * SPACING)) // 2
    assert middle[left + 30] > middle[-left - 30], "the front is at the left"


def test_an_empty_volume_has_views_too(tmp_path: Path) -> None:
    save_volume(torch.full((2, 1, 16, 16), -1.0), tmp_path / "a.png", positions=[0, 1], spacing=1)
    assert to_uint8(torch.full((1, 1, 1, 1), -1.0)).item() == 0
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"volume": brain()[:1], "positions": [0]}, r"volume: got shape \[1, 1, 96, 112\], allowed is \[D, 1, H, W\]"),
        ({"volume": brain()[:, 0]}, r"volume: got shape \[20, 96, 112\]"),
        ({"volume": brain() * float("nan")}, "volume: got NaN or infinity"),
        ({"positions": POSITIONS[1:]}, "positions: got 19, allowed is one for each of 20 slices"),
        ({"positions": POSITIONS[::-1]}, "positions: got steps of -3 to -3 mm, allowed are heights that rise evenly"),
        ({"positions": [*POSITIONS[:-1], 60.0]}, "positions: got steps of 3 to 36 mm"),
        ({"positions": [0.0] * 20}, "positions: got steps of 0 to 0 mm"),
        ({"positions": [float("nan")] * 20}, "positions: got steps of nan"),
        ({"spacing": 0.0}, "spacing: got 0.0, allowed are mm of a pixel"),
        ({"spacing": float("nan")}, "spacing: got nan"),
        ({"spacing": None}, "spacing: got None"),
        ({"positions": "abc"}, "volume, positions: got Tensor, 'abc', allowed are tensors"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.png", "a"])
def test_what_is_no_volume_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {"volume": brain(), "positions": POSITIONS, "spacing": SPACING} | change
    with pytest.raises(ValueError, match=said):
        save_volume(given.pop("volume"), tmp_path / name, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.nii.gzip", "a.mha", "a.gz", "a.b/c.txt"])
def test_a_name_that_says_another_form_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"path: got .*, allowed is a name that ends in .nii.gz, .nii, .png or"):
        save_volume(brain(), tmp_path / name, positions=POSITIONS, spacing=SPACING)
    assert not list(tmp_path.iterdir())


def test_arrays_are_volumes_too(tmp_path: Path) -> None:
    for volume, name in ((brain(), "a.nii"), (brain().numpy(), "b.nii")):
        save_volume(volume, tmp_path / name, positions=np.array(POSITIONS), spacing=SPACING)  # type: ignore[arg-type]
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_a_folder_of_something_else_is_not_lost(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.dcm").write_text("mine")
    with pytest.raises(ValueError, match=r"holds scan\.dcm, which would be lost"):
        save_volume(brain(), tmp_path / "mine", positions=POSITIONS, spacing=SPACING)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["scan.dcm"]


@pytest.mark.parametrize(("name", "module"), [("a.nii.gz", "nibabel"), ("a", "pydicom")])
def test_a_missing_extra_is_named(tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (module, f"{module}.dataset"):
        monkeypatch.setitem(sys.modules, one, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'sbldm_fast\[data\]'"):
        save_volume(brain(), tmp_path / name, positions=POSITIONS, spacing=SPACING)
