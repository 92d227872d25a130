"""Images to files that say what they are."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from sbldm_fast.files import whole_file

NOTICE = "synthetic, not for diagnosis"


def to_uint8(images: Tensor) -> np.ndarray:
    """`[N, 1, H, W]` in [-1, 1] to `[N, H, W]` uint8."""
    array: np.ndarray = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return array


def save_png(array: np.ndarray, path: str | Path) -> None:
    """Write one grey picture with the notice in its metadata."""
    _write(Image.fromarray(array), Path(path))


def save_grid(array: np.ndarray, path: str | Path, notice: str = NOTICE, columns: int | None = None) -> None:
    """Write `[N, H, W]` uint8 as one picture, as square as N allows or of `columns`, with the notice printed below
    it."""
    n, height, width = array.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = Image.new("L", (columns * width, rows * height + 14))
    for i, tile in enumerate(array):
        sheet.paste(Image.fromarray(tile), (i % columns * width, i // columns * height))
    ImageDraw.Draw(sheet).text((3, rows * height + 1), notice, fill=200)
    _write(sheet, Path(path), notice)


def save_nifti(images: np.ndarray, path: str | Path) -> None:
    """Write `[N, H, W]` float as a NIfTI stack in RAS, pixels of 1 mm, sample number along the third axis."""
    import nibabel

    # rows run from anterior to posterior in a picture, from posterior to anterior in RAS
    stack = nibabel.Nifti1Image(images[:, ::-1].transpose(2, 1, 0).astype(np.float32), np.eye(4))
    stack.header["descrip"] = NOTICE.encode()
    with whole_file(path) as aside:
        aside.write_bytes(gzip.compress(stack.to_bytes(), mtime=0))


def _write(image: Image.Image, path: Path, notice: str = NOTICE) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", notice)
    with whole_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)
