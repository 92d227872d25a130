"""The prepared slices, as training reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.files import read_json

from .prepare import SPLITS
from .volumes import SIZE


class Slices:
    """One split of a prepared folder: `images`, `[N, 1, 128, 128]` float16 in [-1, 1], and `rows` of the manifest.

    Raises:
        ValueError: no prepared folder, an array that does not match its manifest, or an empty split.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, allowed are {', '.join(SPLITS)}")
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json")
        try:
            array = np.load(folder / "slices.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / 'slices.npy'} is not readable: {error}") from None
        if array.shape != (len(manifest["slices"]), SIZE, SIZE):
            raise ValueError(f"{folder}: slices.npy has shape {array.shape}, the manifest lists {len(manifest['slices'])} slices")
        index = [i for i, row in enumerate(manifest["slices"]) if row["split"] == split]
        if not index:
            raise ValueError(f"{folder}: the {split} split is empty ({manifest['subjects']} subjects in all)")
        self.rows = [manifest["slices"][i] for i in index]
        self.images: Tensor = torch.from_numpy(np.ascontiguousarray(array[index]))[:, None]

    def __len__(self) -> int:
        return len(self.images)
