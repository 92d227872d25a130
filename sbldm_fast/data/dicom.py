"""A folder of DICOM files to volumes: sorted by position, mixed series and time points apart, nothing guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .volumes import Unusable, Volume, oriented

# what tells time points and echoes of one series apart, by order of trust
TIMES = ("TemporalPositionIdentifier", "DiffusionBValue", "EchoTime", "AcquisitionNumber", "TriggerTime", "AcquisitionTime")
TAGS = ["PatientID", "SeriesInstanceUID", "SOPInstanceUID", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows",
        "Columns", "SeriesDescription", "PhotometricInterpretation", "NumberOfFrames", "SliceThickness", *TIMES]  # fmt: skip


class Series(NamedTuple):
    """A volume, and of its headers only what no person can be known by: which patient of the folder, and words on the contrast."""

    patient: int
    description: str
    volume: Volume


def is_dicom(path: Path) -> bool:
    """Whether the file's name or its 128-byte preamble says DICOM."""
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with path.open("rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def load_dicom(files: Sequence[Path]) -> tuple[list[Series], list[tuple[str, str]]]:
    """The volumes in the files of one folder, and what was left out: the file's name, or that of a series' first, and the reason.

    Slices are sorted by ImagePositionPatient along the normal of ImageOrientationPatient, never by name or number.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise ValueError("reading DICOM needs pydicom: pip install 'sbldm_fast[data]'") from None

    left_out: list[tuple[str, str]] = []
    stacks: dict[Any, list[tuple[Path, Any]]] = defaultdict(list)
    patients: dict[str, int] = {}
    seen: dict[str, str] = {}
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            if "Rows" not in header:
                raise Unusable("no image in it")
            if int(header.get("NumberOfFrames") or 1) > 1:
                raise Unusable("many frames in one file (enhanced DICOM); convert it to NIfTI")
            if not str(header.get("PhotometricInterpretation")).startswith("MONOCHROME"):
                raise Unusable(f"{header.get('PhotometricInterpretation')} pixels, allowed are MONOCHROME1 and 2")
            missing = [n for n in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing") if not header.get(n)]
            if missing:
                raise Unusable(f"no {missing[0]}: where the slice lies cannot be known")
            first = seen.setdefault(str(header.get("SOPInstanceUID")), file.name)
            if first != file.name:
                raise Unusable(f"a copy of {first}")
            patient = patients.setdefault(str(header.get("PatientID")), len(patients))
            key = (patient, str(header.get("SeriesInstanceUID")), header.Rows, header.Columns, header.PhotometricInterpretation,
                   *np.round([*header.ImageOrientationPatient, *header.PixelSpacing], 3))  # fmt: skip
        except (InvalidDicomError, OSError, ValueError, TypeError, AttributeError) as error:
            left_out.append((file.name, str(error) if isinstance(error, Unusable) else f"not a readable DICOM file ({error})"))
            continue
        stacks[key].append((file, header))
    series = []
    for key, stack in stacks.items():
        try:
            for part in _time_points(stack):
                header = part[0][1]
                series.append(Series(key[0], str(header.get("SeriesDescription", "")), _volume(part)))
        except Unusable as reason:
            left_out.append((f"{stack[0][0].name} and {len(stack) - 1} others of its series", str(reason)))
    return series, left_out


def _height(header: Any) -> float:
    """Position along the stack in mm."""
    across = np.asarray(header.ImageOrientationPatient, dtype=float)
    return float(np.cross(across[:3], across[3:]) @ np.asarray(header.ImagePositionPatient, dtype=float))


def _time_points(stack: list[tuple[Path, Any]]) -> list[list[tuple[Path, Any]]]:
    """The stack, or where positions repeat its parts by the first of TIMES that explains it."""

    def repeats(part: list[tuple[Path, Any]]) -> int:
        return len(part) - len({round(_height(header), 2) for _, header in part})

    if not repeats(stack):
        return [stack]
    for tag in TIMES:
        parts: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
        for one in stack:
            parts[str(one[1].get(tag))].append(one)
        if len({len(part) for part in parts.values()}) == 1 and not any(map(repeats, parts.values())):
            return list(parts.values())
    raise Unusable(f"{repeats(stack)} slices lie where another one lies, and none of {', '.join(TIMES)} tells them apart")


def _volume(part: list[tuple[Path, Any]]) -> Volume:
    import pydicom
    from pydicom.pixels.processing import apply_rescale

    part = sorted(part, key=lambda one: _height(one[1]))
    heights = np.array([_height(header) for _, header in part])
    gaps = np.diff(heights)
    first = part[0][1]
    gap = float(np.median(gaps)) if len(gaps) else float(first.get("SliceThickness") or 1)
    if len(gaps) and np.abs(gaps - gap).max() > max(0.1 * gap, 0.02):
        raise Unusable(f"slices are missing: gaps of {gaps.min():.2f} to {gaps.max():.2f} mm")
    planes = []
    for file, _ in part:
        try:
            whole = pydicom.dcmread(file)
            planes.append(apply_rescale(whole.pixel_array, whole).astype(np.float32).T)
        except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
            raise Unusable(f"the pixels of {file.name} are not readable ({error})") from None
    array = np.stack(planes, axis=2)
    if first.PhotometricInterpretation == "MONOCHROME1":
        array = -array  # small values are white
    across = np.asarray(first.ImageOrientationPatient, dtype=float)
    affine = np.eye(4)
    # array[column, row, slice]: PixelSpacing is that of rows, then that of columns
    affine[:3, 0], affine[:3, 1] = across[:3] * float(first.PixelSpacing[1]), across[3:] * float(first.PixelSpacing[0])
    affine[:3, 2] = np.cross(across[:3], across[3:]) * gap
    affine[:3, 3] = first.ImagePositionPatient
    return oriented(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)  # DICOM's x and y run to the left and to the back
