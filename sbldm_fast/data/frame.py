"""What every slice shows: how many pixels of how many millimetres, around the middle of the head."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from ..errors import UserError

SIZE = 128
FIELD_OF_VIEW = 220.0  # mm: an adult head is about 200 long
SIDES = 16, 1024  # pixels
FIELDS = 100.0, 500.0  # mm: less would cut off most of a head
ENOUGH = 0.10 * FIELD_OF_VIEW**2  # mm^2 of head: a slice of less is none of a brain, whatever its size


@dataclass(frozen=True)
class Frame:
    """`height` x `width` pixels of `spacing` mm.

    Raises:
        UserError: sides or a field of view that are too small or too large.
    """

    height: int = SIZE
    width: int = SIZE
    spacing: float = FIELD_OF_VIEW / SIZE

    def __post_init__(self) -> None:
        least, most = SIDES
        if not all(least <= side <= most for side in self.size):
            raise UserError(f"size: got {self.width} x {self.height} pixels, allowed are {least} to {most} a side")
        low, high = FIELDS
        if not all(low <= side <= high for side in self.field):
            across, down = (f"{side:.0f}" for side in reversed(self.field))
            fits = low / min(self.size), high / max(self.size)
            allowed = f"{fits[0]:.3g} to {fits[1]:.3g} mm of this size" if fits[0] <= fits[1] else "none of this size"
            raise UserError(
                f"spacing: got {self.spacing:g} mm a pixel, which shows {across} x {down} mm; allowed is {low:.0f} to"
                f" {high:.0f} mm a side, {allowed}"
            )

    @classmethod
    def of(cls, size: str | None, spacing: float | None) -> Self:
        """The frame of `--size 160x224` (width by height, or one side of a square) and `--spacing 1.0`; without a
        spacing 220 mm lie along the smaller side.

        Raises:
            UserError: no such size, and as the class.
        """
        width, height = (SIZE, SIZE) if size is None else _sides(size)
        return cls(height, width, FIELD_OF_VIEW / max(1, min(height, width)) if spacing is None else spacing)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def field(self) -> tuple[float, float]:
        """Height and width in mm."""
        return self.height * self.spacing, self.width * self.spacing

    @property
    def enough(self) -> float:
        """The part of the pixels that must show head in a slice that is kept."""
        return ENOUGH / math.prod(self.field)


FRAME = Frame()  # that of the bundled weights


def _sides(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", size.strip(), re.ASCII)
    if found is None:
        raise UserError(f"size: got {size!r:.100}, allowed is WIDTHxHEIGHT in pixels, such as 160x224, or one side")
    width, height = found.groups()
    return int(width), int(height or width)
