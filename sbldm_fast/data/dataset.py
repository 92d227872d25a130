"""The prepared slices, as training reads them."""

from __future__ import annotations

import hashlib
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sbldm_fast.files import read_json

from ..errors import UserError
from .frame import FRAME, SIDES
from .prepare import FORMAT, SPLITS

SAME = 0.01  # mm by which distances differ that are one: positions are written to a thousandth
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Slices:
    """One split of a prepared folder, mapped from its file, and `rows`, what the manifest says of each slice.

    `slices[index]` is `[n, 1, H, W]` float32 in [-1, 1] for an int64 `index` `[n]`. `size` is `(H, W)`, `spacing` the
    side of a pixel in mm, 0 where it is unknown.

    Raises:
        ValueError: no prepared folder or one of another version, an array that does not match its manifest by shape or
            checksums, or an empty split.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}, allowed are {', '.join(SPLITS)}")
        folder = Path(folder)
        manifest = read_manifest(folder)
        rows, self.size, self.spacing = manifest["slices"], _size(manifest), _spacing(manifest)
        path = folder / "slices.npy"
        if not path.is_file():
            raise UserError(f"{path} does not exist, or is no file")
        with path.open("rb") as f:
            # later versions promise headers of gigabytes, which numpy takes memory for
            if f.read(8) != b"\x93NUMPY\x01\x00":
                raise UserError(f"{path} is not readable as a .npy file (header); run prepare again")
        try:
            # copy on write: torch wants memory that it may write to, the file stays as it is
            array = npy.open_memmap(path, mode="c")
        except Exception as error:  # numpy meets a broken header with any
            raise UserError(
                f"{path} is not readable as a .npy file ({type(error).__name__}); run prepare again"
            ) from None
        if array.shape != (len(rows), *self.size) or array.dtype != np.float16:
            raise UserError(
                f"{folder}: slices.npy has {array.dtype} of shape {array.shape}, the manifest lists {len(rows)} slices"
            )
        for i, row in enumerate(rows):
            if hashlib.sha256(array[i].tobytes()).hexdigest() != row.get("sha256"):
                raise UserError(
                    f"{folder}: slice {i} is not the one that the manifest lists (its checksum differs); run prepare"
                    " again"
                )
            if not np.abs(array[i]).max() <= 1:  # nor NaN
                raise UserError(f"{folder}: slice {i} holds values that are not in -1 to 1; run prepare again")
        index = [i for i, row in enumerate(rows) if row["split"] == split]
        if not index:
            raise UserError(
                f"{folder}: the {split} split is empty ({len({row['subject'] for row in rows})} subjects in all)"
            )
        self.rows: list[dict[str, Any]] = [rows[i] for i in index]
        self.array: Tensor = torch.from_numpy(array)
        self.index = torch.tensor(index)

    @property
    def volumes(self) -> list[Tensor]:
        """The slices of each volume of the split from the bottom up, as int64 indices `[D]` of it, on the CPU.

        Of a folder that was prepared without `volumes` they are the runs of consecutive slices of one scan that are
        equally far from one another: a gap ends a run, and one slice is none.

        Raises:
            ValueError: a volume whose slices are not one after another, from the bottom up at one distance.
        """
        if "volume" not in self.rows[0]:
            return [torch.tensor(run) for run in _runs(self.rows)]
        found = []
        for number, places in groupby(range(len(self.rows)), lambda i: self.rows[i].get("volume")):
            index = list(places)
            _check_volume(number, [self.rows[i] for i in index])
            found.append(torch.tensor(index))
        if len({self.rows[int(index[0])]["volume"] for index in found}) < len(found):
            raise UserError("volumes: the slices of one are not one after another in the manifest; run prepare again")
        return found

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.array[self.index[index]][:, None].float()

    def to(self, device: torch.device) -> Self:
        """The same split held in the memory of `device`; on a CPU it stays in its file."""
        if device.type != "cpu":
            self.array, self.index = self.array[self.index].to(device), torch.arange(len(self), device=device)
        return self


def _size(manifest: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels; an earlier prepare, which does not say them, made squares."""
    height, width = manifest.get("size", FRAME.size)
    return int(height), int(width)


def _spacing(manifest: dict[str, Any]) -> float:
    return float(manifest.get("spacing", FRAME.spacing))


def _runs(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The places of equally distant slices: of each scan its rising positions, cut where they are further apart than
    the nearest."""
    scans: list[list[int]] = [[]]
    for i, row in enumerate(rows):
        before = rows[i - 1] if scans[-1] else row
        same = all(row.get(k) == before.get(k) for k in ("subject", "source", "modality"))
        if scans[-1] and not (same and _rise(before, row) > SAME):
            scans.append([])
        scans[-1].append(i)
    runs = []
    for scan in scans:
        least = min((_rise(rows[i], rows[k]) for i, k in pairwise(scan)), default=0.0)
        run = scan[:1]
        for i, k in pairwise(scan):
            if _rise(rows[i], rows[k]) - least > SAME:
                runs.append(run)
                run = []
            run.append(k)
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def _rise(lower: dict[str, Any], upper: dict[str, Any]) -> float:
    """mm from one slice up to another; NaN of what has no position."""
    a, b = lower.get("position_mm"), upper.get("position_mm")
    return float(b) - float(a) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else float("nan")


def _check_volume(number: object, rows: list[dict[str, Any]]) -> None:
    """Refuse, as `UserError`, slices that are no volume."""
    distance = rows[0].get("distance_mm")
    alike = type(number) is int and all(row.get("distance_mm") == distance for row in rows)
    if not alike or not isinstance(distance, (int, float)) or not distance > 0:
        raise UserError(f"volume {number!r:.20}: distance_mm is allowed to be one number above 0; run prepare again")
    if len(rows) < 2:
        raise UserError(f"volume {number!r:.20}: got one slice, allowed are two or more; run prepare again")
    rises = [_rise(lower, upper) for lower, upper in pairwise(rows)]
    if odd := [rise for rise in rises if not abs(rise - distance) <= SAME]:
        what = "a gap" if odd[0] > distance else "slices out of order, or of another distance"
        raise UserError(
            f"volume {number!r:.20}: got {what}, {odd[0]:g} mm to the next slice, allowed is {distance:g}; run prepare"
            " again"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: it is missing, unreadable, empty or of another version.
    """
    path = Path(folder) / "manifest.json"
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')!r:.100}, allowed is {FORMAT}; run prepare again")
    rows = manifest.get("slices")
    named = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("split", "subject")) for row in rows
    )
    if not rows or not named:
        raise UserError(f"{path} lists no slices")
    size, spacing = manifest.get("size", [*FRAME.size]), manifest.get("spacing", 0)
    whole = (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and SIDES[0] <= n <= SIDES[1] for n in size)
    )
    if not whole or type(spacing) not in (int, float) or not 0 <= spacing <= 100:
        raise UserError(f"{path}: size and spacing are no pixels and mm; run prepare again")
    if not _told(manifest.get("covariates", {})):
        raise UserError(f"{path}: covariates is no description of covariates; run prepare again")
    for i, row in enumerate(rows):
        known, modality = row.get("covariates", {}), row.get("modality", "unknown")
        if not (isinstance(known, dict) and all(map(_known, known.values())) and isinstance(modality, str)):
            raise UserError(
                f"{path}: slice {i} has covariates or a modality that are no texts or finite numbers; run prepare again"
            )
    return manifest


def _told(described: object) -> bool:
    return isinstance(described, dict) and all(isinstance(one, dict) for one in described.values())


def _known(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
    return isinstance(value, str) or number
