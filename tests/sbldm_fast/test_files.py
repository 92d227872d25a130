"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("cleared_by", ["recover", "the next one"])
@pytest.mark.parametrize("point", ["filling", "between the renames", "after the renames"])
def test_what_a_kill_left_is_cleared_or_comes_back(point: str, cleared_by: str, tmp_path: Path) -> None:
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
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    if cleared_by == "recover":
        for name in (".y.json.77.part", ".z.k3j_2x9a.part"):  # as earlier versions named them
            (tmp_path / name).write_text("half a file")
        recover(tmp_path, ".+")
    else:
        with pytest.raises(RuntimeError), whole_folder(path):
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (path / "x").read_text() == ("two" if point == "after the renames" else "one")


HELD = """
import sys
from sbldm_fast.files import whole_file, whole_folder
with whole_folder(sys.argv[1]) as folder, whole_file(sys.argv[2]) as file:
    for path in (folder / "x", file):
        path.write_text("one")
    print("there", flush=True)
    sys.stdin.read()
"""


def test_what_a_living_process_writes_stays_and_what_an_ended_one_left_goes(tmp_path: Path) -> None:
    """SIGTERM ends Python without its `finally`."""
    folder, file = tmp_path / "f", tmp_path / "a.txt"

    def begun() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HELD, str(folder), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        return process

    def write() -> None:
        with whole_folder(folder) as aside:
            (aside / "x").write_text("two")
        with whole_file(file) as aside:
            aside.write_text("two")

    with begun() as ended:
        ended.terminate()
    assert ended.returncode == -signal.SIGTERM
    with begun() as living:
        write()
        recover(tmp_path, ".+")
        assert (folder / "x").read_text() == file.read_text() == "two"
        assert len(list(tmp_path.iterdir())) == 4, "and both places of the living process"
    assert living.returncode == 0
    assert (folder / "x").read_text() == file.read_text() == "one", "which ended later"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "f"]


def test_many_at_once_into_one_place(tmp_path: Path) -> None:
    def write(number: int) -> None:
        with whole_folder(tmp_path / "f") as folder:
            (folder / "x").write_text(str(number))
        with whole_file(tmp_path / "a") as file:
            file.write_text(str(number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(60)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


def test_a_link_stays_and_the_umask_holds(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "f").symlink_to(tmp_path / "disk" / "f")
    before = os.umask(0o077)
    try:
        for _ in range(2):
            with whole_folder(tmp_path / "f") as folder:
                (folder / "x").write_text("one")
    finally:
        os.umask(before)
    assert (tmp_path / "f").is_symlink()
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "disk").iterdir()] == [0o700]


def test_json_that_waits_or_is_too_deep_or_too_long_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    (tmp_path / "long.json").write_text('{"a": ' + "9" * 5000 + "}")
    for name, message in (
        ("pipe", "not a regular file"),
        ("deep", "too many levels"),
        ("long", "not readable as JSON: Exceeds the limit"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.json .*{message}"):
            read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "does not exist"), ("{", "not readable as JSON"), ("[1]", "holds a JSON list")]
)
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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_what_cannot_be_removed_is_said_and_does_not_hang(tmp_path: Path) -> None:
    """As a user without rights over what another one left: it waited for ever."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("")
    (tmp_path / ".d.0.old").mkdir()
    (tmp_path / ".d.0.old" / "f").write_text("")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(20)
            os.setuid(65534)
            with whole_folder(tmp_path / "d") as place:
                (place / "f").write_text("new")
        except OSError as error:
            code = 0 if "cannot be removed" in str(error) else 2
        except BaseException:
            code = 3
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "d" / "f").read_text() == "", "the folder that was there is there"
