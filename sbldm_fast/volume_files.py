"""A volume to files that others open at the right place: NIfTI, a DICOM series, three views."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MissingExtra, UserError
from .files import whole_folder
from .images import NOTICE, save_grid, save_nifti, to_uint8

NIFTI = (".nii", ".nii.gz")
HEAD = -0.8  # values above it are head, as in prepare
UNEVEN = 0.01  # of the distance of slices: what their positions may differ by
GREYS = 4095  # of a DICOM picture: 12 bits
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def save_volume(
    volume: Tensor,
    path: str | Path,
    *,
    positions: Sequence[float] | Tensor,
    spacing: float,
    description: str = "",
) -> None:
    """Write slices `[D, 1, H, W]` in [-1, 1], from the bottom up, as one volume, whole or not at all.

    The form goes by the name. `brain.nii.gz` or `brain.nii`: NIfTI, float32 `[x, y, z]` in RAS. `brain.png`: an axial,
    a coronal and a sagittal view through the middle of the head, pixels of 1 mm. Else a folder: a DICOM series of
    secondary captures, 12 bits, whose UIDs follow from the content. x and y are 0 in the middle of the image.

    Args:
        volume: row 0 anterior, column 0 the patient's left, as `Pipeline.sample_volume` makes it.
        path: the file or the folder.
        positions: of each slice the height z, mm, evenly rising.
        spacing: mm of a pixel.
        description: what stands behind "synthetic, not for diagnosis" in the header: all of it in NIfTI's comment and
            DICOM's ImageComments, what fits of 80 bytes in NIfTI's `descrip`.

    Raises:
        ValueError: another shape, fewer than two slices, values that are not finite, positions that do not rise evenly,
            a spacing that is no length, a name that ends in something else, or a folder of other files, which would
            be lost; a file of the name is replaced.
        ImportError: nibabel or pydicom is missing (extra data).
    """
    path = Path(path)
    if path.suffix and not path.name.lower().endswith((*NIFTI, ".png")):
        raise UserError(
            f"path: got {path.name}, allowed is a name that ends in .nii.gz, .nii, .png or, a folder, in none"
        )
    slices, distance = _check(volume, positions, spacing)
    heights = [float(z) for z in positions]
    said = f"{NOTICE}; {description}" if description else NOTICE
    if path.name.lower().endswith(NIFTI):
        _, height, width = slices.shape
        affine = np.diag([spacing, spacing, distance, 1.0])
        affine[:3, 3] = -(width - 1) / 2 * spacing, -(height - 1) / 2 * spacing, heights[0]
        save_nifti(slices.numpy(), path, affine, said)
    elif path.suffix.lower() == ".png":
        _save_views(slices, path, heights, spacing, distance)
    else:
        _save_dicom(slices, path, heights, spacing, said)


def _check(volume: Tensor, positions: Sequence[float] | Tensor, spacing: float) -> tuple[Tensor, float]:
    """The slices `[D, H, W]` as float32 on the CPU, and their distance in mm."""
    try:
        volume, at = torch.as_tensor(volume), torch.as_tensor(positions, dtype=torch.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        got = f"{type(volume).__name__}, {positions!r:.80}"
        raise UserError(f"volume, positions: got {got}, allowed are tensors, arrays and lists of numbers") from None
    if volume.ndim != 4 or volume.shape[1] != 1 or len(volume) < 2:
        raise UserError(f"volume: got shape {list(volume.shape)}, allowed is [D, 1, H, W] with D of 2 or more")
    slices = volume.detach()[:, 0].float().cpu()
    if not slices.isfinite().all():
        raise UserError("volume: got NaN or infinity, allowed are numbers from -1 to 1")
    if len(at) != len(slices):
        raise UserError(f"positions: got {len(at)}, allowed is one for each of {len(slices)} slices")
    steps = at.diff()
    distance = float((at[-1] - at[0]) / (len(at) - 1))
    if not (distance > 0 and float((steps - distance).abs().max()) <= UNEVEN * distance):
        raise UserError(
            f"positions: got steps of {float(steps.min()):g} to {float(steps.max()):g} mm, allowed are heights that"
            " rise evenly, from the bottom up"
        )
    if not isinstance(spacing, (int, float)) or not 0 < spacing < 1000:
        raise UserError(f"spacing: got {spacing}, allowed are mm of a pixel, above 0")
    return slices, distance


def _save_views(slices: Tensor, path: Path, heights: Sequence[float], spacing: float, distance: float) -> None:
    """Three planes through the middle of what is head, left and front at the left, top up, pixels of 1 mm."""
    head = (slices > HEAD).double()
    middle = []
    for axis in range(3):
        weight = head.sum([other for other in range(3) if other != axis])
        weight = weight if float(weight.sum()) else torch.ones_like(weight)
        middle.append(int((weight @ torch.arange(len(weight), dtype=torch.float64) / weight.sum()).round()))
    k, row, column = middle
    up = slices.flip(0)
    planes = (
        (slices[k], spacing, spacing),
        (up[:, row], distance, spacing),
        (up[:, :, column], distance, spacing),
    )
    tiles = [_to_millimetres(*plane) for plane in planes]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    sheet = np.zeros((3, height, width), np.uint8)
    for tile, place in zip(tiles, sheet, strict=True):
        top, left = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
        place[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    x = (column - (slices.shape[2] - 1) / 2) * spacing
    y = ((slices.shape[1] - 1) / 2 - row) * spacing
    labels = [f"axial, z {heights[k]:.0f} mm", f"coronal, y {y:.0f} mm", f"sagittal, x {x:.0f} mm"]
    save_grid(sheet, path, f"{NOTICE}; L: the patient's left, A: front", 3, labels, ("L", "L", "A"))


def _to_millimetres(plane: Tensor, down: float, across: float) -> np.ndarray:
    """A plane whose pixels are `down` x `across` mm as uint8 with pixels of 1 mm."""
    size = max(1, round(plane.shape[0] * down)), max(1, round(plane.shape[1] * across))
    fine = F.interpolate(plane[None, None], size, mode="bilinear", antialias=True)
    tile: np.ndarray = to_uint8(fine)[0]
    return tile


def _save_dicom(slices: Tensor, path: Path, heights: Sequence[float], spacing: float, said: str) -> None:
    """A file a slice; pixels as radiologists are used to them, the patient's right at the left, coordinates in LPS."""
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import UID, ExplicitVRLittleEndian
    except ImportError:
        raise MissingExtra("writing DICOM", "pydicom", "data") from None

    greys = ((slices.flip(2).clamp(-1, 1) + 1) * (GREYS / 2)).round().numpy().astype("<u2")
    digest = hashlib.sha256(repr((greys.shape, [*map(float, heights)], float(spacing), said)).encode())
    digest.update(greys.tobytes())
    whole = digest.hexdigest()
    _, height, width = greys.shape
    with whole_folder(path) as aside:
        for k, (plane, z) in enumerate(zip(greys, heights, strict=True)):
            ds = Dataset()
            for name, value in _common(whole, said).items():
                setattr(ds, name, value)
            ds.SOPInstanceUID, ds.InstanceNumber = _uid(f"{whole}/slice {k}"), k + 1
            corner = -(width - 1) / 2 * spacing, -(height - 1) / 2 * spacing, z
            ds.ImagePositionPatient = [_decimal(v) for v in corner]
            ds.PixelSpacing, ds.SliceLocation = [_decimal(spacing)] * 2, _decimal(z)
            ds.SpacingBetweenSlices = ds.SliceThickness = _decimal((heights[-1] - heights[0]) / (len(heights) - 1))
            ds.Rows, ds.Columns = height, width
            ds.PixelData = plane.tobytes()
            ds["PixelData"].VR = "OW"
            meta = ds.file_meta = FileMetaDataset()
            meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, ds.SOPClassUID
            meta.MediaStorageSOPInstanceUID, meta.ImplementationClassUID = (
                ds.SOPInstanceUID,
                UID(_uid("implementation")),
            )
            meta.ImplementationVersionName = "SBLDM_FAST"
            ds.save_as(aside / f"{k:06d}.dcm", enforce_file_format=True)


def _common(whole: str, said: str) -> dict[str, Any]:
    """What every slice of a series says; nothing of a machine, a day or a person."""
    return {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY"],
        "SOPClassUID": SECONDARY_CAPTURE,
        **dict.fromkeys(("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"), ""),
        **dict.fromkeys(("PatientBirthDate", "PatientSex", "StudyID", "PositionReferenceIndicator"), ""),
        "Modality": "OT",
        "ConversionType": "SYN",
        "Manufacturer": "sbldm_fast",
        "StudyDescription": NOTICE,
        "SeriesDescription": NOTICE,
        "PatientName": "Synthetic",
        "PatientID": "SYNTHETIC",
        "StudyInstanceUID": _uid(f"{whole}/study"),
        "SeriesInstanceUID": _uid(f"{whole}/series"),
        "FrameOfReferenceUID": _uid(f"{whole}/frame"),
        "SeriesNumber": 1,
        "PatientOrientation": ["L", "P"],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImageComments": said,
        "BurnedInAnnotation": "NO",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": (GREYS + 1) // 2,
        "WindowWidth": GREYS + 1,
    }


def _uid(text: str) -> str:
    """A UID of the root for UUIDs, 2.25, which nobody owns; the same text has the same one."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'sbldm_fast/{text}').int}"


def _decimal(value: float) -> str:
    """A number in the 16 characters that DICOM gives it."""
    return f"{value + 0.0:.8g}"
