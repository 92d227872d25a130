"""Files that are whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sbldm_fast.files import read_json, recover, whole_file, whole_folder, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), whole_file(path) as aside:  # noqa: PT012  # both lines are the write that fails
        aside.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content in ("one", "two"):
        with whole_folder(path) as aside:
            (aside / "x").write_text(content)
    assert (path / "x").read_text() == "two"
    with pytest.raises(RuntimeError), whole_folder(path) as aside:  # noqa: PT012  # both lines are the write that fails
        (aside / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("point", ["filling", "between the renames", "after the renames"])
def test_what_a_kill_left_is_cleared_or_comes_back(point: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with whole_folder(path) as aside:
        (aside / "x").write_text("one")
    # as a process that is killed leaves it: nothing of Python's runs any more
    code = f"""
import os, pathlib
from sbldm_fast.files import whole_folder, whole_file
rename, done = pathlib.Path.rename, []
def counted(self, target):
    if len(done) == {["filling", "between the renames", "after the renames"].index(point)}:
        os._exit(9)
    done.append(rename(self, target))
    if len(done) == 2:
        os._exit(9)
pathlib.Path.rename = counted
with whole_folder({str(path)!r}) as aside:
    (aside / "x").write_text("two")
    (pathlib.Path({str(path)!r}).parent / ".y.json.77.part").write_text("half a file")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (path / "x").read_text() == ("two" if point == "after the renames" else "one")


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{", "not readable as JSON"), ("[1]", "holds a JSON list")])
def test_bad_json_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_a_full_disk_is_one_sentence_and_no_half_file(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the same failing write, in a place of its own."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.argv = ["sbldm-fast", "prepare", "synthetic:1", "-o", "out", "--every", "10"]
from sbldm_fast.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "sbldm-fast: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_saving_weights(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sbldm_fast import AutoencoderKL, UNet2D, Pipeline, preset
p = preset("demo")
pipe = Pipeline(AutoencoderKL(p.vae), UNet2D(p.unet), p.scheduler)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    pipe.save("out")
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, 2]}
    assert text.endswith("}\n")
