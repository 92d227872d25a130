"""One scan, turned to RAS by its affine, to axial slices of square pixels in [-1, 1]."""

from __future__ import annotations

import gzip
import logging
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import MissingExtra, UserError
from .frame import FRAME, Frame

FOREGROUND = -0.8  # intensities above this count as head
MAX_TILT = 20.0  # degrees: up to this the planes that were acquired are what a radiologist calls axial
MAX_PIXEL = 4.0  # mm: a thick sagittal or coronal stack makes axial stripes
# a whole head that is straightened takes 5 times its voxels at most, at any angle and voxel size; a thin slab more
MAX_GROWTH = 8
MAX_REACH = 10_000.0  # mm from the origin: no scanner is longer
CHUNK = 2**23  # voxels at a time: the memory that slicing takes beside the scan
SAMPLES = 2**24  # voxels that intensities are judged by
DEFLATE = 1032  # how much a compressed file grows at most
SLACK = 2**26  # bytes of extensions and padding beside the voxels of a compressed file
READERS = ("pydicom", "nibabel", "PIL")
_reading = threading.RLock()


class Unusable(UserError):
    """A scan that cannot be used; the text says why."""


@contextmanager
def silent() -> Iterator[None]:
    """What the readers warn of or log stays unsaid: it quotes headers. One thread reads at a time, as both are settings
    of the process."""
    with _reading, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in READERS]
        loggers = [logging.getLogger(name) for name in {*READERS, *known}]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass(frozen=True)
class Volume:
    """A scan: `array[x, y, z]` with x to the right, y to the front, z upwards (RAS), `zooms` in mm.

    The middle of slice k is at the height `origin_z + k * rise`, mm. `straighten`, where a scan is too oblique to be
    turned by its axes: 4 x 4, from voxels of a straight grid of `shape` to those of `array`. `tilt`: degrees between
    the slices and the axial plane.
    """

    array: np.ndarray
    zooms: tuple[float, float, float]
    origin_z: float
    rise: float
    shape: tuple[int, int, int]
    straighten: np.ndarray | None = None
    tilt: float = 0.0

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """The scan from bottom to top, float32 `[x, y, depth]` at a time, each with its first slice's number."""
        depth = max(1, CHUNK // (self.shape[0] * self.shape[1]))
        for start in range(0, self.shape[2], depth):
            stop = min(start + depth, self.shape[2])
            if self.straighten is None:
                yield start, self.array[..., start:stop].astype(np.float32)
            else:
                from scipy.ndimage import affine_transform

                offset = self.straighten[:3] @ [0, 0, start, 1]
                yield (
                    start,
                    affine_transform(
                        self.array,
                        self.straighten[:3, :3],
                        offset,
                        (*self.shape[:2], stop - start),
                        np.float32,
                        order=1,
                        cval=self._air,
                    ),
                )

    @cached_property
    def _air(self) -> float:
        return float(self.array.min())


@silent()
def load_nifti(path: Path, volume: int | None = None) -> Volume:
    """Read a NIfTI file or pair, scaled by its slope and intercept and turned to RAS by its affine.

    Raises:
        Unusable: missing, truncated, damaged (a compressed file is read to its checksum), not NIfTI, without an
            orientation or with two, 4-D without `volume`, not finite, constant, a label map, not numbers, or a header
            that promises what the file does not hold.
    """
    try:
        import nibabel as nib
    except ImportError:
        raise MissingExtra("reading NIfTI", "nibabel", "data") from None

    if not path.is_file():
        raise Unusable("no such file, or a link that leads nowhere")
    try:
        _measure_extensions(path)
        image = nib.load(path)
        _check_orientation(image)
        _check_voxels(image, volume)
        _check_size(path, image)
        array = _read_voxels(image, volume)
        unit = {1: 1000.0, 3: 1e-3}.get(int(image.header["xyzt_units"]) & 7, 1.0)  # metres, micrometres; else mm
        affine = np.diag([unit, unit, unit, 1.0]) @ image.affine
    except Unusable:
        raise
    except Exception as error:  # nibabel, gzip and zlib meet a broken file with any; its text may quote the header
        raise Unusable(
            f"not a readable NIfTI file ({getattr(error, 'strerror', None) or type(error).__name__})"
        ) from None
    return orient(array, affine)


def _check_orientation(image: Any) -> None:
    """Refuse an image that says no orientation, or two."""
    import nibabel as nib

    if not isinstance(image, nib.Nifti1Pair):
        raise Unusable(f"a {type(image).__name__}, which does not say its orientation; allowed is NIfTI")
    header = image.header
    if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        raise Unusable("the header does not say the orientation: qform_code and sform_code are 0")
    affines = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    axes = ["".join(map(str, nib.aff2axcodes(affine))) for affine in affines if affine is not None]
    if len(set(axes)) == 2:
        raise Unusable(f"the header says two orientations: sform {axes[0]}, qform {axes[1]}")


def _check_voxels(image: Any, volume: int | None) -> None:
    """Refuse voxels that are not numbers, and a shape that is not one volume."""
    shape, dtype = image.shape, image.header.get_data_dtype()
    if min(shape, default=0) < 1:
        raise Unusable(f"shape {shape}: nothing in it")
    if len(shape) == 4 and (volume is not None or shape[3] == 1):
        if (volume or 0) >= shape[3]:
            raise Unusable(f"volume {volume} asked for, the file has {shape[3]}")
    elif len(shape) != 3:
        raise Unusable(f"shape {shape}: one 3-D volume is needed, pick one of a 4-D file with --volume")
    if dtype.kind not in "iuf":
        raise Unusable(f"voxels are {dtype}, allowed are whole and floating-point numbers")


def _check_size(path: Path, image: Any) -> None:
    """Refuse a header that promises more voxels than the file can hold, and a compressed file that is damaged."""
    promised = math.prod(image.shape) * image.header.get_data_dtype().itemsize
    data = Path(image.file_map["image"].filename)
    size = data.stat().st_size
    if promised > size * (DEFLATE if data.suffix.lower() == ".gz" else 1):
        raise Unusable(f"the header promises {promised} bytes of voxels, the file has {size}")
    for file in {path, data}:
        if file.suffix.lower() == ".gz":
            _read_to_end(file, promised + SLACK)


def _read_voxels(image: Any, volume: int | None) -> np.ndarray:
    proxy = image.dataobj
    if len(image.shape) == 4:
        return np.asarray(proxy[..., volume or 0])  # of a long series only this one is read
    if proxy.slope == 1 and proxy.inter == 0:
        return np.asanyarray(proxy)  # as it is stored: a quarter of float64, which nibabel would make of it
    return np.asarray(proxy, dtype=np.float32)


def _measure_extensions(path: Path) -> None:
    """nibabel takes the memory that an extension of the header promises before it looks whether the file has it."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as f:
        first = f.read(4)
        order = next((o for o in "<>" if len(first) == 4 and struct.unpack(f"{o}i", first)[0] in (348, 540)), "")
        if not order:  # no NIfTI: nibabel says so
            return
        at = struct.unpack(f"{order}i", first)[0] + 4
        header = first + f.read(at - 4)
        if len(header) < at or not header[-4]:
            return
        end = int(
            struct.unpack_from(f"{order}f", header, 108)[0]
            if at == 352
            else struct.unpack_from(f"{order}q", header, 168)[0]
        )
        # a pair has them to the end of the .hdr; no header leads beyond the file
        most = path.stat().st_size * (DEFLATE if path.suffix.lower() == ".gz" else 1)
        end = min(end or path.stat().st_size, most)
        while at + 16 <= end and len(size := f.read(4)) == 4:
            length = struct.unpack(f"{order}i", size)[0]
            if not 16 <= length <= end - at:
                raise Unusable(f"an extension of the header promises {length} bytes, where there are {end - at}")
            at += length
            f.seek(at)


def _read_to_end(path: Path, most: int) -> None:
    """Its checksum, which ends a compressed file and which nibabel, having the voxels, does not reach."""
    with gzip.open(path) as f:
        for _ in range(0, most, 2**20):
            try:
                if not f.read(2**20):
                    return
            except (OSError, EOFError, zlib.error):
                raise Unusable(
                    "not a readable NIfTI file: damaged or cut off, it does not match its checksum"
                ) from None
    raise Unusable(
        f"the compressed file goes on long after the {most - SLACK} bytes of voxels that the header promises"
    )


def orient(array: np.ndarray, affine: np.ndarray) -> Volume:
    """The scan `[i, j, k]` whose voxels `affine` takes to mm in RAS; only a scan that is tilted by more than 20 degrees
    is resampled.

    Raises:
        Unusable: a singular affine, one that leads more than 10 m away or that straightens to more than 8 times the
            voxels, voxels that are not finite, all alike or a label map, or pixels too few or too large.
    """
    from nibabel.affines import obliquity, voxel_sizes
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
    from nibabel.spaces import vox2out_vox

    if (
        not np.isfinite(affine).all()
        or min(voxel_sizes(affine)) < 1e-3
        or abs(np.linalg.det(affine[:3, :3] / voxel_sizes(affine))) < 0.1
    ):
        raise Unusable("the affine is singular: it does not say where the voxels are")
    if (np.abs(affine[:3]) @ [*array.shape, 1]).max() > MAX_REACH:
        raise Unusable(f"voxels lie further from the origin than {MAX_REACH / 1000:.0f} m")
    orientation = io_orientation(affine)
    affine = affine @ inv_ornt_aff(orientation, array.shape)
    array = apply_orientation(array, orientation)
    turn, shape = None, array.shape
    axes = affine[:3, :3] / voxel_sizes(affine)
    sheared = np.abs(axes.T @ axes - np.eye(3)).max() > 0.02
    if math.degrees(max(obliquity(affine))) > MAX_TILT or sheared:
        shape, straight = vox2out_vox((array.shape, affine), voxel_sizes(affine))
        if math.prod(map(int, shape)) > MAX_GROWTH * array.size:
            raise Unusable(
                f"so oblique or sheared that its straight grid has more than {MAX_GROWTH} times its voxels: a slab, or"
                " wrong voxel sizes"
            )
        turn, affine = np.linalg.inv(affine) @ straight, straight
    zooms = voxel_sizes(affine)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    tilt = math.degrees(math.acos(min(1.0, abs(normal[2]) / float(np.linalg.norm(normal)))))
    if min(shape[:2]) < 16 or max(zooms[:2]) > MAX_PIXEL:
        raise Unusable(
            f"axial slices would have {shape[0]} x {shape[1]} pixels of {zooms[0]:.1f} x {zooms[1]:.1f} mm; "
            f"allowed are 16 x 16 or more of at most {MAX_PIXEL:.0f} mm"
        )
    # the height of a tilted slice is that of its middle
    z = float((affine @ [(shape[0] - 1) / 2, (shape[1] - 1) / 2, 0, 1])[2])
    mm = float(zooms[0]), float(zooms[1]), float(zooms[2])
    scan = Volume(array, mm, z, float(affine[2, 2]), (int(shape[0]), int(shape[1]), int(shape[2])), turn, tilt)
    bad = sum(np.count_nonzero(~np.isfinite(slab)) for _, slab in scan.slabs())
    if bad:
        raise Unusable(f"{bad} voxels are NaN or infinite")
    values = _sample(scan)
    if values.min() == values.max():
        raise Unusable("every voxel has the same value")
    if len(np.unique(values)) <= 10:
        raise Unusable("a label map, not a scan: at most 10 distinct values")
    return scan


def _sample(volume: Volume) -> np.ndarray:
    """Every voxel, or of a large scan evenly spread ones."""
    every = math.ceil((math.prod(volume.shape) / SAMPLES) ** (1 / 3))
    return np.concatenate([slab[::every, ::every, -start % every :: every].ravel() for start, slab in volume.slabs()])


def robust_range(array: np.ndarray) -> tuple[float, float]:
    """The intensities to map to -1 and 1: the background's level and the 98th percentile of the head."""
    low, top = (float(v) for v in np.percentile(array, (0.5, 99.5)))
    head = array[array > low + 0.1 * (top - low)]
    high = float(np.percentile(head, 98)) if head.size else top
    return low, max(high, low + 1e-6)


def axial_slices(volume: Volume, frame: Frame = FRAME) -> tuple[np.ndarray, np.ndarray]:
    """The slices that hold enough head, and their positions in mm; see `axial_slices_with`."""
    slices, positions, _ = axial_slices_with(volume, None, frame)
    return slices, positions


def whole_volume(volume: Volume, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """As `axial_slices`, and what lies between the lowest and the highest of these slices.

    Raises:
        Unusable: as there, or an empty slice between others.
    """
    slices, positions, _ = axial_slices_with(volume, None, frame, least=0.0)
    head = (slices > FOREGROUND).mean(axis=(1, 2))
    inside = np.flatnonzero(head >= frame.enough)
    between = slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)
    if empty := np.count_nonzero(head[between] == 0):
        raise Unusable(f"a gap: {empty} of {len(head[between])} slices between the lowest and the highest are empty")
    return slices[between], positions[between]


def axial_slices_with(
    volume: Volume, labels: np.ndarray | None, frame: Frame = FRAME, least: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The slices that hold enough head (`least`: as a part of their pixels), their positions in mm, and a map of labels
    `[x, y, z]` cut in the same way.

    Row 0 is anterior, column 0 is the patient's left (RAS order seen from above: not mirrored). The frame's field of
    view is centred on the head, to half a voxel, so pixels are square whatever the scan's were.

    Returns:
        `[N, H, W]` float32 in [-1, 1], `[N]` float64, and `[N, H, W]` float32 in [0, 1] of labels in [0, 1].

    Raises:
        Unusable: nothing stands out from the background, or what does is no head by its size.
    """
    low, high = robust_range(_sample(volume))

    def images() -> Iterator[tuple[int, np.ndarray]]:
        # [z, y, x] with y turned so that the front is up
        for start, slab in volume.slabs():
            yield start, (2 * (slab - low) / (high - low) - 1).clip(-1, 1).transpose(2, 1, 0)[:, ::-1]

    inside = [np.zeros(n, np.int64) for n in (volume.shape[1], volume.shape[0])]
    for _, image in images():
        head = image > FOREGROUND
        for axis, across in enumerate(((0, 2), (0, 1))):
            inside[axis] += np.count_nonzero(head, axis=across)
    rows, columns = (
        _window(head > 0.01 * head.max(), zoom, field)
        for head, zoom, field in zip(inside, volume.zooms[1::-1], frame.field, strict=True)
    )

    def cut(image: np.ndarray, air: float) -> np.ndarray:
        padded = np.pad(image, ((0, 0), rows[1], columns[1]), constant_values=air)[:, rows[0], columns[0]]
        square = F.interpolate(
            torch.from_numpy(np.ascontiguousarray(padded))[:, None], frame.size, mode="bicubic", antialias=True
        )
        done: np.ndarray = square[:, 0].clamp(air, 1).numpy()
        return done

    slices, positions, maps = [], [], []
    for start, image in images():
        done = cut(image, -1.0)
        keep = (done > FOREGROUND).mean(axis=(1, 2)) >= (frame.enough if least is None else least)
        slices.append(done[keep])
        positions.append(volume.origin_z + volume.rise * (start + np.flatnonzero(keep)))
        if labels is not None:
            beside = labels[..., start : start + len(image)].transpose(2, 1, 0)[:, ::-1]
            maps.append(cut(beside, 0.0)[keep])
    return np.concatenate(slices), np.concatenate(positions), np.concatenate(maps) if maps else None


def _window(head: np.ndarray, zoom: float, field: float) -> tuple[slice, tuple[int, int]]:
    """Where `field` mm around the middle of the head (places that hold more than a speck) lie along an axis, and the
    padding."""
    inside = np.flatnonzero(head)
    if not inside.size:
        raise Unusable("no voxel stands out from the background")
    extent = (inside[-1] + 1 - inside[0]) * zoom
    if extent < 40:
        raise Unusable(f"what stands out measures {extent:.0f} mm: no head, or wrong voxel sizes")
    length = round(field / zoom)
    start = round((inside[0] + inside[-1] + 1 - length) / 2)
    before, after = max(0, -start), max(0, start + length - len(head))
    return slice(start + before, start + before + length), (before, after)
