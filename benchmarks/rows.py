"""The rows that results are kept in: what a machine is, how rows are written, read and chosen.

python -m sbldm_fast.benchmarks.rows                      the environment block of this machine
python -m sbldm_fast.benchmarks.rows FILE FOLDER          add the rows of a file from anywhere to benchmarks/results
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.errors import UserError
from sbldm_fast.machine import environment

from .nvml import Gpu
from .schema import fault_of

Row = dict[str, Any]  # as JSON has it; `schema.RowSchema` says what its keys are
# what tells two problems of a suite apart; of the others: preset, batch, steps, processes
PROBLEM = {
    "kernels": ("op", "shape", "layout", "dtype"),
    "solvers": ("preset", "batch"),
    "launches": ("preset", "batch", "dtype"),
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
            if fault := fault_of(row):
                faults.append(f"{path}, line {number}: {fault}: left out")
            else:
                rows.append(row | {"at": f"{path.name}:{number}"})
        elif line and not isinstance(row, dict):
            faults.append(f"{path}, line {number} is not a row: cut off or damaged, left out")
    return rows, faults


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


def row_key(row: Row) -> tuple[Any, ...]:
    """What a row measured, without who did it and when."""
    keys = PROBLEM.get(row["target"], ("preset", "batch", "steps", "processes"))
    return row["target"], *(row.get(key) for key in keys)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last run of each problem; those of one run stay together."""
    last: dict[tuple[Any, ...], str] = {}
    for row in rows:
        last[row_key(row)] = max(row["run"], last.get(row_key(row), ""))
    return [row for row in rows if row["run"] == last[row_key(row)]]


def _git(*arguments: str) -> str:
    try:
        command = ("git", "-C", str(Path(__file__).parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
