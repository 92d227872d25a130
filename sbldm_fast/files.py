"""Files that are whole or not there: written aside, synced, renamed.

What is written aside lies in a folder `.NAME.NUMBER.part`, which its process locks. A lock ends with its process,
however that ends: so the next one that writes NAME clears what a dead one left, and passes over what a living one
writes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

LEFT = r"\.({})\.(\d+|[a-z0-9_]{{8}})\.(old|part)"
PLACES = 4  # that are looked at for what dead processes left: as many as write one path at a time


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well and is gone when it does not."""
    path = Path(os.path.realpath(path))  # a link stays one
    with _place(path) as place:
        yield place / path.name
        _sync(place / path.name)
        (place / path.name).replace(path)
        _sync(path.parent)


@contextmanager
def whole_folder(path: str | Path, lose: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends well and is gone when it does not.

    Raises:
        ValueError: `path` is a file, or holds something that the new folder does not and that must not be lost
            (`lose`).
    """
    with suppress(OSError):  # not there
        if not stat.S_ISDIR(Path(path).stat().st_mode):
            raise UserError(f"{path} is a file, allowed is a folder")
    path = Path(os.path.realpath(path))
    with _place(path) as place:
        yield place
        for file in place.rglob("*"):
            _sync(file)
        with suppress(FileNotFoundError):
            if (lost := sorted(_files(path) - _files(place))) and not lose:
                raise UserError(
                    f"{path} holds {lost[0]}, which would be lost; allowed is a new folder or one that this command"
                    " wrote"
                )
        _put(place, path)


def _files(folder: Path) -> set[str]:
    """All that is not a folder, below it, and folders with nothing in them."""
    return {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_symlink() or not p.is_dir() or not any(p.iterdir())
    }


def _put(place: Path, path: Path) -> None:
    """Rename `place` to `path`; what was there goes."""
    old = place.with_suffix(".old")
    while True:
        try:
            with suppress(FileNotFoundError):
                path.rename(old)
            place.rename(path)
            break
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                _remove(old)  # another process put its own there in this moment: that one is replaced, too
                if old.exists():
                    raise OSError(error.errno, "what an earlier run left there cannot be removed", str(old)) from None
                continue
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    _remove(old)
    _sync(path.parent)


def recover(folder: str | Path, names: str) -> None:
    """Clear what dead processes left in `folder` of `whole_file` or `whole_folder` of these names, a regular
    expression; what they had moved aside comes back. Hidden files of other names are the user's.
    """
    for place in {
        path.with_suffix(".part") for path in Path(folder).iterdir() if re.fullmatch(LEFT.format(names), path.name)
    }:
        _clear(place)


@contextmanager
def _place(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, locked, and gone in the end; what dead processes left of `path` is cleared
    first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places = (path.with_name(f".{path.name}.{number}.part") for number in itertools.count())
    for place in (first := list(itertools.islice(places, PLACES))):
        _clear(place)
    place, lock = next((place, lock) for place in itertools.chain(first, places) if (lock := _take(place)) is not None)
    try:
        yield place
    finally:
        if _same(lock, place):  # not where a folder has moved to its place and another process has taken this one
            _remove(place)
        os.close(lock)


def _take(place: Path) -> int | None:
    """The lock on the new folder `place`, or None: another one has it."""
    try:
        place.mkdir()
    except FileExistsError:
        return None
    with suppress(FileNotFoundError):
        try:
            lock = os.open(place, os.O_RDONLY)
        except PermissionError:  # a umask that takes from its own user
            place.rmdir()
            raise
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _same(lock, place):
            return lock
        os.close(lock)
    return None  # before it was locked, another process cleared it as a dead one's


def _clear(place: Path) -> None:
    """Clear what a dead process left at `place`; what it had moved aside comes back. What a living one writes stays."""
    old, target = place.with_suffix(".old"), place.with_name(place.name[1:].rsplit(".", 2)[0])
    lock = None
    try:
        with suppress(FileNotFoundError):
            lock = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None or _same(lock, place):
            if old.exists() and not target.exists():
                old.rename(target)
            for path in (old, place) if lock is not None else (old,):
                _remove(path)
    except OSError:
        pass  # locked by a living process; or nobody can know, where a file system has no locks; or another user's
    finally:
        if lock is not None:
            os.close(lock)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):  # a folder that its user had closed
            path.chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def printable(text: str) -> str:
    """The text with what would act on a terminal, or cannot be printed, as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, is no file, is not JSON, or is not an object.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is not a regular file")  # a pipe would be waited for
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except RecursionError:
        raise UserError(f"{path} is not readable as JSON: too many levels") from None
    except (OSError, ValueError) as error:  # also bytes that are no text, and a number of thousands of digits
        raise UserError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, allowed is an object")
    return content
