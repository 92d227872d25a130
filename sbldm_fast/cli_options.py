"""Options and messages that several commands share."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Scheduler = StrEnum("Scheduler", ["ddim", "ddpm", "dpm", "unipc", "flow"])
Prediction = StrEnum("Prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])


def place(path: Path | None) -> Path | None:
    """What `-o` names; nothing, as from an unset variable of a shell, would be the current folder."""
    if path == Path():
        raise typer.BadParameter("got nothing or the current folder, allowed is a path with a name")
    return path


Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
OutFolder = Annotated[Path, typer.Option("-o", "--out", callback=place, help="Folder to write.")]
PipelineFolder = Annotated[
    str, typer.Argument(help="A pipeline folder, or demo or demo-student for the bundled weights.")
]
Steps = Annotated[
    int | None,
    typer.Option(help="Solver steps, 1 to 1000 (default: 12 of UniPC, 50 of others, a distilled pipeline's own)."),
]
Solver = Annotated[Scheduler | None, typer.Option(help="Default: the pipeline's own, UniPC. dpm needs diffusers.")]
Eta = Annotated[float, typer.Option(help="Of DDIM: 0 draws nothing, 1 has the noise of DDPM.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]


def say(text: str) -> None:
    """Print progress or a warning to stderr, beside what a program may read."""
    print(text, file=sys.stderr, flush=True)


def count(number: int, name: str) -> str:
    """The number with its noun: 1 slice, 2 slices."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
