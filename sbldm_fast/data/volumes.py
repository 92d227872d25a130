"""One scan, in RAS order, to axial slices of 128 x 128 square pixels in [-1, 1]."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 128
FIELD_OF_VIEW = 220.0  # mm: an adult head is about 200 long
FOREGROUND = -0.8  # intensities above this count as head
MIN_FOREGROUND = 0.10


@dataclass(frozen=True)
class Volume:
    """A scan: `array[x, y, z]` with x to the right, y to the front, z upwards (RAS), `zooms` in mm, `origin_z` of slice 0 in mm."""

    array: np.ndarray
    zooms: tuple[float, float, float]
    origin_z: float


class Unusable(ValueError):
    """A scan that cannot be used; the text says why."""


def load_nifti(path: Path, volume: int | None = None) -> Volume:
    """Read a NIfTI file, scaled by its slope and intercept and turned to RAS by its affine.

    Raises:
        Unusable: missing, truncated, not a NIfTI, 4-D without `volume`, not finite, constant, or a label map.
    """
    try:
        import nibabel as nib
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ImportError:
        raise ValueError("reading NIfTI needs nibabel: pip install 'sbldm_fast[data]'") from None

    if not path.exists():
        raise Unusable("no such file")
    try:
        image = nib.Nifti1Image.from_filename(path)
        if len(image.shape) == 4 and (volume is not None or image.shape[3] == 1):
            index = volume or 0
            if index >= image.shape[3]:
                raise Unusable(f"volume {index} asked for, the file has {image.shape[3]}")
            image = image.slicer[..., index]
        if len(image.shape) != 3:
            raise Unusable(f"shape {image.shape}: one 3-D volume is needed, pick one of a 4-D file with --volume")
        image = nib.as_closest_canonical(image)
        array = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"not a readable NIfTI file ({error})") from None
    if not np.isfinite(array).all():
        raise Unusable(f"{np.count_nonzero(~np.isfinite(array))} voxels are NaN or infinite")
    if array.min() == array.max():
        raise Unusable("every voxel has the same value")
    if len(np.unique(array[::4, ::4])) <= 10:
        raise Unusable("a label map, not a scan: at most 10 distinct values")
    zooms = image.header.get_zooms()[:3]
    return Volume(array, (float(zooms[0]), float(zooms[1]), float(zooms[2])), float(image.affine[2, 3]))


def robust_range(array: np.ndarray) -> tuple[float, float]:
    """The intensities to map to -1 and 1: the background's level and the 98th percentile of the head."""
    low, top = (float(v) for v in np.percentile(array, (0.5, 99.5)))
    head = array[array > low + 0.1 * (top - low)]
    high = float(np.percentile(head, 98)) if head.size else top
    return low, max(high, low + 1e-6)


def axial_slices(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The slices that hold enough head, and their positions in mm.

    Row 0 is anterior, column 0 is the patient's left (RAS order seen from above: not mirrored). The field of view is
    centred on the head and the same in mm along rows and columns, so pixels are square whatever the scan's were.

    Returns:
        `[N, 128, 128]` float32 in [-1, 1] and `[N]` float64.
    """
    low, high = robust_range(volume.array)
    # [z, y, x] with y turned so that the front is up
    images = (2 * (volume.array - low) / (high - low) - 1).clip(-1, 1).transpose(2, 1, 0)[:, ::-1]
    head: np.ndarray = images > FOREGROUND
    rows = _window(np.any(head, axis=(0, 2)), volume.zooms[1])
    columns = _window(np.any(head, axis=(0, 1)), volume.zooms[0])
    padded = np.pad(images, ((0, 0), rows[1], columns[1]), constant_values=-1.0)[:, rows[0], columns[0]]
    square = F.interpolate(torch.from_numpy(np.ascontiguousarray(padded))[:, None], size=(SIZE, SIZE), mode="bicubic", antialias=True)
    slices = square[:, 0].clamp(-1, 1).numpy()
    keep = (slices > FOREGROUND).mean(axis=(1, 2)) >= MIN_FOREGROUND
    positions = volume.origin_z + volume.zooms[2] * np.arange(len(slices))
    return slices[keep], positions[keep]


def _window(head: np.ndarray, zoom: float) -> tuple[slice, tuple[int, int]]:
    """Where FIELD_OF_VIEW mm around the middle of the head lie along one axis, and the padding that this needs."""
    inside = np.flatnonzero(head)
    if not inside.size:
        raise Unusable("no voxel stands out from the background")
    length = round(FIELD_OF_VIEW / zoom)
    start = round((inside[0] + inside[-1] + 1 - length) / 2)
    before, after = max(0, -start), max(0, start + length - len(head))
    return slice(start + before, start + before + length), (before, after)
