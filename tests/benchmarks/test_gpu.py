"""The command for a GPU, dry on a CPU: what it refuses, that killing it loses nothing, and that it goes on where it
stopped."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from sbldm_fast.benchmarks import gpu
from sbldm_fast.benchmarks.rows import read_rows
from sbldm_fast.benchmarks.suites import SUITES

from sbldm_fast.cli_bench import Suite, _suite_arguments, bench

ROOT = Path(__file__).parents[2]
SHORT = "bench sampling --quick --preset demo --steps 1 --rounds 1 --short"
PARTS = [
    gpu.Part("headline: batch 1", SHORT, 60),
    gpu.Part("checks: loops", "checks graphs --preset demo", 60),
    gpu.Part("wrong", "bench sampling --steps 0", 60),
]


@pytest.fixture(scope="module")
def env() -> dict[str, Any]:
    return gpu.probe("cpu")


def run(folder: Path, *options: str, minutes: float = 5.0) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "sbldm_fast.benchmarks.gpu",
        "-o",
        str(folder),
        "--minutes",
        str(minutes),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def parts_of(folder: Path) -> list[tuple[str, int]]:
    return [(r["part"], r["code"]) for r in read_rows(folder / "rows.jsonl")[0] if r["target"] == "gpu"]


def test_the_whole_command_dry_killed_at_random_and_gone_on_with(tmp_path: Path) -> None:
    """kill -9 in the middle: every line that was written is whole, no part outlives the command, and the rest is done
    after it."""
    command = [sys.executable, "-m", "sbldm_fast.benchmarks.gpu", "--device", "cpu", "-o", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "rows.jsonl").exists() or not read_rows(tmp_path / "rows.jsonl")[0]:
            time.sleep(0.2)
        time.sleep(random.uniform(0, 20))
        process.kill()
    assert not read_rows(tmp_path / "rows.jsonl")[1]
    until = time.monotonic() + 30
    while str(tmp_path) in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < until, "a part outlives the command"
        time.sleep(0.2)
    before = parts_of(tmp_path)
    done = run(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    names = [part.name for part in gpu.plan("cpu")]
    assert [name for name, _ in parts_of(tmp_path)] == names, "each part once, in the order of the plan"
    assert parts_of(tmp_path)[: len(before)] == before
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert "Checks: " in table
    assert " 0 failed." in table
    for text in ("| 2 | FastSampler eager float32 |", "parity: ops: ", "| sbldm_fast float32 |", "| ceilings |"):
        assert text in table
    assert len(list(tmp_path.iterdir())) <= 6
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert archive.getnames() == ["rows.jsonl", "log.txt", "table.md"]
        packed = archive.extractfile("rows.jsonl")
        assert packed is not None
        assert packed.read() == (tmp_path / "rows.jsonl").read_bytes()
    again = run(tmp_path, "--device", "cpu")
    assert again.returncode == 0
    assert "exit " not in again.stdout, "what is done is not done again"


def test_a_part_is_run_once_on_one_machine_with_one_source(
    tmp_path: Path, env: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "plan", lambda *_: PARTS)
    assert gpu.run(tmp_path, "cpu", env, time.monotonic() + gpu.GRACE + 20) == 1, "less than half of what each may take"
    assert "Not done, the same command goes on: headline: batch 1, checks: loops, wrong." in capfd.readouterr().out
    assert gpu.run(tmp_path, "cpu", env, time.monotonic() + 300) == 1
    assert parts_of(tmp_path) == [("headline: batch 1", 0), ("checks: loops", 0), ("wrong", 1)]
    out = capfd.readouterr().out
    assert "Parts that failed: wrong (exit 1)." in out
    assert "steps, batch, rounds: got [0]" in out, "what a part that failed has said is shown"
    assert "PASS FastSampler eager" in out
    ran: list[str] = []
    monkeypatch.setattr(gpu, "work", lambda part, *_: ran.append(part.name) or 0)
    for changed, times in (({}, 0), ({"source": "b"}, 3), ({"cpu": "another"}, 6), ({"cpu": "another"}, 6)):
        gpu.run(tmp_path, "cpu", env | changed, time.monotonic() + 300)
        assert len(ran) == times


def test_a_part_that_takes_too_long_writes_what_it_has(
    tmp_path: Path, env: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An interrupt comes first: rounds end, the rows of the problem are written and say so, and the part is run again
    the next time."""
    endless = "bench sampling --preset demo --steps 5 --batch 1,2 --rounds 100000 --short --no-compile --dtype float32"
    long = gpu.Part("headline", endless, 60)  # enough for three rounds beside another worker of the tests
    monkeypatch.setattr(gpu, "plan", lambda *_: [long])
    assert gpu.run(tmp_path, "cpu", env, time.monotonic() + 300) == 1
    rows = read_rows(tmp_path / "rows.jsonl")[0]
    assert [r["batch"] for r in rows[:-1]] == [1] * (len(rows) - 1), "the second batch is not begun"
    timed = [r for r in rows if "median_s" in r]
    assert len(timed) >= 3
    assert all(r["interrupted"] and r["n"] >= 3 for r in timed)
    assert parts_of(tmp_path) == [("headline", None)]
    assert "Not done, the same command goes on: headline." in capfd.readouterr().out


def test_a_part_that_does_not_end_is_killed(
    tmp_path: Path, env: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sh")
    part = gpu.Part("deaf", "checks", 2)
    real = subprocess.Popen

    def started(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real(["python3", "-c", deaf], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", started)
    with (tmp_path / "log.txt").open("ab") as log:
        begun = time.monotonic()
        assert gpu.work(part, tmp_path / "rows.jsonl", "cpu", log, 1.0, env) is None
        assert time.monotonic() - begun < 10


def test_tests_that_fail_or_were_killed_are_in_the_rows(tmp_path: Path) -> None:
    report = tmp_path / "parity.xml"
    assert gpu.read_junit(report, None) == {"passed": 0, "skipped": 0, "failures": ["no report: the tests were killed"]}
    report.write_text("<testsuites><testsuite><testca")
    assert gpu.read_junit(report, 4)["failures"] == ["no report: the tests ended with 4"]
    report.write_text("""<testsuites><testsuite>
        <testcase classname="a.b" name="c[cuda]"><failure message="assert 1 == 2&#10;and more">x</failure></testcase>
        <testcase classname="a.b" name="d"/>
        <testcase classname="a.b" name="e"><skipped message="no second device"/></testcase>
        <testcase classname="a" name="f"><error message="failed on setup"/></testcase>
        <testcase time="0.000" />
        </testsuite></testsuites>""")
    assert gpu.read_junit(report, 1) == {
        "passed": 1,
        "skipped": 1,
        "failures": ["a.b::c[cuda]: assert 1 == 2", "a::f: failed on setup"],
    }


def test_bad_input_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_old = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(gpu, "probe", lambda device: {"gpu": None, "no_gpu": too_old})
    assert gpu.main(["-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == f"gpu: --device cuda needs a CUDA device, and this PyTorch sees none: {too_old}\n"
    (tmp_path / "file").touch()
    assert gpu.main(["-o", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"gpu: {tmp_path / 'file'} cannot be written: File exists\n"
    for arguments in ([], ["-o", str(tmp_path), "--minutes", "nan"], ["-o", str(tmp_path), "--minutes", "0.2"]):
        with pytest.raises(SystemExit) as stop:
            gpu.main(arguments)
        assert stop.value.code == 2
    assert "--minutes: got 0.2, allowed is 1 or more" in capsys.readouterr().err


def test_a_machine_that_cannot_be_told_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PROBE", 0.01)
    assert gpu.main(["-o", str(tmp_path)]) == 2
    assert "gpu: this machine cannot be told: " in capsys.readouterr().err


def test_a_crash_is_a_failure_and_not_a_lack_of_time(
    tmp_path: Path, env: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    crash = tmp_path / "test_crash.py"
    crash.write_text("import os\n\n\ndef test_crash():\n    os.abort()\n")
    (tmp_path / "parity.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="of another part"/></testsuite></testsuites>'
    )
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Part("parity: crash", f"pytest {crash}", 60)])
    assert gpu.run(tmp_path, "cpu", env, time.monotonic() + 300) == 1
    assert parts_of(tmp_path) == [("parity: crash", -signal.SIGABRT)]
    out = capfd.readouterr().out
    assert "Parts that failed: parity: crash (exit -6)." in out
    assert "parity: crash: 0 passed, 0 skipped, 1 failed" in out
    assert "no report: the tests ended with -6" in out
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    assert gpu.run(tmp_path, "cpu", env, time.monotonic() + 300) == 0
    assert "parity is left out: pytest is not installed" in capfd.readouterr().out


def test_rows_of_who_knows_what_are_no_obstacle(tmp_path: Path, env: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"target": "gpu", "run": "1", "env": e}
        for e in ({}, None, env | {"source": "other"}, {k: v for k, v in env.items() if k != "source"}, env)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "\x00\xff{half")
    assert [r["env"] for r in gpu.rows_of(path, env)] == [env]


def test_a_second_run_beside_the_first_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert gpu.main(["--device", "cpu", "-o", str(tmp_path)]) == 2
    assert f"another run is at work in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_that_is_asked_for_ends_the_part_and_still_packs(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "sbldm_fast.benchmarks.gpu", "--device", "cpu", "-o", str(tmp_path)]
    # a shell that starts things in the background has them ignore interrupts
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, restore_signals=True) as process:
        while not (tmp_path / "rows.jsonl").exists():
            time.sleep(0.01)  # a signal may also come while a part is being started
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Not done, the same command goes on: checks: ops" in out
    assert (tmp_path / "gpu.tar.gz").exists()


@pytest.mark.parametrize(("free", "batches"), [(140, [1, 64, 256, 8]), (14.5, [1, 64, 128, 8]), (1, [1, 8])])
def test_batches_are_as_large_as_the_memory_allows(
    free: float, batches: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"free": int(free * 2**30), "total": 150 * 2**30}
    assert gpu.fitting_batches({"gpu": "a card", "memory": memory, "nvml": {"other_processes": 2}}) == batches
    out = capsys.readouterr().out
    assert "2 other processes on this GPU: figures are marked" in out
    assert ("in its place" in out) == (256 not in batches)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_is_a_command(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name, suite in SUITES.items():

        def note(name: str = name, **given: Any) -> Any:
            taken.append(name)
            return iter(())

        monkeypatch.setattr(note, "__signature__", __import__("inspect").signature(suite.run), raising=False)
        monkeypatch.setitem(SUITES, name, suite._replace(run=note))
    monkeypatch.setattr(
        "sbldm_fast.benchmarks.table.TABLES",
        {name: lambda _: type("T", (), {"markdown": lambda _: ""})() for name in SUITES},
    )
    assert not any("bfloat16" in part.command for part in gpu.plan(device, sm=75))
    parts = gpu.plan(device)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        words = shlex.split(part.command)
        if words[0] == "bench":
            app = typer.Typer()
            app.command()(bench)
            app([*words[1:], "-o", os.devnull], standalone_mode=False)
            assert taken.pop() == words[1]
        elif words[0] == "pytest":
            files = [w.removeprefix("--ignore=") for w in words if "tests/" in w]
            assert files
            assert all((ROOT / file).exists() for file in files)
        else:
            assert (ROOT / "benchmarks" / f"{words[0]}.py").exists()


def test_the_suites_are_those_of_the_command_line() -> None:
    assert set(SUITES) == set(Suite)
    assert _suite_arguments(SUITES["training"].run, {"batch": [4], "dtype": ["float32"]}, "training") == {
        "batch": 4,
        "dtypes": ["float32"],
    }
    json.dumps({name: suite.quick for name, suite in SUITES.items()})


def test_this_process_holds_no_memory_of_the_gpu() -> None:
    assert not torch.cuda.is_initialized()
    assert "torch" not in [
        line.split()[1] for line in (ROOT / "benchmarks/gpu.py").read_text().splitlines() if line.startswith("import ")
    ]
