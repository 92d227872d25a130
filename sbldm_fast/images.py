"""Images to files that say what they are."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from sbldm_fast.files import whole_file

from .errors import MissingExtra

NOTICE = "synthetic, not for diagnosis"


def to_uint8(images: Tensor) -> np.ndarray:
    """`[N, 1, H, W]` in [-1, 1] to `[N, H, W]` uint8."""
    array: np.ndarray = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return array


def save_png(array: np.ndarray, path: str | Path) -> None:
    """Write one grey picture with the notice in its metadata."""
    save_picture(Image.fromarray(array), Path(path))


def save_grid(
    array: np.ndarray,
    path: str | Path,
    notice: str = NOTICE,
    columns: int | None = None,
    labels: Sequence[str] = (),
    marks: Sequence[str] = (),
) -> None:
    """Write `[N, H, W]` uint8 as one picture.

    Args:
        array: the tiles.
        path: the PNG file.
        notice: printed below the tiles, as far as it fits, and in the file's metadata.
        columns: tiles in a row; as square as N allows by default.
        labels: of each tile, the text in its upper left corner.
        marks: of each tile, the letter at the middle of its left side.
    """
    n, height, width = array.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = Image.new("L", (columns * width, rows * height + 14))
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(array):
        x, y = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(tile), (x, y))
        for texts, down in ((labels, 1), (marks, height // 2 - 5)):
            if texts:  # the font of Pillow may have no other letters
                text = texts[i].encode("ascii", "replace").decode()
                draw.text((x + 2, y + down), text, fill=255, stroke_width=1, stroke_fill=0)
    draw.text((3, rows * height + 1), notice, fill=200)
    save_picture(sheet, Path(path), notice)


def save_nifti(
    images: np.ndarray,
    path: str | Path,
    affine: np.ndarray | None = None,
    said: str = f"{NOTICE}; unrelated slices, no volume",
) -> None:
    """Write `[N, H, W]` float as NIfTI, float32 `[x, y, z]` in RAS, compressed where the name ends in `.gz`.

    Args:
        images: row 0 anterior, column 0 the patient's left.
        path: the file.
        affine: 4 x 4, from voxels to mm; by default pixels of 1 mm, the number of an image along the third axis.
        said: in the header's comment, and as far as 80 bytes go in `descrip`.

    Raises:
        ImportError: nibabel is missing (extra data).
    """
    try:
        import nibabel
    except ImportError:
        raise MissingExtra("writing NIfTI", "nibabel", "data") from None

    # rows run from anterior to posterior in a picture, from posterior to anterior in RAS
    array = images[:, ::-1].transpose(2, 1, 0).astype(np.float32)
    stack = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    stack.set_qform(stack.affine, "aligned")  # some programs read this form, some the other
    stack.header.set_xyzt_units("mm")
    stack.header["descrip"] = said.encode("ascii", "replace")[:80]
    stack.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", said.encode()))
    content = stack.to_bytes()
    with whole_file(path) as aside:
        aside.write_bytes(gzip.compress(content, mtime=0) if str(path).lower().endswith(".gz") else content)


def save_picture(image: Image.Image, path: Path, notice: str = NOTICE) -> None:
    """Write a picture as PNG with the notice in its metadata."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", notice)
    with whole_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)
