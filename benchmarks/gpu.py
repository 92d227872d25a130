"""What a GPU can tell, ten minutes of it at a time, in the order of what matters.

python -m sbldm_fast.benchmarks.gpu -o FOLDER

Plain Python: no make, no install (`PYTHONPATH` of a copied tree is enough), no network; diffusers, MONAI and nilearn
are used where they are. Each part of the plan is a process of its own with a time of its own, so that one that hangs or
dies takes nothing with it: it gets an interrupt (SIGINT) and half a minute to write what it has, then it is killed.
Rows are written as they come to `rows.jsonl`, which is whole whenever the command is killed; what this machine has
finished with these sources is not done again by the next call.

FOLDER has at most six files: rows.jsonl, log.txt (what the parts printed), table.md (also printed last), gpu.tar.gz
(the three).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

from sbldm_fast.errors import UserError

from .rows import Row, append, machine_id, read_rows
from .table import gpu_summary

GRACE = 25.0  # seconds that a part has to end after its interrupt
LAST = 8.0  # seconds for the table and the archive
PROBE = 60.0  # seconds to tell what machine this is
LOOK = 0.2  # seconds between two looks at the clock and at signals
INTERRUPTED = 130  # the exit code of a suite that was interrupted
# bytes that one sample of the headline wants, all providers together: 6.2 GiB at batch 64 on an H200
MEMORY = 100 * 2**20
WORKERS = max(1, min(14, (os.cpu_count() or 2) - 2))  # of parity: most of a test is compiling, on the processor
BATCHES = (1, 64, 256, 8)  # of the headline, in the order of what matters


class Part(NamedTuple):
    """A process of the plan: a module of this package with its arguments, or pytest, and how long it may take."""

    name: str
    command: str
    seconds: float


def plan(device: str, batches: Sequence[int] = BATCHES, sm: int = 80) -> list[Part]:
    """The parts in the order of what matters; on a CPU tiny ones, to try the command itself. Below sm 80 bfloat16 is
    emulated: left out."""
    if device == "cpu":
        tiny = "bench {} --preset demo --rounds 3 --no-compile"
        return [
            Part("checks: ops", "checks ops", 120),
            Part("checks: loops", "checks graphs --preset demo", 60),
            Part("headline: batch 2", f"{tiny.format('sampling')} --steps 2 --dtype float32 --short --batch 2", 60),
            Part("parity: ops", "pytest tests/kernels/test_philox_normal.py", 60),
            Part("ops: ceilings", "bench kernels --op ceilings --rounds 3 --seconds 2", 60),
            Part("training", f"{tiny.format('training')} --batch 2 --steps 1 --dtype float32", 60),
        ]
    headline = f"bench sampling --short --no-compile --dtype float32,float16{',bfloat16' * (sm >= 80)}"
    parts = [Part(f"headline: batch {b}", f"{headline} --batch {b} --rounds 9 --seconds 12", 90) for b in batches]
    ops = "bench kernels --no-large --no-compile --rounds 7 --seconds 1"
    others = "--op ddim_step --op solver_step --op frequency_loss --op spectral_mse --op philox_normal --op diffuse"
    others += " --op mix_slices"
    tests = "pytest -m gpu -k 'not compile and not fuzz'"
    loops = "tests/benchmarks/test_harness.py " + " ".join(
        f"tests/sbldm_fast/{name}.py"
        for name in ("models/test_layers", "sampling/test_loop", "sampling/test_precision", "training/test_stages")
    )
    training = "bench training --steps 50 --rounds 5 --seconds 20"
    return [
        Part("checks: ops", "checks ops", 60),
        Part("checks: loops", "checks graphs", 30),
        Part("launches", "launches --dtype float16", 45),
        Part("parity: captures", f"{tests} tests/kernels/test_cuda.py", 45),
        Part("parity: ops", f"{tests} -n {WORKERS} tests/kernels --ignore=tests/kernels/test_cuda.py", 120),
        parts[0],
        Part("training", f"{training} --no-compile --dtype float32,float16", 90),
        parts[1],
        Part("ops: ceilings", "bench kernels --op ceilings --rounds 7 --seconds 2", 30),
        Part("ops: norm", f"{ops} --op group_norm_silu", 75),
        Part("parity: loops", f"{tests} -n 4 {loops}", 60),
        Part("ops: others", f"{ops} {others}", 90),
        Part("ops: crossover", "bench_group_norm_silu", 30),
        *parts[2:],
        Part("headline: compiled", "bench sampling --short --batch 1 --dtype float16 --rounds 9 --seconds 20", 240),
        Part("energy", "bench sampling --short --no-compile --batch 64 --dtype float16 --rounds 3 --energy", 150),
        Part("ops: large", f"{ops.replace('--no-large', '--large')} --op group_norm_silu {others}", 300),
        Part("training: compiled", f"{training} --dtype float16", 300),
        Part("parity: fuzz", f"pytest -m gpu -n {WORKERS} tests/kernels/test_fuzz.py", 600),
        Part(
            "parity: compiled",
            "pytest -m gpu -k compile -n 2 tests/kernels tests/sbldm_fast/sampling/test_loop.py",
            300,
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: all of it is done and right; 1: something failed or time ran out; 2: nothing could be begun."""
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder of the results; run again it goes on")
    parser.add_argument("--minutes", type=float, default=9.0, help="that the whole may take")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the command itself, dry, at tiny sizes"
    )
    given = parser.parse_args(arguments)
    if not 1 <= given.minutes < math.inf:
        parser.error(f"--minutes: got {given.minutes}, allowed is 1 or more")
    deadline = time.monotonic() + 60 * given.minutes - LAST
    # noted, not raised: an exception that comes while a process is forked is lost in Python's own handlers
    asked: list[int] = []
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        with (given.out / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            env = probe(given.device)
            if given.device == "cuda" and not env["gpu"]:
                raise UserError(f"--device cuda needs a CUDA device, and this PyTorch sees none: {env['no_gpu']}")
            return run(given.out, given.device, env, deadline, asked)
    except BlockingIOError:
        print(f"gpu: another run is at work in {given.out}; wait for it, or give another folder", file=sys.stderr)
    except OSError as error:
        print(f"gpu: {given.out} cannot be written: {error.strerror}", file=sys.stderr)
    except ValueError as error:
        print(f"gpu: {error}", file=sys.stderr)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    return 2


def probe(device: str) -> Row:
    """The environment block of this machine, from a process of its own: one here would hold memory of the GPU while
    others are timed.

    Raises:
        ValueError: the process failed, or did not end within a minute.
    """
    command = [sys.executable, "-m", "sbldm_fast.benchmarks.rows"]
    try:
        done = subprocess.run(command, env=variables(device), stdout=subprocess.PIPE, check=True, timeout=PROBE)
    except subprocess.SubprocessError as error:
        raise UserError(f"this machine cannot be told: {error}") from error
    found: Row = json.loads(done.stdout)
    return found


def variables(device: str) -> dict[str, str]:
    """The environment variables of a part."""
    dry = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if device == "cpu" else {"SBLDM_FAST_FUZZ": "gpu"}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **dry}


def run(folder: Path, device: str, env: Row, deadline: float, asked: Sequence[int] = ()) -> int:
    """The parts that `folder` does not record as finished on this machine with these sources; then the table.

    Until `deadline`, or until `asked` has a signal.
    """
    rows = folder / "rows.jsonl"
    rows.touch()
    finished = {r["part"]: r["code"] for r in rows_of(rows, env) if r["target"] == "gpu"}
    parts = plan(device, fitting_batches(env), env.get("sm", 0))
    if why := no_tests():
        print(f"parity is left out: {why}")
        parts = [p for p in parts if not p.command.startswith("pytest")]
    versions = ", ".join(
        f"{name} {env['packages'].get(name, 'absent')}" for name in ("torch", "triton", "diffusers", "monai")
    )
    print(f"{env['gpu'] or env['cpu']}: {versions}; {len(parts)} parts", flush=True)
    with (folder / "log.txt").open("ab") as log:
        for part in parts:
            rest = 0.0 if asked else deadline - time.monotonic() - GRACE
            if finished.get(part.name) is None and rest > part.seconds / 2:  # with less it would only be cut off
                begun = time.monotonic()
                code = work(part, rows, device, log, min(part.seconds, rest), env, asked)
                seconds = round(time.monotonic() - begun, 1)
                append(rows, [note("gpu", env, part=part.name, code=code, seconds=seconds)])
                finished[part.name] = code
                print(
                    f"{'cut off' if code is None else f'exit {code}'} after {seconds:5.1f} s: {part.name}", flush=True
                )
    left = [p.name for p in parts if finished.get(p.name) is None]
    failed = {p.name: code for p in parts if (code := finished.get(p.name))}
    text = gpu_summary(rows_of(rows, env), failed, left)
    (folder / "table.md").write_text(text)
    with tarfile.open(folder / "gpu.tar.gz", "w:gz") as archive:
        for name in ("rows.jsonl", "log.txt", "table.md"):
            archive.add(folder / name, name)
    print(f"\n{text}\nrows, log and table are in {folder}, packed in gpu.tar.gz")
    return 1 if left or failed else 0


def no_tests() -> str | None:
    """Why the tests cannot be run from here, or None."""
    if not Path("tests/kernels/test_cuda.py").is_file():
        return "the working folder is no checkout with its tests"
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def work(
    part: Part, rows: Path, device: str, log: IO[bytes], seconds: float, env: Row, asked: Sequence[int] = ()
) -> int | None:
    """The exit code of a part, None where its time was over or an end was asked for; what it had started goes with
    it."""
    words, report = shlex.split(part.command), rows.with_name("parity.xml")
    if tests := words[0] == "pytest":
        if importlib.util.find_spec("xdist") is None and "-n" in words:
            del words[words.index("-n") : words.index("-n") + 2]
        command = ["-m", *words, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    else:
        module = "sbldm_fast" if words[0] == "bench" else f"sbldm_fast.benchmarks.{words.pop(0)}"
        command = ["-m", module, *words, "-o", str(rows)]
    report.unlink(missing_ok=True)  # of a run that was killed
    log.write(f"\n$ python {shlex.join(command)}\n".encode())
    log.flush()
    begun, at = time.monotonic(), log.tell()
    start = subprocess.Popen(
        [sys.executable, *command], stdout=log, stderr=log, env=variables(device), preexec_fn=_die_with_parent
    )
    with start as process:
        while (code := process.poll()) is None and not asked and time.monotonic() - begun < seconds:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
        if code is None:
            if asked:
                print(f"interrupted: {part.name} has {GRACE:.0f} s to write what it has", flush=True)
            _end(process)
        elif code == INTERRUPTED:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that it has left
    if tests:
        append(
            rows,
            [
                note(
                    "parity",
                    env,
                    part=part.name,
                    code=code,
                    seconds=round(time.monotonic() - begun, 1),
                    **read_junit(report, code),
                )
            ],
        )
        report.unlink(missing_ok=True)
    elif part.name.startswith("checks") or code != 0:
        with Path(log.name).open("rb") as written:
            written.seek(at)
            print(written.read().decode(errors="replace")[-8000 if code == 0 else -3000 :], flush=True)
    return code


def _die_with_parent() -> None:
    # a part must not outlive a command that was killed: it would be measured beside the next one
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """An interrupt, so that it writes what it has, then the end."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    process.kill()


def read_junit(report: Path, code: int | None) -> Row:
    """What pytest's report says: how many passed or were skipped, and each failure in a line; `code` is how it
    ended."""
    try:
        # an interrupt leaves a case without a name behind
        cases = [case for case in ElementTree.parse(report).getroot().iter("testcase") if case.get("name")]
    except (OSError, ElementTree.ParseError):
        why = "were killed" if code is None else f"ended with {code}"
        return {"passed": 0, "skipped": 0, "failures": [f"no report: the tests {why}"]}
    failures = [
        f"{case.get('classname')}::{case.get('name')}:"
        f" {((fault.get('message') or '').strip().splitlines() or ['no message'])[0][:200]}"
        for case in cases
        for fault in (*case.findall("failure"), *case.findall("error"))
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped - len(failures), "skipped": skipped, "failures": failures}


def fitting_batches(env: Row) -> list[int]:
    """The batches of the headline, halved until the GPU's free memory has room for them; and a word on who else is
    there."""
    if not env["gpu"]:
        return list(BATCHES)
    free, total = env["memory"]["free"], env["memory"]["total"]
    if others := env["nvml"].get("other_processes"):
        print(
            f"{others} other process{'es' if others > 1 else ''} on this GPU: figures are marked, and"
            f" {free / 2**30:.1f} GiB are free"
        )
    found: list[int] = []
    for wanted in BATCHES:
        batch = wanted
        while batch > 1 and batch * MEMORY > free:
            batch //= 2
        if batch != wanted:
            room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
            print(f"batch {wanted} wants {wanted * MEMORY / 2**30:.1f} GiB, and {room}: batch {batch} in its place")
        found += [batch] * (batch not in found)
    return found


def note(target: str, env: Row, **what: Any) -> Row:
    """A row of the command itself."""
    return {"target": target, "run": datetime.now(UTC).isoformat(timespec="seconds"), **what, "env": env}


def rows_of(path: Path, env: Row) -> list[Row]:
    """The rows of one machine, one torch and these sources."""

    def alike(other: Row) -> bool:
        try:
            return all(
                of(other) == of(env) for of in (machine_id, lambda e: e["source"], lambda e: e["packages"]["torch"])
            )
        except (KeyError, TypeError):  # not of this project
            return False

    return [r for r in read_rows(path)[0] if alike(r["env"])]


if __name__ == "__main__":
    sys.exit(main())
