"""Results as tables, made from the rows: what `bench` prints, and what pages and the report show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbldm_fast.errors import UserError

from .harness import approximate
from .rows import Row, latest, read_rows

MARK = "†"
Cell = str | tuple[str, Row]  # a text, or a figure with the row that it is from


class Table(NamedTuple):
    """A table before it is Markdown or HTML: columns of words, columns of figures, and what stands below."""

    words: Sequence[str]
    figures: Sequence[str]
    body: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table as GitHub renders it."""
        lines = [
            f"| {' | '.join((*self.words, *self.figures))} |",
            f"|{'---|' * len(self.words)}{'---:|' * len(self.figures)}",
        ]
        lines += [f"| {' | '.join(c if isinstance(c, str) else c[0] for c in row)} |" for row in self.body]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note))])


def missing(row: Row) -> str:
    """Why a row has no figure, or nothing."""
    return f"failed: {row['failed']}" if "failed" in row else str(row.get("absent", ""))


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that belong into one table: of one preset and number of steps, the largest first; ops and solvers stay
    together."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        found.setdefault((r.get("preset"), 0 if r["target"] == "solvers" else r.get("steps", 0)), []).append(r)
    order = ["paper", "template"]
    return [
        found[key] for key in sorted(found, key=lambda k: (order.index(k[0]) if k[0] in order else len(order), -k[1]))
    ]


def figure(text: str, row: Row) -> Cell:
    """A figure with its row, marked where the row has a remark on it."""
    return f"{text}{MARK if row.get('remarks') else ''}", row


def speedup(row: Row) -> str:
    """The factor, or why there is none."""
    if row.get("speedup"):
        return f"{row['speedup']['factor']:.2f}"
    if approximate(row):
        return "approximate"
    return "no parity" if row.get("parity") and not row["parity"]["ok"] else ""


def below(rows: Sequence[Row], what: str) -> list[str]:
    """What stands below a table: what was timed, where, with what; and who has no figure, and why."""
    row = next((r for r in rows if not missing(r)), rows[0])
    e = row["env"]
    where = e["gpu"] or f"{e['cpu']}, {e['threads']} threads, {e['cpu_capability']}"
    versions = ", ".join(
        f"{p} {v}"
        for p, v in e["packages"].items()
        if p in ("torch", "triton", "diffusers", "monai", "onnxruntime", "openvino")
    )
    counts = sorted({r["n"] for r in rows if "n" in r})
    n = (
        f", median of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} interleaved runs"
        if counts
        else ""
    )
    n += " (some were cut off)" if any(r.get("interrupted") for r in rows) else ""
    preset = f"Preset `{row['preset']}`, " if "preset" in row else ""
    code = f"commit {e['commit']}" if e["commit"] else f"sources {e.get('source')}"
    text = f"{preset}{what}{n}; {where}; {versions}; {code}, {row['run'][:10]}."
    reasons: dict[str, dict[str, None]] = {}
    for r in rows:
        if missing(r):
            reasons.setdefault(missing(r), {})[r["provider"]] = None
    absent = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    notes = [text[0].upper() + text[1:] + (f" Without a figure: {absent}." if absent else "")]
    if remarks := sorted({text for r in rows for text in r.get("remarks", []) if not text.startswith("spread")}):
        notes.append(f"{MARK}: {'; '.join(remarks)}, or an interquartile range of more than a tenth.")
    elif any(r.get("remarks") for r in rows):
        notes.append(f"{MARK}: an interquartile range of more than a tenth.")
    return notes


def count_steps(rows: Sequence[Row]) -> str:
    """The numbers of steps of some rows, in words."""
    counts = sorted({r["steps"] for r in rows})
    return f"{' and '.join(map(str, counts))} step{'s' if counts != [1] else ''}"


def sampling_table(rows: Sequence[Row]) -> Table:
    """A line per provider, a column of latency and of speed-up per batch; rows of one preset and number of steps."""
    batches = sorted({r["batch"] for r in rows})
    over = next((r["speedup"]["over"] for r in rows if r.get("speedup")), "its reference")
    found: dict[tuple[str, int], list[Cell]] = {
        (r["provider"], r["batch"]): [figure(f"{r['ms_per_step']:.2f}", r), speedup(r)] for r in rows if not missing(r)
    }
    names = dict.fromkeys(name for name, _ in found)
    body: list[list[Cell]] = [
        [name, *(cell for b in batches for cell in found.get((name, b), ["", ""]))] for name in names
    ]
    columns = [column for b in batches for column in (f"batch {b}: ms/step", f"× {over}")]
    made = [r for r in rows if r["batch"] == batches[0] and r.get("prepares")]
    compiling = {r["provider"]: r["compile_s"] for r in made if (r.get("compile_s") or 0) > 1}
    if compiling:
        columns.append("compiling, s")
        body = [[*line, f"{compiling[str(line[0])]:.0f}" if line[0] in compiling else ""] for line in body]
    return Table(["provider"], columns, body, below(rows, f"DDIM, {count_steps(rows)}"))


def training_table(rows: Sequence[Row]) -> Table:
    """A line per provider."""
    body: list[list[Cell]] = [
        [
            r["provider"],
            figure(f"{r['ms_per_step']:.1f}", r),
            f"{r['items_per_s']:.0f}",
            f"{r['minutes_per_100k_steps']:.0f}",
            speedup(r),
            "" if r["parity"]["error"] is None else f"{r['parity']['error']:.1e}",
        ]
        for r in rows
        if not missing(r)
    ]
    columns = ["ms/step", "items/s", "minutes of 100,000 steps", "× plain PyTorch float32", "loss differs by"]
    return Table(["provider"], columns, body, below(rows, f"batch {rows[0]['batch']}, {count_steps(rows)} a run"))


def kernels_table(rows: Sequence[Row]) -> Table:
    """A line for each op, problem and provider; the machine's ceilings first."""
    body: list[list[Cell]] = []
    for r in (r for r in rows if not missing(r)):
        line: list[Cell] = [
            r["op"],
            f"{r['shape']} {r['layout']} {r['dtype']}".strip(),
            r["provider"],
            figure(f"{1e6 * r['median_s']:.1f}", r),
        ]
        if r["op"] == "ceilings":
            body.append([*line, "", f"{r['rate']:.3g} {r['unit']}", "", ""])
            continue
        cold = f"{1e6 * r['cold']['median_s']:.1f}" if "cold" in r else ""
        of_copy = f"{r['of_copy']:.0%}" if r.get("of_copy") else ""
        body.append([*line, cold, f"{r['gb_s']:.1f}", of_copy, speedup(r)])
    return Table(
        ["op", "problem", "provider"], ["µs", "µs, cold", "GB/s", "of copy", "× eager"], body, below(rows, "each op")
    )


def startup_table(rows: Sequence[Row]) -> Table:
    """A line per provider: seconds to the first image, and what they are made of."""
    body: list[list[Cell]] = []
    for r in (r for r in rows if not missing(r)):
        parts = *(r["parts"][key] for key in ("import_s", "build_s", "run_s")), r["cold_cache_s"]
        body.append([r["provider"], figure(f"{r['median_s']:.1f}", r), *(f"{s:.1f}" for s in parts)])
    columns = ["first image, s", "importing", "building", "sampling and decoding", "first process of all"]
    return Table(["provider"], columns, body, below(rows, f"{count_steps(rows)}, fresh processes"))


def memory_table(rows: Sequence[Row]) -> Table:
    """A line per provider, a column per batch."""
    batches = sorted({r["batch"] for r in rows})
    found: dict[tuple[str, int], Cell] = {
        (r["provider"], r["batch"]): (f"{r['peak_bytes'] / 2**20:.0f}", r) for r in rows if not missing(r)
    }
    body: list[list[Cell]] = [
        [name, *(found.get((name, b), "") for b in batches)] for name in dict.fromkeys(name for name, _ in found)
    ]
    of = "tensors" if rows[0]["device"] == "cuda" else "the process beyond its imports"
    return Table(["provider"], [f"batch {b}: MiB" for b in batches], body, below(rows, f"peak of {of}"))


def scaling_table(rows: Sequence[Row]) -> Table:
    """Cost per image by number of images; of several processes the rate."""
    costs = [r for r in rows if "cost" in r]
    counts = [c["images"] for c in costs[0]["cost"]] if costs else []
    body: list[list[Cell]] = [
        [r["provider"], *((f"{c['ms_per_image']:.0f}{'*' if c['extrapolated'] else ''}", r) for c in r["cost"]), ""]
        for r in costs
    ]
    for r in (r for r in rows if "images_per_s" in r):
        name = f"{r['provider']}, {r['processes']} process{'es' if r['processes'] > 1 else ''}"
        body.append([name, *[""] * len(counts), (f"{r['images_per_s']:.2f}", r)])
    star = "*: beyond what was made in the time, by the median batch."
    columns = [f"{n} image{'s' if n > 1 else ''}: ms each" for n in counts]
    return Table(
        ["provider"],
        [*columns, "images/s"],
        body,
        [*below(rows, f"batch {rows[0]['batch']}, {count_steps(rows)}"), star],
    )


def solvers_table(rows: Sequence[Row]) -> Table:
    """A line per way to sample; on the front nobody is both faster and nearer. What has weights of its own, as peers'
    loops do, has no difference."""
    front = pareto(rows)
    body: list[list[Cell]] = []
    for r in (r for r in rows if not missing(r)):
        place = "front" if r["provider"] in front else ""
        errors: list[Cell] = [(f"{r[k]:.4f}", r) if k in r else "" for k in ("rms", "rms_unasked")]
        calls = f"{r.get('calls', r['steps']):.1f}".removesuffix(".0")
        body.append([r["provider"], calls, *errors, figure(f"{r['ms_per_image']:.1f}", r), place])
    note = below(rows, f"batch {rows[0]['batch']}, against DDIM with 1000 steps")
    return Table(["way"], ["calls", "RMS", "RMS, unasked", "ms/image", "Pareto"], body, note)


def few_table(rows: Sequence[Row]) -> Table:
    """The pipeline's own solver, which has DDIM's error by 50 calls or less, and the student, which has more, beside
    DDIM by ours and by each peer's loop; these have weights of their own, and the solver's error alone.

    Raises:
        UserError: rows without DDIM by 50 calls.
    """
    ddim = next((r for r in rows if r["provider"] == "ddim 50" and not missing(r)), None)
    if ddim is None:
        raise UserError("few: got rows without ddim 50, allowed are those of bench solvers")
    peers = [r for r in rows if r.get("family") == "peer" and "median_s" in r]
    quickest = min(peers, key=lambda r: float(r["median_s"]), default=ddim)
    body: list[list[Cell]] = []
    for r in (*peers, *(r for r in rows if r["provider"] in ("ddim 50", "unipc 12") or r["solver"] == "student")):
        own = [(f"{r[k]:.4f}", r) for k in ("rms", "rms_unasked") if k in r]
        errors: list[Cell] = [*own] if own else ["as ddim 50"] * 2
        times = f"{quickest['median_s'] / r['median_s']:.1f}"
        body.append([r["provider"], str(r["steps"]), *errors, figure(f"{r['ms_per_image']:.1f}", r), times])
    note = below(rows, f"batch {rows[0]['batch']}, float32, to images")
    return Table(["loop"], ["calls", "RMS", "RMS, unasked", "ms/image", f"× {quickest['provider']}"], body, note)


def pareto(rows: Sequence[Row]) -> set[str]:
    """The providers that no other beats in both time and error."""
    points = [(r["median_s"], r["rms"], r["provider"]) for r in rows if "rms" in r]
    return {
        name for s, e, name in points if not any(s2 <= s and e2 <= e and (s2, e2) != (s, e) for s2, e2, _ in points)
    }


def fastest(rows: Sequence[Row], dtype: str) -> tuple[Row | None, Row | None]:
    """Our fastest way of the smallest batch, and the fastest peer's, of those that agree with their reference."""
    batch = min(r["batch"] for r in rows)
    ok = [
        r
        for r in rows
        if r["batch"] == batch and "median_s" in r and (r["parity"] or {}).get("ok") and r["dtype"] == dtype
    ]
    own, peer = (
        min((r for r in ok if r.get("family") == family), key=lambda r: float(r["median_s"]), default=None)
        for family in ("ours", "peer")
    )
    return own, peer


def gpu_summary(rows: Sequence[Row], failed: Mapping[str, int] | None = None, left: Sequence[str] = ()) -> str:
    """What the rows of one GPU say, in the order of what matters, with every failure.

    `failed`: parts that ended with another exit code than 0; `left`: what was not done.
    """
    checks, parity = _checked(rows)
    parts = ["## " + (rows[0]["env"]["gpu"] or rows[0]["env"]["cpu"]) if rows else "Nothing was measured."]
    if checks:
        bad = [r for r in checks if not r.get("ok") and "absent" not in r]
        skipped = sum("absent" in r for r in checks)
        parts.append(f"Checks: {len(checks) - len(bad) - skipped} passed, {skipped} skipped, {len(bad)} failed.")
        parts += [f"- FAIL {r['check']}: {r.get('failed') or off(r)}" for r in bad]
    for r in parity:
        cut = "cut off, until then " if r.get("code", 0) is None else ""
        said = f"{r['passed']} passed, {r['skipped']} skipped, {len(r['failures'])} failed in {r['seconds']:.0f} s"
        parts.append(f"{r['part']}: {cut}{said}.")
        parts += [f"- FAIL {line}" for line in r["failures"][:12]]
    of: dict[str, list[Row]] = {}
    for row in latest([r for r in rows if r["target"] in (*TABLES, "launches")]):
        of.setdefault(row["target"], []).append(row)
    if any(not missing(r) for r in of.get("sampling", [])):
        parts.append(gpu_table(groups(of["sampling"])[0]).markdown())
    for r in of.get("launches", []):
        model = r["modelled"]["launches"]
        found = f"{r['launches']:.0f} launches ({model} modelled), {r['us']:.0f} µs of kernels"
        parts.append(f"A step, batch {r['batch']}, {r['dtype']}: {found}.")
    parts += [TABLES[target](of[target]).markdown() for target in ("training", "kernels") if target in of]
    parts += [
        f"- FAILED {r['target']} {r['provider']}: {r['failed']}"
        for name in TABLES
        for r in of.get(name, [])
        if "failed" in r
    ]
    if failed:
        parts.append(f"Parts that failed: {', '.join(f'{name} (exit {code})' for name, code in failed.items())}.")
    if left:
        parts.append(f"Not done, the same command goes on: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


def _checked(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The checks and the parts of the tests that were run last, of the sources that were last checked: names come and
    go."""
    checks = [r for r in rows if r["target"] == "checks"]
    last = [r for r in checks if r["env"]["source"] == checks[-1]["env"]["source"]]
    parity = {r["part"]: r for r in rows if r["target"] == "parity"}
    return list({r["check"]: r for r in last}.values()), list(parity.values())


def off(check: Row) -> str:
    """How far a check was off."""
    return f"error {check['error']:.1e}, allowed {check['allowed']:.1e}"


def gpu_table(rows: Sequence[Row]) -> Table:
    """A line per batch and provider: what sampling costs on a GPU, with its memory and its error beside it."""
    body: list[list[Cell]] = []
    for r in sorted((r for r in rows if not missing(r)), key=lambda r: float(r["batch"])):
        p = r["parity"]
        error = "" if not p else "not finite" if p["error"] is None else f"{p['error']:.0e}"
        peak = f"{r['peak_bytes'] / 2**20:.0f}" if r.get("peak_bytes") else ""
        figures = figure(f"{r['ms_per_step']:.3f}", r), f"{r['batch'] / r['median_s']:.1f}", peak, error, speedup(r)
        body.append([str(r["batch"]), r["provider"], *figures])
    over = next((r["speedup"]["over"] for r in rows if r.get("speedup")), "its reference")
    columns = ["ms/step", "samples/s", "peak MiB", "error", f"× {over}"]
    return Table(["batch", "provider"], columns, body, below(rows, f"DDIM, {count_steps(rows)}"))


def gpus(folder: Path) -> list[list[Row]]:
    """The rows of each GPU that has some in `folder`, a folder of row files per machine.

    Raises:
        ValueError: a file with a line that is not a row.
    """
    found = []
    for machine in sorted(p for p in folder.iterdir() if p.is_dir()):
        read = [read_rows(file) for file in sorted(machine.glob("*.jsonl"))]
        if fault := next((f for _, faults in read for f in faults), None):
            raise UserError(fault)
        found += [rows] if (rows := [r for of_file, _ in read for r in of_file if r["env"]["gpu"]]) else []
    return found


def gpus_table(folder: Path) -> Table:
    """A line per GPU that has rows in `folder`: what ran on it, and what it was timed at."""
    body: list[list[Cell]] = []
    for rows in gpus(folder):
        checks, parity = _checked(rows)
        checks = [r for r in checks if "absent" not in r]
        timed = {
            (r["batch"], r["provider"]): r
            for r in latest([r for r in rows if r["target"] == "sampling"])
            if "ms_per_step" in r
        }

        def cell(batch: int, key: str, form: str, timed: dict[tuple[int, str], Row] = timed) -> str:
            found = [timed.get((batch, f"FastSampler loop-graph {dtype}")) for dtype in ("float32", "float16")]
            return ", ".join(
                f"{r[key]:{form}}{f' ({speedup(r)}×)' * bool(r.get('speedup'))}" if r else "-" for r in found
            )

        env, day = rows[-1]["env"], max(r["run"] for r in rows)[:10]
        body.append(
            [
                env["gpu"],
                f"{sum(bool(r.get('ok')) for r in checks)} of {len(checks)}",
                f"{sum(r['passed'] for r in parity)} of {sum(r['passed'] + len(r['failures']) for r in parity)}"
                + ", cut off" * any(r.get("code", 0) is None for r in parity),
                cell(1, "ms_per_image", ".0f"),
                cell(64, "images_per_s", ".0f"),
                f"torch {env['packages'].get('torch')}, triton {env['packages'].get('triton')}, {day}",
            ]
        )
    columns = ["checks", "tests", "batch 1: ms/latent", "batch 64: latents/s", "with"]
    return Table(["measured on", *columns], [], body)


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "kernels": kernels_table,
    "sampling": sampling_table,
    "training": training_table,
    "export": sampling_table,
    "memory": memory_table,
    "startup": startup_table,
    "scaling": scaling_table,
    "volumes": sampling_table,
    "solvers": solvers_table,
}
