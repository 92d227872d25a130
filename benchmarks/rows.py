"""The rows that results are kept in: what a machine is, how rows are written, read and chosen.

python -m sbldm_fast.benchmarks.rows                      the environment block of this machine
python -m sbldm_fast.benchmarks.rows FILE FOLDER          add the rows of a file from anywhere to benchmarks/results
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.errors import UserError
from sbldm_fast.machine import environment
from sbldm_fast.models.config import PRESETS

from .nvml import Gpu

Row = dict[str, Any]
# what tells two problems of a suite apart; of the others: preset, batch, steps, processes
PROBLEM = {
    "kernels": ("op", "shape", "layout", "dtype"),
    "solvers": ("preset", "batch"),
    "launches": ("preset", "batch", "dtype"),
}
Rule = tuple[Callable[[Any], bool], str]
LEAST, MOST = 1e-12, 1e21  # of what is drawn and divided by: within these a quotient of two is finite
DEEPEST = 20


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def _each(rule: Rule, least: int = 0) -> Rule:
    return (
        lambda value: isinstance(value, list) and len(value) >= least and all(map(rule[0], value)),
        f"a list, each {rule[1]}",
    )


def _of(**rules: Rule) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(key in value and rule[0](value[key]) for key, rule in rules.items())

    return holds, f"a mapping with {', '.join(f'{key} ({rule[1]})' for key, rule in rules.items())}"


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"one of {', '.join(names)}"


TEXT: Rule = (lambda value: isinstance(value, str), "a text")
TRUTH: Rule = (lambda value: isinstance(value, bool), "true or false")
NUMBER: Rule = (_number, "a number")
ABOVE: Rule = (lambda value: _number(value) and LEAST <= value <= MOST, "a number above 0")
COUNT: Rule = (lambda value: type(value) is int and 1 <= value <= 10**9, "1 or more")
NAMES: Rule = (
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
    "a mapping of texts",
)
SHARE: Rule = _of(ok=TRUTH, error=_or_none(NUMBER), against=TEXT)
PARITY: Rule = (
    lambda value: SHARE[0](value) and (value["ok"] or _number(value.get("allowed"))),
    f"{SHARE[1]}, allowed (a number)",
)
FLOAT, PRESET = _one_of("float32", "float16", "bfloat16"), _one_of(*PRESETS)
ENV = {
    "gpu": _or_none(TEXT),
    "cpu": TEXT,
    "commit": TEXT,
    "cores": COUNT,
    "threads": COUNT,
    "cpu_capability": TEXT,
    "packages": NAMES,
}
# what holds of a key that a table, a picture or a verdict uses, where it is there
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("run", "provider", "preset", "dtype", "op", "layout", "solver", "unit", "check", "part", "absent", "failed"),
        TEXT,
    ),
    "device": TEXT,
    "env": _of(**ENV),
    **dict.fromkeys(("batch", "steps", "processes", "n"), COUNT),
    **dict.fromkeys(
        ("median_s", "p10_s", "p90_s", "ms_per_step", "ms_per_image", "images_per_s", "items_per_s"), ABOVE
    ),
    **dict.fromkeys(("minutes_per_100k_steps", "gb_s", "rate", "moved", "flops", "cold_cache_s"), ABOVE),
    **dict.fromkeys(("rms", "error", "allowed", "seconds", "passed", "skipped", "us", "launches", "again"), NUMBER),
    **dict.fromkeys(("compile_s", "of_copy", "peak_bytes", "code"), _or_none(NUMBER)),
    **dict.fromkeys(("ok", "approximate", "interrupted"), TRUTH),
    **dict.fromkeys(("remarks", "failures"), _each(TEXT)),
    "raw_s": _each(ABOVE, 1),
    "parity": _or_none(PARITY),
    "speedup": _or_none(_of(over=TEXT, factor=ABOVE)),
    "clock_mhz": _of(median=ABOVE),
    "cold": _of(median_s=ABOVE),
    "work": _of(flops=ABOVE, bytes=ABOVE),
    "modelled": _of(launches=NUMBER),
    "parts": _of(import_s=NUMBER, build_s=NUMBER, run_s=NUMBER),
    "cost": _each(_of(images=COUNT, ms_per_image=ABOVE, extrapolated=TRUTH), 1),
    "energy": _or_none(_of(joules=NUMBER, joules_above_idle=NUMBER, idle_watts=NUMBER)),
}
# of one target alone: `shape` is a list elsewhere, and nothing reads it
OWN: dict[str, dict[str, Rule]] = {
    "kernels": {"shape": TEXT},
    "checks": {"env": _of(**ENV, source=TEXT)},
    "training": {"parity": PARITY},
    "memory": {"peak_bytes": NUMBER},
}
# the keys that every row of a target has, and those of a row with a figure
LOOP, TIMED = ("provider", "preset", "batch", "steps"), ("median_s", "p10_s", "p90_s", "n", "raw_s")
ALWAYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sampling", "export", "training", "startup", "memory", "solvers"), LOOP),
    "scaling": (*LOOP, "processes"),
    "kernels": ("provider", "op", "shape", "layout", "dtype"),
    "checks": ("check",),
    "parity": ("part", "passed", "skipped", "failures", "seconds"),
    "launches": ("batch", "dtype", "modelled", "launches", "us"),
}
FIGURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sampling", "export"), (*TIMED, "dtype", "ms_per_step", "ms_per_image", "parity")),
    "training": (*TIMED, "ms_per_step", "items_per_s", "minutes_per_100k_steps", "parity"),
    "startup": (*TIMED, "parts", "cold_cache_s"),
    "memory": ("peak_bytes", "device"),
    "solvers": (*TIMED, "solver", "rms", "ms_per_image"),
    "kernels": (*TIMED, "gb_s"),
    "checks": ("ok", "error", "allowed"),
}


def head(target: str, **what: Any) -> Row:
    """What all rows of one run share: target, time of the run, its settings, the environment."""
    return {"target": target, "run": datetime.now(UTC).isoformat(timespec="seconds"), **what, "env": machine()}


def machine() -> Row:
    """The environment block of a row: machine, versions, commit, sources, and of a GPU what NVML tells."""
    info = environment()
    changed = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    info["commit"] = _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    info["source"] = source()
    info["load"] = round(os.getloadavg()[0], 2)  # of the last minute: what else ran, and what this run has done before
    if info["gpu"]:
        info["nvml"] = Gpu().state()
        info["memory"] = dict(zip(("free", "total"), torch.cuda.mem_get_info(), strict=True))
    return info


@cache
def source() -> str:
    """A hash of the package's Python files, for machines that have no git."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    names = ("kernels", "sbldm_fast", "export", "benchmarks") if (root / "pyproject.toml").exists() else (".",)
    files = {
        p.relative_to(root).as_posix().removeprefix("sbldm_fast/"): p for n in names for p in (root / n).rglob("*.py")
    }
    for name in sorted(files):  # an installed package has its folders side by side
        digest.update(name.encode() + files[name].read_bytes())
    return digest.hexdigest()[:12]


def machine_name(env: Row) -> str:
    """The folder of a machine's results: its GPU, or its processor and cores.

    Raises:
        ValueError: there is nothing in the names that a folder could be called by.
    """
    name = env["gpu"] or f"{env['cpu']} {env['cores']} cores"
    folder = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
    if not folder:
        raise UserError(f"env: got a machine {name!r}, allowed is a name with letters or digits")
    return folder


def machine_id(env: Row) -> str:
    """What must be equal for two rows to be compared: the processor with its threads and vector width, and the GPU."""
    cpu = f"{env['cpu']} {env.get('cpu_model', '')}".strip()
    return ", ".join(
        filter(None, [env["gpu"], cpu, f"{env['cores']} cores", f"{env['threads']} threads", env["cpu_capability"]])
    )


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Add rows to a JSONL file and sync it; what is there stays, and a line that was cut off stays a line of its
    own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            f.write(b"" if f.read(1) == b"\n" else b"\n")
        f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        f.flush()
        os.fsync(f.fileno())


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of a JSONL file, and a sentence for each line that is none: cut off, or with a value that nothing here
    can use.

    Raises:
        ValueError: the file cannot be read.
    """
    path, rows, faults = Path(path), [], []
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise UserError(f"{path} cannot be read: not a file")
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a number of thousands of digits is the first
            row = None
        if isinstance(row, dict) and {"target", "run"} <= set(row):
            if fault := _fault(row):
                faults.append(f"{path}, line {number}: {fault}: left out")
            else:
                rows.append(row | {"at": f"{path.name}:{number}"})
        elif line and not isinstance(row, dict):
            faults.append(f"{path}, line {number} is not a row: cut off or damaged, left out")
    return rows, faults


def _fault(row: Row) -> str:
    """What of a row no table, picture or verdict can use, or ''."""
    target = row["target"]
    if not isinstance(target, str):
        return f"target: got {reprlib.repr(target)}, allowed is {TEXT[1]}"
    rules = RULES | OWN.get(target, {})
    needed = {"env", *ALWAYS.get(target, ()), *(key for key in rules if key in row)}
    if not {"failed", "absent"} & set(row) or {"median_s", "raw_s", "rms"} & set(row):
        ceiling = target == "kernels" and row.get("op") == "ceilings"
        needed |= {*TIMED, "rate", "unit"} if ceiling else set(FIGURES.get(target, ()))
    if "flops" in row:
        needed |= {"moved", "again", "launches"}
    if "work" in row:
        rules |= {"dtype": FLOAT, "preset": PRESET}
    for key in sorted(needed):
        if key not in row or not rules[key][0](row[key]):
            return f"{key}: got {reprlib.repr(row[key]) if key in row else 'none'}, allowed is {rules[key][1]}"
    return _strange(row, "error" if target == "checks" else "")  # a check that is off beyond measure says so by it


def _strange(value: Any, open_: str, key: str = "", depth: int = 0) -> str:
    """What in a value, however deep, cannot be drawn or written, or ''; a float of the key `open_` may be anything."""
    if depth > DEEPEST:
        return f"{key}: got more than {DEEPEST} levels, allowed are fewer"
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{key!a}: got half a character, allowed is text"
    if _number(value) and not abs(value) <= MOST and not (key == open_ and isinstance(value, float)):
        return f"{key}: got {reprlib.repr(value)}, allowed is a number of at most {MOST:g}"
    inside = value.items() if isinstance(value, dict) else ((key, v) for v in value) if isinstance(value, list) else ()
    return next((why for k, v in inside if (why := _strange(k, "", k, depth) or _strange(v, open_, k, depth + 1))), "")


def distribute(file: str | Path, folder: str | Path) -> tuple[dict[str, int], list[str]]:
    """Add the rows of `file` to `folder/MACHINE/TARGET.jsonl`, each once.

    Returns:
        How many were new in each file, and a sentence for each line that is no row.

    Raises:
        ValueError: the file cannot be read or has no rows, or a row a target or a machine that no file can be called
            by.
    """
    rows, faults = read_rows(file)
    if not rows:
        raise UserError(f"{file} has no rows{''.join(f'; {fault}' for fault in faults[:1])}")
    if odd := next((r["target"] for r in rows if not re.fullmatch("[a-z]+", r["target"])), None):
        raise UserError(f"{file}: got a row of target {odd!r}, allowed is a word of small letters")
    added: dict[str, int] = {}
    for name in dict.fromkeys(f"{machine_name(row['env'])}/{row['target']}.jsonl" for row in rows):
        path = Path(folder) / name
        known = {json.dumps(r | {"at": ""}) for r in read_rows(path)[0]} if path.exists() else set()
        mine = [r | {"at": ""} for r in rows if f"{machine_name(r['env'])}/{r['target']}.jsonl" == name]
        new = [{k: v for k, v in r.items() if k != "at"} for r in mine if json.dumps(r) not in known]
        if new:
            append(path, new)
        added[name] = len(new)
    return added, faults


def main(arguments: Sequence[str]) -> int:
    """The environment block of this machine, or the rows of a file into a folder; exit code 2 for what cannot be
    used."""
    if not arguments:
        print(json.dumps(machine()))
        return 0
    if len(arguments) != 2:
        print("usage: python -m sbldm_fast.benchmarks.rows [FILE FOLDER]", file=sys.stderr)
        return 2
    try:
        added, faults = distribute(*arguments)
    except (ValueError, OSError) as error:
        print(f"rows: {error}", file=sys.stderr)
        return 2
    for name, new in added.items():
        print(f"{new} new rows in {name}")
    for line in faults:
        print(line, file=sys.stderr)
    return 0


def problem(row: Row) -> tuple[Any, ...]:
    """What a row measured, without who did it and when."""
    keys = PROBLEM.get(row["target"], ("preset", "batch", "steps", "processes"))
    return row["target"], *(row.get(key) for key in keys)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last run of each problem; those of one run stay together."""
    last: dict[tuple[Any, ...], str] = {}
    for row in rows:
        last[problem(row)] = max(row["run"], last.get(problem(row), ""))
    return [row for row in rows if row["run"] == last[problem(row)]]


def _git(*arguments: str) -> str:
    try:
        command = ("git", "-C", str(Path(__file__).parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
