"""The one oracle of the campaign: what must hold whatever is read, tried in a forked process that may hang, crash or
fill the memory."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, UNetConfig, VAEConfig, preset
from sbldm_fast.cli import main

NIGHTLY = os.environ.get("SBLDM_FAST_FUZZ") == "nightly"
SECRET = "ZZSECRET"  # planted in headers, it must come out nowhere
SECONDS = 20
MEMORY = 2**30  # bytes beyond what the process has
LONGEST = 2000  # characters of a message
NAN, INF, ABSENT = float("nan"), float("inf"), object()
VALUES: dict[str, Any] = {
    "minus-1": -1,
    "0": 0,
    "10^18": 10**18,
    "true": True,
    "text": "ZZ",
    "nested": [[8, 8]],
    "NaN": NAN,
    "Infinity": INF,
    "10^400": 10**400,
    "null": None,
    "mapping": {"a": 1},
    "absent": ABSENT,
    "1e308": 1e308,
    "nulls": [None] * 2,
    "10^18s": [10**18] * 2,
    "long": "Z" * 10**5,
    "path": "../../mine.txt",
}
Lie = bytes | Callable[[Path], object]
NO_FILES: dict[str, Lie] = {
    "missing": Path.unlink,
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "fifo": lambda p: (p.unlink(), os.mkfifo(p)),
    "zero": lambda p: (p.unlink(), p.symlink_to("/dev/zero")),
}


class Runs:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


def lay(path: Path, lie: Lie) -> None:
    """Put a lie in the place of a file."""
    lie(path) if callable(lie) else path.write_bytes(lie)


def lies(paths: str) -> list[Any]:
    """Places in a JSON file and what stands there instead; by night every value, else one of them in turn."""
    names, places = list(VALUES), paths.split()
    turns = [names if NIGHTLY else [names[i % len(names)]] for i in range(len(places))]
    return [
        pytest.param(p, VALUES[n], id=f"{p.replace('/', '.')}-{n}")
        for p, turn in zip(places, turns, strict=True)
        for n in turn
    ]


def replaced(content: Any, path: str, value: Any) -> Any:
    """`content` with another value, or none, at a path such as `slices/0/split`."""
    *way, last = (int(p) if p.isdecimal() else p for p in path.split("/"))
    inner = content
    for step in way:
        inner = inner[step]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return content


def change(file: Path, path: str, value: Any) -> None:
    """Replace a value in a JSON file."""
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))


class Outcome(NamedTuple):
    """How a call ended: `works`, `refused` (ValueError, OSError, exit code 1 or 2), or else what broke; with its text
    and the output."""

    how: str
    text: str
    said: str


def _child(call: Callable[[], Any], said: Path, tell: Connection) -> None:
    out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    logging.getLogger().handlers[:] = []  # pytest's; without one, warnings of loggers go to stderr
    gc.disable()  # it would touch, and so copy, all that the parent has
    torch.set_num_threads(1)  # the pool of the parent is not there
    if Path("/proc/self/statm").exists():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
    how, text = "works", ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            call()
        except SystemExit as stop:
            how, text = (
                ("refused", stop.code)
                if isinstance(stop.code, str)
                else ("refused", "")
                if stop.code in (1, 2)
                else (how, text)
            )
        except (ValueError, OSError, FloatingPointError) as error:
            how, text = "refused", str(error) or f"no text in {type(error).__name__}"
        except BaseException as error:
            how, text = f"{type(error).__name__}: {str(error)[:300]}", traceback.format_exc()[-1500:]
    print(*(w.message for w in warned), sep="\n", file=sys.stderr, flush=True)
    sys.stdout.flush()
    tell.send((how, text))


def attempt(call: Callable[[], Any], scratch: Path) -> Outcome:
    """Run `call` in a process of its own: `SECONDS` and `MEMORY` are all that it has."""
    if torch.cuda.is_available():
        pytest.skip("a process that knows CUDA cannot be forked; what is read does not depend on the device")
    said, context = scratch / "said.txt", multiprocessing.get_context("fork")
    said.unlink(missing_ok=True)
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(call, said, tell))
    process.start()
    tell.close()
    ended = hear.poll(SECONDS)  # a dead process closes its end, which counts as an answer
    try:
        how, text = hear.recv() if ended else (f"hangs: no end after {SECONDS} s", "")
    except EOFError:
        process.join(SECONDS)
        how, text = f"ended with {process.exitcode}", ""
    if not ended:
        process.kill()
    process.join(SECONDS)
    return Outcome(how, str(text), said.read_text(errors="replace") if said.exists() else "")


def command(*arguments: str | bytes | Path) -> Callable[[], None]:
    """The command line with these arguments."""

    def call() -> None:
        sys.argv = ["sbldm-fast", *(os.fsdecode(a) for a in arguments)]
        main()

    return call


def _tree(root: Path) -> dict[str, object]:
    """Everything below `root`, its content where it is a regular file."""
    found: dict[str, object] = {}
    folders = [str(root)]
    while folders:  # os.walk calls itself: it would not reach the end of folders that are made to be deep
        for entry in os.scandir(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            plain = entry.is_file(follow_symlinks=False)
            found[os.path.relpath(entry.path, root)] = (
                hash(Path(entry.path).read_bytes()) if plain else entry.stat(follow_symlinks=False).st_mode
            )
    return found


Oracle = Callable[..., Outcome]


@pytest.fixture
def holds(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Try a call that may write to `tmp_path / "out"` alone. `must`: `work`, `refuse`, or either, where an input is odd
    but no lie."""

    def check(call: Callable[[], Any], must: str = "") -> Outcome:
        (tmp_path / "mine.txt").write_text("of the user")
        before = {k: v for k, v in _tree(tmp_path).items() if k.partition("/")[0] != "out"}
        outcome = attempt(call, tmp_path_factory.getbasetemp())
        how, text, said = outcome
        after = {k: v for k, v in _tree(tmp_path).items() if k.partition("/")[0] != "out"}
        strange = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()] if (tmp_path / "out").is_dir() else []
        faults = {
            how: how not in ("works", "refused"),
            f"written outside the output: {strange}": strange,
            "header text came out": SECRET in text + said,
            "header text was written": any(SECRET.encode() in p.read_bytes() for p in written),
            "something unfinished is left over": any(re.fullmatch(r"\..*\.(part|old)", p.name) for p in written),
            "a traceback was printed": "Traceback" in said,
            "memory was all that stopped it": re.search(
                "MemoryError|[Uu]nable to allocate|can't allocate|not enough memory", text + said
            ),
            "a refusal without a reason": how == "refused" and text.strip() == "sbldm-fast:",
            f"a message of {len(text)} characters": len(text) > LONGEST,
            f"a message of {len(text.splitlines())} lines": how == "refused" and len(text.splitlines()) > 1,
            "control characters reach the terminal": re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said + text),
            "it was taken without a word": must == "refuse" and how == "works",
            "it was refused": must == "work" and how == "refused",
        }
        if wrong := [fault for fault, found in faults.items() if found]:
            pytest.fail("; ".join(wrong) + f"\n{text[-1500:]}\n{said[-1500:]}", pytrace=False)
        return outcome

    return check


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of few weights, to be copied."""
    vae = VAEConfig(
        sample_size=16, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    unet = UNetConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(4,),
        norm_num_groups=4,
        time_embed_dim=16,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "pipeline"
    Pipeline(AutoencoderKL(vae), UNet2D(unet), preset("demo").scheduler).save(path)
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many inputs of each kind were tried and held."""
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for how in ("passed", "failed"):
        for report in terminalreporter.stats.get(how, ()):
            if "hostile/" in report.nodeid and getattr(report, "when", "") == "call":
                kind = report.nodeid.partition("::test_")[2].partition("[")[0]
                tried[kind] += 1
                held[kind] += how == "passed"
    if tried:
        terminalreporter.write_line(f"hostile inputs: {sum(held.values())} of {sum(tried.values())} held")
        terminalreporter.write_line(", ".join(f"{kind} {held[kind]}/{n}" for kind, n in sorted(tried.items())))
