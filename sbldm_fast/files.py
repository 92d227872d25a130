"""Files that are whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well and is gone when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, lose: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends well and is gone when it does not.

    Raises:
        ValueError: `path` is a file, or holds something that the new folder does not and that must not be lost (`lose`).
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file, allowed is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    old = aside.with_suffix(".old")
    try:
        yield aside
        for file in aside.rglob("*"):
            _sync(file)
        aside.chmod(0o755)
        if path.exists() and not lose and (lost := sorted({p.name for p in path.iterdir()} - {p.name for p in aside.iterdir()})):
            raise ValueError(f"{path} holds {lost[0]}, which would be lost; allowed is a new folder or one that this command wrote")
        if path.exists():
            path.rename(old)
        aside.rename(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Clear what processes that were killed in `whole_file` or `whole_folder` left in `folder`; what was moved aside comes back."""
    for path in [*Path(folder).glob(".*.old"), *Path(folder).glob(".*.part")]:
        target = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
        ValueError: the file is missing, is not JSON, or is not an object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, allowed is an object")
    return content
