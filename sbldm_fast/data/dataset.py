"""The prepared slices, as training reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sbldm_fast.files import read_json

from ..errors import UserError
from .prepare import FORMAT, SPLITS
from .volumes import SIZE

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Slices:
    """One split of a prepared folder, mapped from its file, and `rows`, what the manifest says of each slice.

    `slices[index]` is `[n, 1, 128, 128]` float32 in [-1, 1] for an int64 `index` `[n]`.

    Raises:
        ValueError: no prepared folder or one of another version, an array that does not match its manifest by shape or
            checksums, or an empty split.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise UserError(f"split: got {split!r}, allowed are {', '.join(SPLITS)}")
        folder = Path(folder)
        rows = read_manifest(folder)["slices"]
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
        if array.shape != (len(rows), SIZE, SIZE) or array.dtype != np.float16:
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

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.array[self.index[index]][:, None].float()

    def to(self, device: torch.device) -> Self:
        """The same split held in the memory of `device`; on a CPU it stays in its file."""
        if device.type != "cpu":
            self.array, self.index = self.array[self.index].to(device), torch.arange(len(self), device=device)
        return self


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
