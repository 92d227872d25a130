"""What to say when a batch does not fit into memory: the one that does, found by trying."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .request import Batch


class _Enough(Exception):
    """A step ran."""


def find_what_fits(
    clear: Callable[[], Any],
    run: Callable[[Batch, Callable[[int, float, Tensor], None]], Any],
    decode: Callable[[Tensor], Tensor] | None,
    batch: Batch,
) -> str:
    """The largest half, quarter, ... of a batch whose first step and decoding run when tried now, one after another."""
    total = n = len(batch.x)
    while n > 1:
        n //= 2
        clear()
        try:
            try:
                run(batch.first(n), _first_only)
            except _Enough:
                if decode is not None:
                    with torch.no_grad():
                        decode(batch.x[:n])
                return (
                    f"n: {total} at a time do not fit into memory; {n} do, a step of them ran just now: give a batch"
                    f" size of {n}"
                )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
    return f"n: {total} at a time do not fit into memory, nor does a single one, which was tried just now"


def _first_only(i: int, t: float, x: Tensor) -> None:
    raise _Enough


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is full; a CPU's allocator has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
