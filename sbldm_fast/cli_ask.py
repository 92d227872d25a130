"""The options that a pipeline brings: what it can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from .cli_options import say
from .errors import UserError


def find_covariates(pipeline: str) -> tuple[Any, ...]:
    """What the pipeline of that name or in that folder can be asked for; reads its configuration, no weights."""
    from .files import read_json
    from .models.config import UNetConfig
    from .sampling.pipeline import find_folder

    return UNetConfig.from_dict(read_json(find_folder(pipeline) / "unet" / "config.json")).covariates


class Asking(TyperCommand):
    """A command whose `PIPELINE --help` also lists what the pipeline can be asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's; keeps the words for the help, which is shown before they are understood."""
        ctx.meta["words"] = [word for word in args if not word.startswith("-")]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The covariates of the first word that is a pipeline."""
        for word in ctx.meta.get("words", []):
            try:
                covariates = find_covariates(word)
            except (UserError, OSError):
                continue
            taken = {option for p in self.params for option in p.opts}
            rows = [
                (option, f"{c.allowed}{f'; {c.definition}' if c.definition else ''}")
                if (option := f"--{c.name.replace('_', '-')}") not in taken
                else (c.name, f"{c.allowed}; a column of --table alone, {option} is an option of every pipeline")
                for c in covariates
            ]
            with formatter.section(f"What {word} can be asked for (left out: unknown)" if rows else f"{word}: nothing"):
                formatter.write_dl(rows or [("", "it is unconditional")])
            return


def ask(
    pipeline: str,
    words: list[str],
    table: Path | None,
    n: int | None,
    default: int,
    *,
    drawn: int | None = None,
    extrapolate: bool = False,
) -> tuple[dict[str, list[Any]], int]:
    """What is asked of each image, by the words that are no options of the command, a table, or drawn with the seed
    `drawn`; and how many images there are.

    Raises:
        typer.BadParameter: a word that is no option of the pipeline's, or one without a value.
        ValueError: as `read_requests` and `join_requests`.
    """
    from .sampling.requests import draw_requests, join_requests, read_requests

    if pipeline.startswith("-"):
        raise typer.BadParameter(
            f"got {pipeline!r}, allowed is a pipeline before what it is asked for", param_hint="PIPELINE"
        )
    # a folder that is no pipeline is refused in words when it is loaded
    known = find_covariates(pipeline) if words or table or drawn is not None else ()
    named = _parse(words, {c.name: c for c in known}, pipeline)
    rows: dict[str, list[Any]] = {}
    if table is not None:
        rows = read_requests(table, known, extrapolate)
        n = n or len(next(iter(rows.values())))
        if lacking := [c.name for c in known if c.name not in rows and c.name not in named]:
            say(f"{table} has no column {', '.join(lacking)}: unknown for every image")
    n = n or default
    if drawn is not None:
        rows = {k: v for k, v in draw_requests(known, n, drawn).items() if k not in named}
    return join_requests(rows, named, n), n


def _parse(words: list[str], known: dict[str, Any], pipeline: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word, equals, value = waiting.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in known:
            options = ", ".join(f"--{k.replace('_', '-')}" for k in known) or "none: it is unconditional"
            raise typer.BadParameter(f"got {word!r}, {pipeline} can be asked for {options}", param_hint="OPTIONS")
        if name in named:
            raise typer.BadParameter("given twice", param_hint=word)
        if not equals:
            if not waiting:
                raise typer.BadParameter(f"got nothing, allowed is {known[name].allowed}", param_hint=word)
            value = waiting.pop(0)
        try:
            number = float("nan" if known[name].values else value)
        except ValueError:
            raise typer.BadParameter(f"got {value!r}, allowed is {known[name].allowed}", param_hint=word) from None
        named[name] = value if known[name].values else number  # a value out of range is refused with the others
    return named
