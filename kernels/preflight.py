"""The T4 gate: compile every kernel specialization that the presets use, with no GPU, and read what came out.

    python -m sbldm_fast.kernels.preflight --sm 75

This stands in for a T4 until one is measured: the kernels are compiled, not run. Registers and local memory are read
from the binary (cuobjdump's resource usage), load widths and `.f64` from the PTX. budgets.toml says what a kernel may
cost. gate.jsonl holds the worst figures of each kernel with a digest of what they were read from, so that `--changed`
compiles only what is new.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.errors import UserError

from ._backend import HAS_TRITON, triton
from ._specializations import LAUNCHES, TYPES, Specialization, specializations

HERE = Path(__file__).parent
GATE = HERE.parent / "benchmarks" / "gate.jsonl"
Job = tuple[Specialization, str, int]  # with the dtype and the architecture
REGISTERS = 65536  # per SM, of every architecture here
# resident warps, resident blocks and bytes of shared memory of an SM
ARCHITECTURES = {
    75: (32, 16, 65536),
    80: (64, 32, 167936),
    86: (48, 16, 102400),
    89: (48, 24, 102400),
    90: (64, 32, 233472),
    100: (64, 32, 233472),
}


@dataclass
class Report:
    """What one specialization became on one architecture."""

    name: str
    kernel: str
    dtype: str
    sm: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    load: int = 0
    f64: int = 0
    warps: int = 0
    cubin: int = 0
    fault: str = ""


def compile_one(s: Specialization, dtype: str, sm: int) -> Report:
    """Compile for one architecture and read the binary."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.disable_line_info = True  # the size of a cubin should not depend on where this file lies
    report = Report(s.name, s.kernel, dtype, sm)
    try:
        source = ASTSource(getattr(importlib.import_module(s.module), s.kernel), s.signature, s.constants, s.attributes)
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": s.num_warps})
    except Exception as error:  # whatever the compiler raises is the finding
        report.fault = f"does not compile: {str(error).strip().splitlines()[-1][:120]}"
        return report
    usage, ptx = _resource_usage(built.asm["cubin"]), built.asm["ptx"]
    report.registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    report.spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    report.shared = built.metadata.shared
    report.f64 = len(re.findall(r"\.f64", ptx))
    report.load = max(
        (int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+) ", ptx)),
        default=0,
    )
    report.cubin = len(built.asm["cubin"])
    report.warps = _resident_warps(sm, report.registers, report.shared, s.num_warps)
    report.fault = _fault(report, s.wide)
    return report


def _resident_warps(sm: int, registers: int, shared: int, num_warps: int) -> int:
    # registers are given out to warps in lots of 256; CUDA C programming guide, table of technical specifications
    most_warps, most_blocks, shared_bytes = ARCHITECTURES[sm]
    by_registers = REGISTERS // (-(-32 * max(registers, 1) // 256) * 256 * num_warps)
    by_shared = shared_bytes // shared if shared else most_blocks
    return min(most_blocks, most_warps // num_warps, by_registers, by_shared) * num_warps


@functools.cache
def budgets() -> dict[str, dict[str, int]]:
    """budgets.toml: what a kernel may cost, with the defaults filled in."""
    read = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text())
    default = read.pop("default")
    return {"default": default} | {kernel: default | own for kernel, own in read.items()}


def _fault(r: Report, wide: bool) -> str:
    budget, got = budgets().get(r.kernel, budgets()["default"]), asdict(r)
    over = [
        f"{k} {got[k]} > {budget[k]}" for k in ("registers", "spilled", "shared", "f64", "cubin") if got[k] > budget[k]
    ]
    under = [f"{k} {got[k]} < {budget[k]}" for k in ("load",) * wide + ("warps",) if got[k] < budget[k]]
    return ", ".join(over + under)


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout


def jobs_of(sms: Iterable[int]) -> list[Job]:
    """What is to be compiled for these architectures; a T4 has no bfloat16.

    Raises:
        RuntimeError: nothing: launches.json is empty.
    """
    jobs = [
        (s, TYPES[dtype], sm)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for s in specializations(dtype)
        for sm in sms
        if dtype != torch.bfloat16 or sm >= 80
    ]
    if not jobs:
        raise RuntimeError(f"{LAUNCHES.name} names no launch: benchmarks/record.py writes it")
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every kernel keeps its budget, 1 if one does not, 2 where nothing can be compiled."""
    options, sms = _parse(argv)
    if not HAS_TRITON:
        print("preflight: triton is not installed, nothing can be compiled", file=sys.stderr)
        return 2
    jobs = jobs_of(sms)
    try:
        rows = proven_rows() if options.changed else []
        if rows:
            check_gate(rows, jobs)
    except UserError as fault:
        if not options.json:
            print(f"preflight: {fault}; make gate writes it anew", file=sys.stderr)
            return 1
        print(f"preflight: {fault}; all of it is made anew", file=sys.stderr)
        rows = []
    proven = {r["kernel"] for r in rows}
    jobs = [job for job in jobs if job[0].kernel not in proven]
    show = _json if options.json else _line
    if options.json:
        for r in rows:
            print(json.dumps(r))
    else:
        columns = f"{'regs':>4} {'spill':>5} {'shared':>6} {'load':>4} {'.f64':>4} warps/SM cubin"
        print(f"{'kernel':24} {'dtype':5} {'sm':>3} {columns} launch")
    reports = []
    with ProcessPoolExecutor() as pool:
        for report in pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4) if jobs else ():
            reports.append(report)
            if report.fault or not options.worst:
                print(show(report), flush=True)
    if options.worst:
        for kernel, sm in dict.fromkeys((r.kernel, r.sm) for r in reports):
            print(show(_worst([r for r in reports if (r.kernel, r.sm) == (kernel, sm)])))
    failures = sum(bool(r.fault) for r in reports)
    if proven:
        print(f"{len(proven)} kernels are as {GATE.name} proves them, one compiled again", file=sys.stderr)
    print(f"{len(jobs)} kernels compiled for sm {options.sm}, {failures} failed; compiled, not run", file=sys.stderr)
    return 1 if failures else 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[int]]:
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.kernels.preflight", description=__doc__.splitlines()[0])
    every = ", ".join(map(str, ARCHITECTURES))
    parser.add_argument("--sm", default=every.replace(" ", ""), help="architectures, e.g. 75 or 75,80 (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of the table")
    parser.add_argument(
        "--worst",
        action="store_true",
        help="one line for each kernel and architecture: the worst figure in each column",
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help="compile only what gate.jsonl does not prove; with --json, print its proven rows too",
    )
    options = parser.parse_args(argv)
    try:
        sms = [int(v) for v in options.sm.split(",")]
    except ValueError:
        sms = []
    if not sms or set(sms) - set(ARCHITECTURES):
        parser.error(f"--sm: got {options.sm}, allowed are {every}")
    return options, sms


def _line(r: Report) -> str:
    kernel = r.kernel.strip("_").removesuffix("_kernel")
    figures = f"{r.registers:>4} {r.spilled:>5} {r.shared:>6} {r.load:>3}B {r.f64:>4} {r.warps:>8} {r.cubin:>5}"
    line = f"{kernel:24} {r.dtype:5} {r.sm:>3} {figures} {r.name}"
    return line + (f"  FAIL: {r.fault}" if r.fault else "")


def _json(r: Report) -> str:
    return json.dumps(asdict(r) | {"digest": digests()[r.kernel], "triton": triton.__version__})


@functools.cache
def digests() -> dict[str, str]:
    """Of each kernel, a digest of what its figures depend on beside Triton: the sources of its op, launches, budgets.

    An op's sources are its file and those of its imports in this folder that hold code for a GPU.
    """
    recorded = LAUNCHES.read_text().splitlines()
    files = ("preflight.py", "_specializations.py", "budgets.toml", "crossover.json")
    shared = [(HERE / name).read_text() for name in files]
    found: dict[str, str] = {}
    for path in HERE.glob("*.py"):
        calls = [line for line in recorded if line.startswith(f'["{path.stem}",')]
        digest = hashlib.sha256("\n".join([*_gpu_sources(path.stem, set()), *calls, *shared]).encode()).hexdigest()
        found |= dict.fromkeys(re.findall(r"def (\w+_kernel)\(", path.read_text()), digest[:12])
    return found


def _gpu_sources(name: str, seen: set[str]) -> list[str]:
    # the source of a module and of those that it imports code for a GPU or a constant from, each once
    if name in seen:
        return []
    seen.add(name)
    text = (HERE / f"{name}.py").read_text()
    found = [text]
    for other, names in re.findall(r"^from \.(\w+) import (\([^)]*\)|.*)$", text, re.MULTILINE):
        if "@triton.jit" in (HERE / f"{other}.py").read_text() or re.search(r"\b[A-Z][A-Z_]+\b", names):
            found += _gpu_sources(other, seen)
    return found


def proven_rows() -> list[dict[str, Any]]:
    """The rows of gate.jsonl whose kernel has these sources, this Triton, and keeps its budget on every architecture.

    Raises:
        UserError: a line that is not a row.
    """
    sound: dict[str, list[dict[str, Any]]] = {}
    for i, line in enumerate(GATE.read_text(errors="replace").splitlines() if GATE.exists() else ()):
        try:
            row = json.loads(line)
            report = Report(**{field.name: row[field.name] for field in fields(Report)})
            made_of = row["digest"], row["triton"]
            over = report.fault or _fault(report, wide=False)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{GATE.name}, line {i + 1}, is not a row of this command") from error
        if not over and made_of == (digests().get(report.kernel), triton.__version__):
            sound.setdefault(report.kernel, []).append(row)
    return [r for found in sound.values() if sorted(r["sm"] for r in found) == sorted(ARCHITECTURES) for r in found]


def check_gate(rows: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> None:
    """Compile the kernel with the fewest launches again: it must be as `rows` say.

    The digests say that nothing has changed; this says that the compiler makes of it what it made then.

    Raises:
        UserError: it is not.
    """
    counts = Counter(job[0].kernel for job in jobs)
    kernel = min({r["kernel"] for r in rows}, key=lambda name: (counts[name], name))
    sm = jobs[0][2]
    now = _worst([compile_one(*job) for job in jobs_of([sm]) if job[0].kernel == kernel])
    (row,) = (r for r in rows if (r["kernel"], r["sm"]) == (kernel, sm))
    wrong = [f"{key} is {value} and was {row[key]}" for key, value in asdict(now).items() if row[key] != value]
    if wrong:
        raise UserError(f"{GATE.name} is not what is compiled now: {kernel}, {', '.join(wrong)}")


def _worst(reports: Sequence[Report]) -> Report:
    r = reports[0]
    top = {key: max(getattr(r, key) for r in reports) for key in ("registers", "spilled", "shared", "f64", "cubin")}
    low = {key: min(getattr(r, key) for r in reports) for key in ("load", "warps")}
    return Report(f"worst of {len(reports)}", r.kernel, "all", r.sm, **top, **low)


if __name__ == "__main__":
    sys.exit(main())
