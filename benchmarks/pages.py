"""Pages whose figures are rendered from the rows and never typed.

python -m sbldm_fast.benchmarks.pages PAGE.md ...     `make results` names them all
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from sbldm_fast.errors import UserError
from sbldm_fast.files import whole_file

from .rows import Row, latest, read_rows
from .schema import described
from .table import (
    TABLES,
    Cell,
    Table,
    below,
    count_steps,
    fastest,
    few_table,
    figure,
    gpu_summary,
    gpus,
    gpus_table,
    groups,
)
from .verdicts import interval

NO_MORE = " cudnn.benchmark"  # a setting that was tried once and found nothing faster (LOG 25): no provider has it now


def render(readme: str | Path) -> str:
    """The text of `readme`, each block `<!-- SUITE: FILE -->` ... `<!-- end SUITE -->` rendered from FILE beside it.

    Beside the suites there are `few`, solvers that matter beside peers, `headline`, a sentence, `latency`, a table of
    several files, and of a folder `gpus`, a line per GPU, and `gpu`, a section per GPU; `schema` is the keys of a row,
    `ablation` the tables of an ablation.

    Raises:
        ValueError: a file with a line that is not a row.
    """
    readme = Path(readme)

    def block(match: re.Match[str]) -> str:
        kind, file = match.groups()
        if kind == "schema":
            made = schema_table().markdown()
        elif kind == "ablation":
            from sbldm_fast.evaluation.ablation_tables import render_tables

            made = render_tables([json.loads(line) for line in (readme.parent / file).read_text().splitlines()])
        elif kind == "latency":
            made = latency_table([readme.parent / name for name in file.split()]).markdown()
        elif kind == "gpus":
            made = gpus_table(readme.parent / file).markdown()
        elif kind == "gpu":
            made = "\n".join(gpu_summary(rows) for rows in gpus(readme.parent / file))
        elif kind == "volumes":  # one table a problem
            made = "\n\n".join(TABLES[kind](rows).markdown() for rows in groups_of(readme.parent / file))
        else:
            chosen = largest_group(readme.parent / file)
            tables = TABLES | {"few": few_table}
            made = headline(chosen) if kind == "headline" else tables[kind](chosen).markdown()
        return f"<!-- {kind}: {file} -->\n{made}\n<!-- end {kind} -->"

    kinds = "|".join([*TABLES, "few", "headline", "latency", "gpu", "gpus", "schema", "ablation"])
    return re.sub(rf"<!-- ({kinds}): (\S+(?: \S+)*) -->.*?<!-- end \1 -->", block, readme.read_text(), flags=re.DOTALL)


def largest_group(file: Path) -> list[Row]:
    """The rows of a file that its table shows: those of the largest preset and number of steps, of the last run."""
    return groups_of(file)[0]


def groups_of(file: Path) -> list[list[Row]]:
    """The rows of a file, of the last run of each, by preset and number of steps.

    Raises:
        UserError: a line that is not a row, or no row.
    """
    rows, faults = read_rows(file)
    if faults:
        raise UserError(faults[0])
    if not rows:
        raise UserError(f"{file}: got no rows, allowed is a file with one or more")
    return groups(latest(rows))


def latency_table(files: Sequence[Path]) -> Table:
    """What a reader asks first: a line for each file's machine, its smallest and largest batch and each precision in
    which both we and a peer were timed, with the fastest of either in the last run.

    A file has the rows of one machine. `~`: the intervals of the medians meet, so that the difference may be chance.

    Raises:
        UserError: a file with a line that is not a row.
    """
    body: list[list[Cell]] = []
    notes: list[str] = []
    for file in files:
        rows = [r for r in largest_group(file) if not r.get("decodes") and not r["provider"].endswith(NO_MORE)]
        shown: list[Row] = []
        batches = [r["batch"] for r in rows]
        for batch, dtype in product((min(batches), max(batches)), ("float32", "float16", "bfloat16")):
            own, peer = fastest([r for r in rows if r["batch"] == batch], dtype)
            if own is None or peer is None:
                continue
            shown += own, peer
            machine = own["env"]["gpu"] or f"{own['env']['cpu']}, {own['env']['threads']} threads"
            cells = [figure(f"{r['ms_per_image']:.{0 if r['ms_per_image'] > 20 else 1}f}", r) for r in (own, peer)]
            ours, theirs = ((cell, r["provider"]) for cell, r in zip(cells, (own, peer), strict=True))
            ratio = f"{peer['median_s'] / own['median_s']:.2f}{'' if apart(own, peer) else ' ~'}"
            body.append([machine, dtype, ours[1], theirs[1], str(batch), ours[0], theirs[0], ratio])
        notes += below(shown, f"DDIM, {count_steps(shown)}") if shown else []
    if any(str(line[-1]).endswith("~") for line in body):
        notes.append("~: the confidence intervals of both medians meet, so the difference may be chance.")
    words = ["machine", "precision", "fastest of ours", "fastest peer"]
    return Table(
        words, ["batch", "ours: ms/latent", "peer: ms/latent", "peer / ours"], body, list(dict.fromkeys(notes))
    )


def apart(one: Row, other: Row) -> bool:
    """Whether the intervals of two rows do not meet."""
    (low, high), (other_low, other_high) = (interval(r["raw_s"]) for r in (one, other))
    return high < other_low or other_high < low


def headline(rows: Sequence[Row]) -> str:
    """The answer in a sentence, in float32, of the smallest batch: our fastest way beside diffusers' eager loop and the
    fastest peer.

    Raises:
        ValueError: no peer, or none of ours, in these rows.
    """
    batch = min(r["batch"] for r in rows)
    own, peer = fastest(rows, "float32")
    eager = next((r for r in rows if r["batch"] == batch and r["provider"] == "diffusers" and "median_s" in r), None)
    if own is None or peer is None or eager is None:
        raise UserError("headline: got rows without a peer or without ours, allowed are rows with both")
    e = own["env"]
    where = e["gpu"] or f"{e['cpu']}, {e['threads']} threads"
    beside = (
        f"{peer['median_s'] / own['median_s']:.2f} times as fast as"
        if apart(own, peer)
        else "within the noise as fast as"
    )
    return (
        f"**{own['ms_per_image']:.0f} ms a latent** with `{own['provider']}`: {eager['median_s'] / own['median_s']:.2f}"
        f" times as fast as diffusers' eager loop ({eager['ms_per_image']:.0f} ms), and {beside} the fastest peer timed"
        f" ({peer['provider']}, {peer['ms_per_image']:.0f} ms); {own['steps']} DDIM steps, batch {batch}, float32,"
        f" {where}."
    )


def schema_table() -> Table:
    """The keys of a row, as the schema has them."""
    body = [[f"`{name}`", kind.replace("|", "or"), unit, meaning] for name, kind, unit, meaning in described()]
    return Table(["key", "type", "unit", "meaning"], [], body)


if __name__ == "__main__":
    try:
        for page in sys.argv[1:]:
            text = render(page)
            with whole_file(page) as aside:
                aside.write_text(text)
    except (ValueError, OSError) as error:
        sys.exit(f"pages: {error}")
