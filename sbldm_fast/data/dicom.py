"""A folder of DICOM files to volumes: sorted by position, mixed series and time points apart, nothing guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingExtra
from .volumes import MAX_REACH, Unusable, Volume, orient, silent

# what tells time points and echoes of one series apart, by order of trust
TIMES = (
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "EchoTime",
    "AcquisitionNumber",
    "TriggerTime",
    "AcquisitionTime",
)
TAGS = [
    "PatientID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SeriesDescription",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "SliceThickness",
    "ImageType",
    *TIMES,
]
MAX_PIXELS = 4096**2  # of a slice
# neighbours that differ so much more than slices two apart: 0.6 to 0.9 in a head's series, 1.7 and more in those of two
# heads 3 mm apart
MIXED = 1.3


class Series(NamedTuple):
    """A volume, and of its headers what tells people and contrasts apart; neither is written anywhere."""

    patient: str
    description: str
    volume: Volume


class _Slice(NamedTuple):
    file: Path
    header: Any
    position: np.ndarray  # of the first pixel, mm
    along: np.ndarray  # unit vectors of a row and of a column
    normal: np.ndarray
    spacing: np.ndarray  # of rows, of columns, mm
    height: float  # along the normal


def is_dicom(path: Path) -> bool:
    """Whether the file's name or its 128-byte preamble says DICOM."""
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with path.open("rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


@silent()
def load_dicom(files: Sequence[Path]) -> tuple[list[Series], list[tuple[str, str]]]:
    """The volumes in the files of one folder, and what was left out: the file's name, or that of a series' first, and
    the reason.

    Slices are sorted by ImagePositionPatient along the normal of ImageOrientationPatient, never by name or number.
    """
    try:
        import pydicom
    except ImportError:
        raise MissingExtra("reading DICOM", "pydicom", "data") from None

    left_out: list[tuple[str, str]] = []
    stacks: dict[Any, list[_Slice]] = defaultdict(list)
    seen: dict[str, str] = {}
    for file in files:
        try:
            one = _slice(file, pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS))
            first = seen.setdefault(str(one.header.get("SOPInstanceUID") or file), file.name)
            if first != file.name:
                raise Unusable(f"a copy of {first}")
            words = (
                str(one.header.get(tag) or "")
                for tag in ("PatientID", "SeriesInstanceUID", "PhotometricInterpretation")
            )
            key = (
                *words,
                int(one.header.Rows),
                int(one.header.Columns),
                *np.round([*one.along.ravel(), *one.spacing], 3),
            )
        except Unusable as reason:
            left_out.append((file.name, str(reason)))
        except Exception as error:  # pydicom meets a broken header with any; its text may quote it
            left_out.append((file.name, f"not a readable DICOM file ({type(error).__name__})"))
        else:
            stacks[key].append(one)
    series = []
    for (patient, *_), stack in stacks.items():
        try:
            for part in _time_points(stack):
                series.append(Series(patient, str(part[0].header.get("SeriesDescription", "")), _volume(part)))
        except Unusable as reason:
            left_out.append((f"{stack[0].file.name} and {len(stack) - 1} others of its series", str(reason)))
    return series, left_out


def _slice(file: Path, header: Any) -> _Slice:
    if "Rows" not in header:
        raise Unusable("no image in it")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise Unusable("many frames in one file (enhanced DICOM); convert it to NIfTI")
    if int(header.Rows) * int(header.Columns) > MAX_PIXELS:
        raise Unusable(f"{header.Rows} x {header.Columns} pixels a slice, allowed are {MAX_PIXELS} in all")
    if "MOSAIC" in str(header.get("ImageType", "")).upper():
        raise Unusable("a Siemens mosaic: many slices as the tiles of one picture; convert it to NIfTI")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable("pixels are not grey, allowed are MONOCHROME1 and 2")
    numbers = []
    for name, length in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        value = np.asarray(header.get(name) or [], dtype=float)
        if value.shape != (length,) or not np.isfinite(value).all():
            raise Unusable(f"no {name} of {length} numbers: where the slice lies cannot be known")
        numbers.append(value)
    if np.abs(numbers[0]).max() > MAX_REACH:
        raise Unusable(f"ImagePositionPatient is further away than {MAX_REACH / 1000:.0f} m")
    along = numbers[1].reshape(2, 3)
    if np.abs(along @ along.T - np.eye(2)).max() > 0.01 or numbers[2].min() <= 0:
        raise Unusable("the affine is singular: ImageOrientationPatient or PixelSpacing say nothing")
    normal = np.cross(along[0], along[1])
    return _Slice(file, header, numbers[0], along, normal, numbers[2], float(normal @ numbers[0]))


def _time_points(stack: list[_Slice]) -> list[list[_Slice]]:
    """The stack, or where positions repeat its parts by the first of TIMES that gives each part every position once."""
    heights = {round(one.height, 2) for one in stack}
    if len(heights) == len(stack):
        return [stack]
    for tag in TIMES:
        parts: dict[str, list[_Slice]] = defaultdict(list)
        for one in stack:
            parts[str(one.header.get(tag))].append(one)
        if all(len(part) == len(heights) == len({round(one.height, 2) for one in part}) for part in parts.values()):
            return list(parts.values())
    raise Unusable(
        f"{len(stack) - len(heights)} slices lie where another one lies, and none of {', '.join(TIMES)} tells them"
        " apart"
    )


def _volume(part: list[_Slice]) -> Volume:
    part = sorted(part, key=lambda one: one.height)
    first = part[0]
    heights = np.array([one.height for one in part])
    gaps = np.diff(heights)
    gap = float(np.median(gaps)) if len(gaps) else float(first.header.get("SliceThickness") or 1)
    if len(gaps) and np.abs(gaps - gap).max() > max(0.1 * gap, 0.02):
        raise Unusable(f"slices are missing: gaps of {gaps.min():.2f} to {gaps.max():.2f} mm")
    sideways = max(
        float(np.abs(one.position - first.position - first.normal * (one.height - first.height)).max()) for one in part
    )
    if sideways > max(0.1 * first.spacing.min(), 0.05):
        raise Unusable(f"slices are shifted sideways by up to {sideways:.1f} mm (a tilted gantry?)")
    array = np.stack([_plane(one) for one in part], axis=2)
    array[np.isnan(array)] = np.nanmin(array)  # padding is air
    if len(part) >= 4:
        beside, beyond = (
            np.median([np.abs(array[..., k + n] - array[..., k]).mean() for k in range(len(part) - n)]) for n in (1, 2)
        )
        if beside > MIXED * beyond:
            raise Unusable("every other slice is of another scan: two stacks lie in one series")
    affine = np.eye(4)
    # array[column, row, slice]: PixelSpacing is that of rows, then that of columns
    affine[:3, 0], affine[:3, 1] = first.along[0] * first.spacing[1], first.along[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = first.normal * gap, first.position
    return orient(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)  # DICOM's x and y run to the left and to the back


def _plane(one: _Slice) -> np.ndarray:
    """The pixels `[column, row]`, white at the high end, NaN where they are padding."""
    import pydicom
    from pydicom.pixels.processing import apply_rescale
    from pydicom.pixels.utils import get_expected_length

    name = one.file.name
    try:
        whole = pydicom.dcmread(one.file, defer_size=2**20)
        promised, there = getattr(whole.get_item("PixelData", keep_deferred=True), "length", 0), one.file.stat().st_size
        if there < promised < 2**32 - 1:  # which stands for a length that is not known
            raise Unusable(f"{name} promises {promised} bytes of pixels, the file has {there}")
        stored = whole.pixel_array
        plane: np.ndarray = apply_rescale(stored, whole).astype(np.float32)
        padding = _padding(whole, stored)
        surplus = (
            0
            if whole.file_meta.TransferSyntaxUID.is_encapsulated
            else len(whole.get("PixelData", b"")) - get_expected_length(whole)
        )
    except Unusable:
        raise
    except Exception as error:  # a decoder meets broken pixels with any
        raise Unusable(f"the pixels of {name} are not readable ({type(error).__name__})") from None
    if plane.shape != (whole.Rows, whole.Columns) or surplus > 1:  # one byte makes a length even
        raise Unusable(f"the pixels of {name} are more than its Rows x Columns")
    if not np.isfinite(plane).all():
        raise Unusable(f"pixels of {name} are NaN or infinite")
    plane[padding] = np.nan
    if one.header.PhotometricInterpretation == "MONOCHROME1":
        plane = -plane  # small values are white
    return plane.T


def _padding(whole: Any, stored: np.ndarray) -> np.ndarray:
    """Where PixelPaddingValue, or what lies between it and PixelPaddingRangeLimit, says that nothing was measured."""
    first = whole.get("PixelPaddingValue")
    if first is None or stored.dtype.kind not in "iu":
        return np.zeros(stored.shape, bool)
    last = whole.get("PixelPaddingRangeLimit")
    # a file may give them with the other sign: the bits count, read as those of pixels
    bits = [int(value) % 256**stored.itemsize for value in (first, first if last is None else last)]
    low, high = sorted(np.array(bits, f"u{stored.itemsize}").view(stored.dtype.newbyteorder("=")))
    inside: np.ndarray = (low <= stored) & (stored <= high)
    return inside
