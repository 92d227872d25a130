"""The commands that measure: bench, bench --compare, report."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, place, say
from .errors import MissingExtra

Suite = StrEnum(
    "Suite", ["kernels", "sampling", "training", "export", "memory", "startup", "scaling", "solvers", "volumes"]
)


# The options of bench bear the names of what they choose; `_suite_arguments` gives each suite those that it takes.
Suites = Annotated[list[Suite] | None, typer.Argument(help="What to measure.")]
Quick = Annotated[bool, typer.Option("--quick", help="A minute or less: few steps and rounds, nothing that compiles.")]
Preset = Annotated[
    str | None, typer.Option(help="paper, template, covariates, volume, demo or brain (default: paper).")
]
Counts = Annotated[str | None, typer.Option(help="Solver or training steps, e.g. 50 or 10,50.")]
BatchSizes = Annotated[str | None, typer.Option(help="Batch sizes, e.g. 1,8.")]
Rounds = Annotated[int | None, typer.Option(help="Interleaved repetitions.")]
Seconds = Annotated[
    float | None, typer.Option(help="After which the rounds of a problem end; of each process of scaling.")
]
Processes = Annotated[str | None, typer.Option(help="Numbers of processes of scaling, e.g. 1,2.")]
Ops = Annotated[list[str] | None, typer.Option(help="An op to time; may be given again (default: all).")]
Large = Annotated[bool | None, typer.Option("--large/--no-large", help="Also ops on 64 MB and more.")]
Compiled = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Also through torch.compile, which takes minutes.")
]
Dtypes = Annotated[str | None, typer.Option(help="float32, float16, bfloat16 (default: float32 and the native half).")]
Short = Annotated[bool | None, typer.Option("--short", help="Our ways, to images too, and the plain loops alone.")]
Energy = Annotated[bool | None, typer.Option("--energy", help="Also joules, where NVML counts them.")]
RowFile = Annotated[
    Path | None,
    typer.Option("-o", "--out", callback=place, help="JSONL file to append to (default: results/MACHINE/SUITE.jsonl)."),
]
TwoFiles = Annotated[
    tuple[Path, Path] | None, typer.Option("--compare", metavar="BEFORE AFTER", help="Two row files to judge instead.")
]


def bench(
    suites: Suites = None,
    quick: Quick = False,
    preset: Preset = None,
    steps: Counts = None,
    batch: BatchSizes = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    processes: Processes = None,
    op: Ops = None,
    large: Large = None,
    compiled: Compiled = None,
    dtype: Dtypes = None,
    short: Short = None,
    energy: Energy = None,
    out: RowFile = None,
    compare: TwoFiles = None,
    as_json: Json = False,
) -> None:
    """Measure in turns, against peers, gated by parity. Example: sbldm-fast bench sampling --quick

    Rows are written as they are made. Exit code 1: a provider failed, or differs from what it must equal; 130:
    interrupted (Ctrl-C), with the rows of what had three rounds by then.

    With --compare each provider is FAST, SLOW, SAME (within 5 %, or the same samples), AMBIGUOUS (the samples do not
    tell), WRONG (failed, or differs from what it must equal), GONE or NEW (in one file only). Exit code 1: one is SLOW,
    WRONG or GONE, or of another machine, or a line is not a row.
    """
    if compare is not None:
        _compare(*compare, as_json)
        return
    if not suites:
        raise typer.BadParameter(
            f"got none, allowed are {', '.join(Suite)}, or --compare BEFORE AFTER", param_hint="SUITES"
        )
    if seconds is not None and not seconds > 0:
        raise typer.BadParameter(f"got {seconds}, allowed is above 0", param_hint="--seconds")
    given = {
        "preset": preset,
        "steps": _sizes(steps, "steps"),
        "batch": _sizes(batch, "batch"),
        "rounds": rounds,
        "seconds": seconds,
        "processes": _sizes(processes, "processes"),
        "op": op,
        "large": large,
        "compile": compiled,
        "dtype": dtype.split(",") if dtype is not None else None,
        "short": short,
        "energy": energy,
    }
    _measure([suite.value for suite in suites], quick, {k: v for k, v in given.items() if v is not None}, out, as_json)


def _measure(suites: list[str], quick: bool, given: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Run the suites one after another, write their rows, and print them or their tables."""
    warnings.filterwarnings("ignore", message=".*a run of .* starts at t = ")  # times are measured, not images
    from sbldm_fast.benchmarks.harness import failures, interrupted
    from sbldm_fast.benchmarks.rows import append, machine, machine_name
    from sbldm_fast.benchmarks.suites import SUITES
    from sbldm_fast.benchmarks.table import TABLES, groups

    asked = {}  # all of it is understood before any of it runs
    for name in suites:
        run, briefly = SUITES[name]
        asked[name] = run, (briefly if quick else {}) | _suite_arguments(run, given, name)
    wrong, stopped = [], False
    for name, (run, arguments) in asked.items():
        file, rows = out or Path("results") / machine_name(machine()) / f"{name}.jsonl", []
        for row in run(**arguments, say=say):
            append(file, [row])
            rows.append(row)
        wrong += failures(rows)
        tables = [] if as_json else [TABLES[name](group).markdown() for group in groups(rows)]
        print("\n".join(json.dumps(row) for row in rows) if as_json else "\n\n".join(tables))
        say(f"{len(rows)} rows appended to {file}; sbldm-fast report {file.parent} shows them")
        if stopped := interrupted(rows):
            break
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    if wrong or stopped:
        raise typer.Exit(130 if stopped else 1)


def _suite_arguments(run: Callable[..., Any], given: dict[str, Any], suite: str) -> dict[str, Any]:
    """What was typed, by option, as the arguments of a suite."""
    known = inspect.signature(run).parameters
    names = {"preset": "preset_name", "op": "ops", "compile": "compiled", "dtype": "dtypes"}
    names |= {"batch": "batches"} if "batches" in known else {}
    found: dict[str, Any] = {}
    for option, value in given.items():
        name = names.get(option, option)
        if name not in known:
            raise typer.BadParameter(f"got {value}, allowed with suite {suite} is none", param_hint=f"--{option}")
        single = isinstance(value, list) and not isinstance(known[name].default, tuple)
        if single and len(value) > 1:
            raise typer.BadParameter(f"got {value}, allowed with suite {suite} is one number", param_hint=f"--{option}")
        found[name] = value[0] if single else value
    return found


def _compare(before: Path, after: Path, as_json: bool) -> None:
    from sbldm_fast.benchmarks.rows import read_rows
    from sbldm_fast.benchmarks.verdicts import bad, verdict_table
    from sbldm_fast.benchmarks.verdicts import compare as judge

    (old, faults), (new, more) = read_rows(before), read_rows(after)
    verdicts = judge(old, new)
    print(json.dumps([v._asdict() for v in verdicts]) if as_json else verdict_table(verdicts))
    for line in (*faults, *more):
        print(line, file=sys.stderr)
    if not verdicts:
        print("no timed rows to compare", file=sys.stderr)
    if bad(verdicts) or faults or more or not verdicts:
        raise typer.Exit(1)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Row files, or folders of them (default: results).")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", callback=place, help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write results as one HTML page that needs nothing else. Example: sbldm-fast report results -o report.html"""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("report", "matplotlib", "bench")
    from sbldm_fast.benchmarks.report import write_report

    done = write_report(results or [Path("results")], out)
    for line in done["faults"]:
        print(line, file=sys.stderr)
    print(json.dumps(done) if as_json else f"{done['rows']} rows of {'; '.join(done['machines'])}: {out}")
    if done["faults"]:
        raise typer.Exit(1)


def _sizes(text: str | None, option: str) -> list[int] | None:
    if text is not None and not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise typer.BadParameter(f"got {text}, allowed are whole numbers with commas between", param_hint=f"--{option}")
    return None if text is None else [int(b) for b in text.split(",")]
