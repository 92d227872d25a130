"""Whatever lies in a folder of scans: it is prepared, or named and left out; no hang, no header text, nothing run."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel", reason="the data extra is not installed")
pytest.importorskip("pydicom", reason="the data extra is not installed")
import scipy.ndimage  # noqa: F401  # before the fork, once for all

from sbldm_fast.data import Slices, prepare

from .conftest import Oracle, command
from .scans import DICOM_LIES, dicom, dicom_bytes, head, nifti, nifti_files, picture_files, stored


def read(folder: Path) -> None:
    """Prepare what lies in `in`; what comes is a training set."""
    prepare([str(folder / "in")], folder / "out", progress=False)
    array = np.load(folder / "out" / "slices.npy")
    assert np.isfinite(array).all()
    assert array.min() >= -1
    assert array.max() <= 1
    Slices(folder / "out")


def put(folder: Path, name: str | bytes, content: bytes) -> None:
    where = os.path.join(os.fsencode(folder / "in"), os.fsencode(name))  # noqa: PTH118  # a name may be no text
    os.makedirs(os.path.dirname(where), exist_ok=True)  # noqa: PTH103, PTH120
    with open(where, "wb") as file:  # noqa: PTH123
        file.write(content)


@pytest.mark.parametrize(("name", "content", "must"), [pytest.param(*c[1:], id=c[0]) for c in nifti_files()])
def test_nifti(holds: Oracle, tmp_path: Path, name: str, content: bytes, must: str) -> None:
    put(tmp_path, name, content)
    holds(partial(read, tmp_path), must)


@pytest.mark.parametrize("case", DICOM_LIES)
def test_dicom_headers(holds: Oracle, tmp_path: Path, case: str) -> None:
    values, must = DICOM_LIES[case]
    for k in range(6):
        put(tmp_path, f"{k}.dcm", stored(dicom(k, **values)))
    holds(partial(read, tmp_path), must)


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in dicom_bytes()])
def test_dicom_bytes(holds: Oracle, tmp_path: Path, content: bytes) -> None:
    for k in range(6):
        put(tmp_path, f"{k}.dcm", content if k == 2 else stored(dicom(k)))
    holds(partial(read, tmp_path))


def test_dicom_padding(holds: Oracle, tmp_path: Path) -> None:
    """What the header calls padding is no tissue: the slices are those of the scan without it."""
    for k in range(6):
        plain = dicom(k)
        pixels = np.frombuffer(plain.PixelData, np.uint16).astype(np.int16)
        pixels = np.where(pixels < 100, -32768, pixels).astype(np.int16)
        put(
            tmp_path,
            f"{k}.dcm",
            stored(dicom(k, PixelData=pixels.tobytes(), PixelRepresentation=1, PixelPaddingValue=-32768)),
        )

    def contrast() -> None:
        read(tmp_path)
        array = np.load(tmp_path / "out" / "slices.npy").astype(float)
        assert np.ptp(np.percentile(array[array > -0.8], (10, 90))) > 0.1, "a white blob without contrast"

    holds(contrast, "work")


@pytest.mark.parametrize(("content", "must"), [pytest.param(*c[1:], id=c[0]) for c in picture_files()])
def test_picture(holds: Oracle, tmp_path: Path, content: bytes, must: str) -> None:
    put(tmp_path, "a.png", content)
    put(tmp_path, "../bin/gs", f"#!/bin/sh\ntouch {tmp_path / 'RAN'}\n".encode())  # what PostScript would be given to
    (tmp_path / "bin" / "gs").chmod(0o755)

    def with_an_interpreter() -> None:
        os.environ["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        read(tmp_path)

    holds(with_an_interpreter, must)


def bound(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have 107 characters
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def nested(path: Path) -> None:
    """Folders of one letter, 1,200 deep, which no recursion reaches the end of."""
    here = os.open(path.parent, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"fifo{end or '-bare'}": (f"x{end}", os.mkfifo) for end in ("", ".nii", ".nii.gz", ".dcm", ".png", ".zip")},
    "socket": ("x.nii", bound),
    **{
        f"zero{end or '-bare'}": (f"x{end}", lambda p: p.symlink_to("/dev/zero"))
        for end in ("", ".nii", ".nii.gz", ".dcm", ".png")
    },
    "link-nowhere": ("x.nii", lambda p: p.symlink_to("nowhere")),
    "link-to-itself": ("x.nii", lambda p: p.symlink_to(p.name)),
    "loop": ("x", lambda p: p.symlink_to("..", target_is_directory=True)),
    "folder-by-that-name": ("x.nii", lambda p: p.mkdir()),
    "picture-folder": ("x.png", lambda p: p.mkdir()),
    "deep": ("d", nested),
}


@pytest.mark.parametrize("case", PLACES)
def test_place(holds: Oracle, tmp_path: Path, case: str) -> None:
    """Beside a sound scan lies what is no file: the scan is prepared."""
    name, make = PLACES[case]
    put(tmp_path, "sub-1.nii", nifti())
    make(tmp_path / "in" / name)
    try:
        holds(partial(read, tmp_path), "work")
    finally:
        # pytest's own way to clear up would not reach the end of `deep`
        subprocess.run(["rm", "-rf", tmp_path / "in" / name], check=True)


NAMES = {
    "newline": b"a\nb.nii",
    "escape": b"a\x1b]0;b\x07\x1b[2J.nii",
    "no-utf-8": b"a\xff\xfe.nii",
    "long": b"a" * 251 + b".nii",
    "dash": b"-o.nii",
    "dots": b"...nii.nii",
    "space": b" .nii",
    "percent": b"%s{0}%(x)d.nii",
    "markup": b"<script>alert(1)</script>"[:8] + b".nii",
    "bidi": "a\u202egnp.nii".encode(),
    "digits": b"9" * 200 + b".nii",
    "bare": b".nii",
    "quote": b"a'\"`$(touch RAN).nii",
}


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "broken"])
@pytest.mark.parametrize("case", NAMES)
def test_name(holds: Oracle, tmp_path: Path, case: str, sound: bool) -> None:
    """A name is shown as it is or escaped, and is no reason to refuse the scan beside it."""
    put(tmp_path, "sub-1.nii", nifti())
    put(tmp_path, NAMES[case], nifti() if sound else b"broken")
    holds(command("prepare", tmp_path / "in", "-o", tmp_path / "out", "--workers", "1", "--json"), "work")


def test_people(holds: Oracle, tmp_path: Path) -> None:
    """A NIfTI beside the DICOM that it was made of is the same person."""
    for person in range(6):
        put(tmp_path, f"sub-{person}/sub-{person}.nii", nifti(head(person)))
        for k in range(6):
            put(tmp_path, f"sub-{person}/dicom/{k}.dcm", stored(dicom(k, person=person)))

    def one_split_each() -> None:
        read(tmp_path)
        rows = [row for split in ("train", "val", "test") for row in Slices(tmp_path / "out", split).rows]
        where = {(row["source"].split("/")[1], row["split"]) for row in rows}
        assert len(where) == 6, f"a person in two splits: {sorted(where)}"

    holds(one_split_each, "work")
