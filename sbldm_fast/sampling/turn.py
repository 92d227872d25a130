"""Whose turn it is to use what threads share."""

from __future__ import annotations

import threading

from ..errors import UserError


class Turn:
    """A lock for those who share buffers; who has it already is told so, instead of waiting for ever."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise UserError(
                "sampler: got a call from its own callback, model or decode, allowed is another sampler: this one is at"
                " work"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()  # a copy of a sampler has its own
