"""TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


class Board:
    """Scalars and image grids of a run; without tensorboard (`pip install 'sbldm_fast[train]'`) it writes nothing."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer: Any = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)  # rows beyond a checkpoint are made again

    def scalars(self, stage: str, row: dict[str, Any], step: int) -> None:
        """Numbers under `stage/name`."""
        if self.writer:
            for key, value in row.items():
                self.writer.add_scalar(f"{stage}/{key}", value, step)

    def images(self, stage: str, grids: dict[str, Tensor], step: int) -> None:
        """Images `[N, 1, H, W]` in [-1, 1], side by side."""
        if self.writer:
            for key, images in grids.items():
                row = ((images[:, 0].float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 0, 2).flatten(1)
                self.writer.add_image(f"{stage}/{key}, not for diagnosis", row[None], step)

    def close(self) -> None:
        """Write what is left."""
        if self.writer:
            self.writer.close()
