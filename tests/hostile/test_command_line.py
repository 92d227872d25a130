"""What is typed, where it is written, and what is left when the machine or its disk gives out in the middle."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .conftest import NIGHTLY, Oracle, attempt, command
from .scans import nifti

SAMPLE = "sample {p} -n 1 --steps 2 --mode eager --json"
PREPARE = "prepare {scan} --workers 1 --json"
LINES = {"png": SAMPLE, "npy": f"{SAMPLE} --format npy", "nifti": f"{SAMPLE} --format nifti", "prepare": PREPARE}
NUMBERS = {
    "minus-1": "-1",
    "0": "0",
    "10^400": "9" * 400,
    "10^20": "9" * 20,
    "arabic": "٣",
    "squared": "²",
    "nan": "nan",
    "1e3": "1e3",
}
OPTIONS = {
    "--seed": SAMPLE,
    "-n": SAMPLE,
    "--steps": SAMPLE,
    "--batch-size": SAMPLE,
    "--eta": SAMPLE,
    "--every": PREPARE,
    "--volume": PREPARE,
    "--workers": PREPARE,
    "--seed ": PREPARE,
}
# what is added to a command line (an option given twice takes its last value), or the whole of one
TYPED = {
    **{
        f"{line[:6].strip()}{option.strip()}-{name}": f"{line} -o {{out}} {option.strip()} {number}"
        for option, line in OPTIONS.items()
        for name, number in NUMBERS.items()
        if NIGHTLY or name in ("minus-1", "10^400", "arabic")
    },
    **{
        f"sample-{text}": f"{SAMPLE} -o {{out}} {text}"
        for text in ("--mode graph+", "--mode ../x", "--scheduler os.system", "--format exe", "--pickle")
    },
    **{
        f"prepare-{text}": f"{PREPARE} -o {{out}} {text}"
        for text in (
            "--subject (",
            "--subject x",
            "--covariates /",
            "--covariates {scan}",
            "--covariates nowhere",
            "--covariates {empty}",
        )
    },
    **{
        f"prepare-{source[:20]}": f"prepare {source} --workers 1 --json -o {{out}}"
        for source in (
            "{empty}",
            "nowhere",
            "synthetic:0",
            "synthetic:x",
            f"synthetic:{10**30}",
            "/dev/null",
            "{mine}/x",
        )
    },
    **{
        f"{name}-to-{where}": f"{LINES[name]} -o {where}"
        for name in ("png", "prepare")
        for where in ("{mine}", "{mine}/x", "/dev/null/x", "/proc/x")
    },
    **{
        line: line
        for line in (
            "sample nowhere -o {out}",
            "sample {empty} -o {out}",
            "sample {mine} -o {out}",
            "export nowhere -o {out}",
            "export {p} --steps 0 -o {out}",
            "export {p} --batch -1 -o {out}",
            "export --check nowhere",
            "export --check {mine}",
            "export --check {p}",
            "evaluate {p} --data nowhere -o {out}",
            "evaluate {p} --data {p} -o {out}",
            "report nowhere -o {out}/r",
            "report {mine} -o {out}/r",
            "report {scan} -o {out}/r",
            "bench --compare {mine} {scan}",
            "bench --compare nowhere nowhere",
            "bench sampling --steps ²",
            "bench kernels --dtype ZZ -o {out}/b",
            "bench sampling --preset ../x -o {out}/b",
            "bench kernels --op __class__ -o {out}/b",
            "bench sampling --seconds nan -o {out}/b",
            "train {out} --data nowhere",
            "train {out} --data {p}",
            "rm -rf {mine}",
        )
    },
    "export-batch-10^30": f"export {{p}} --batch {10**30} -o {{out}}",
    "bench-batch-10^20": f"bench sampling --quick --batch {10**20} -o {{out}}/b",
    "bench-steps-10^20": f"bench sampling --quick --steps {10**20} -o {{out}}/b",
}


Typed = Callable[[str], Callable[[], None]]


@pytest.fixture
def typed(tmp_path: Path, tiny_pipeline: Path) -> Typed:
    """The call of a command line: `{scan}` a sound one, `{p}` a pipeline, `{mine}` a file of the user's, `{out}` where
    to write."""
    (tmp_path / "scan.nii").write_bytes(nifti())
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    known = {
        "scan": tmp_path / "scan.nii",
        "p": tmp_path / "p",
        "mine": tmp_path / "mine.txt",
        "out": tmp_path / "out",
        "empty": "",
    }
    return lambda line: command(*(word.format(**known) for word in line.split()))


@pytest.mark.parametrize("case", TYPED)
def test_typed(holds: Oracle, typed: Typed, case: str) -> None:
    sound = case.endswith(("arabic", "10^400", "10^20")) or case == "prepare--workers-squared"
    holds(typed(TYPED[case]), "" if sound and not case.startswith(("export", "bench")) else "refuse")


@pytest.mark.parametrize(
    "name", ["grid.png", "images.npy", "images.nii.gz", "parts", "manifest.json", "slices.npy", "notes.txt"]
)
@pytest.mark.parametrize("line", LINES)
def test_file_of_the_user(holds: Oracle, tmp_path: Path, typed: Typed, line: str, name: str) -> None:
    """A file in the output folder that no run made is as it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of the user")
    holds(typed(f"{LINES[line]} -o {{out}}"))
    assert (tmp_path / "out" / name).read_bytes() == b"of the user"


@pytest.mark.parametrize("line", ["png", "prepare"])
def test_out_is_a_link(holds: Oracle, tmp_path: Path, typed: Typed, line: str) -> None:
    """What a link leads to is written to, or refused; nothing stays beside it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    holds(typed(f"{LINES[line]} -o {tmp_path / 'link'}"))


STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "tempfile.mkdtemp", "tempfile.mkstemp")


def killed(call: Callable[[], object], folder: Path, at: int, by: signal.Signals) -> None:
    """End this process by `by` when it is about to take step `at` in `folder`."""
    taken = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and any(
            isinstance(a, str | os.PathLike) and str(a).startswith(str(folder)) for a in arguments
        ):
            if event == "open" and not (len(arguments) > 2 and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            taken[0] += 1
            if taken[0] == at:
                os.kill(os.getpid(), by)

    sys.addaudithook(watch)
    call()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


KILLS = (
    [(at, by) for at in range(1, 60) for by in (signal.SIGKILL, signal.SIGTERM)]
    if NIGHTLY
    else [(3, signal.SIGKILL), (9, signal.SIGTERM)]
)


@pytest.mark.parametrize(("at", "by"), KILLS, ids=lambda value: str(int(value)))
@pytest.mark.parametrize("line", ["png", "npy", "prepare"])
def test_killed(tmp_path: Path, typed: Typed, line: str, at: int, by: signal.Signals) -> None:
    """The same command again gives what an undisturbed one gives, and nothing else is left."""
    work, whole = tmp_path / "work", tmp_path / "whole"
    assert attempt(typed(f"{LINES[line]} -o {whole}"), tmp_path).how == "works"
    call = typed(f"{LINES[line]} -o {work}/out")
    attempt(partial(killed, call, work, at, by), tmp_path)
    assert attempt(call, tmp_path).how == "works"
    assert content(work / "out") == content(whole)
    assert [p.name for p in work.iterdir()] == ["out"]


@pytest.mark.parametrize("size", range(1000, 200_000, 7919) if NIGHTLY else (1000, 20_000))
@pytest.mark.parametrize("line", LINES)
def test_full_disk(holds: Oracle, tmp_path: Path, typed: Typed, line: str, size: int) -> None:
    """No file may grow beyond `size`: one sentence, and nothing under its name that is not whole."""

    def call() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        typed(f"{LINES[line]} -o {{out}}")()

    holds(call)
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text())
