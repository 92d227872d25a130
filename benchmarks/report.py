"""One HTML page from rows: needs no network, opens on a phone, and links every figure to the row that it is from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from sbldm_fast.errors import UserError
from sbldm_fast.files import whole_file

from .charts import Link, by_batch, cost_chart, pareto_chart, roofline_chart, waterfall
from .harness import failures
from .pages import headline
from .rows import Row, latest, machine_id, read_rows
from .t4 import SOURCES, errors, measured_ceilings, steps_table
from .table import TABLES, Table, groups

GATE = Path(__file__).with_name("gate.jsonl")
TITLES = {
    "sampling": (
        "Sampling",
        (
            "Noise to latent, ms/step of the whole batch; × is over eager float32 diffusers, for what agreed with its"
            " reference."
        ),
    ),
    "training": ("Training", "A step of the UNet, the same maths in every loop."),
    "export": ("Export", "The same UNet in ONNX Runtime. int8 is approximate by design and has no speed-up."),
    "startup": (
        "First image of a fresh process",
        "From its start to a decoded image; compiled code is cached, but for the last column.",
    ),
    "memory": ("Memory", "The peak of a process of its own that samples and decodes one batch."),
    "energy": (
        "Energy",
        (
            "NVML's counter over two seconds or more of each provider; above idle: less what the board takes doing"
            " nothing."
        ),
    ),
    "scaling": (
        "Scaling",
        "What n images cost, importing and compiling included; and images/s of processes that share the machine.",
    ),
    "solvers": (
        "Steps and error",
        "Bundled weights; the difference of images in [-1, 1] from the converged ones of the same noise.",
    ),
    "kernels": (
        "Kernels",
        "Each op beside PyTorch, torch.compile and a copy of its bytes; cold: after the caches were written over.",
    ),
}


def write_report(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the page of the row files, or folders of them, `paths` to `out`.

    Returns:
        How many rows, of which machines, and `faults`: lines that were no rows, providers that failed or were wrong.

    Raises:
        ValueError: a path that cannot be read, or no row in any of them.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for path in paths:
        for file in sorted(f for f in path.rglob("*.jsonl") if f.is_file()) if path.is_dir() else [path]:
            found, more = read_rows(file)
            rows += [
                row | {"at": f"{file.parent.name}/{row['at']}", "id": f"r{len(rows) + i}"}
                for i, row in enumerate(r for r in found if r["target"] in TABLES)
            ]
            faults += more
    if not rows:
        raise UserError(f"no rows in {', '.join(map(str, paths))}; sbldm-fast bench sampling --quick makes some")
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(machine_id(row["env"]), []).append(row)
    shown = {
        name: latest(of)
        for name, of in sorted(machines.items(), key=lambda item: max(r["run"] for r in item[1]), reverse=True)
    }

    def link(row: Row) -> str:
        return f"#{row['id']}"

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        machines=[_machine(name, of, link) for name, of in shown.items()],
        faults=faults,
        link=link,
        t4=_t4(shown),
        ours=lambda line: any(not isinstance(cell, str) and cell[1].get("family") == "ours" for cell in line),
        date=datetime.now(UTC).date().isoformat(),
    )
    with whole_file(out) as aside:
        aside.write_text(page)
    for of in shown.values():
        faults += failures(of)
    return {"out": str(out), "rows": sum(map(len, shown.values())), "machines": list(shown), "faults": faults}


def _machine(name: str, rows: Sequence[Row], link: Link) -> dict[str, Any]:
    """What the page shows of one machine."""
    of = {target: [r for r in rows if r["target"] == target] for target in TABLES}
    sampling = groups(of["sampling"])[0] if of["sampling"] else []
    tables = [(*TITLES[target], TABLES[target](group)) for target in TITLES for group in groups(of.get(target, []))]
    if energy := energy_table(sampling):
        tables.insert(len(tables) - 1, (*TITLES["energy"], energy))
    charts = enumerate(_charts(of, sampling, link))
    return {
        "name": name,
        "about": _about(rows),
        "headline": _headline(sampling),
        "charts": [(caption, _own_ids(svg, f"{name} {i}")) for i, (caption, svg) in charts if svg],
        "tables": tables,
        "failures": failures(rows),
        "env": json.dumps(max(rows, key=lambda r: str(r["run"]))["env"], indent=1),
        "rows": [(r["id"], _title(r), json.dumps({k: v for k, v in r.items() if k != "id"}, indent=1)) for r in rows],
    }


def _charts(of: dict[str, list[Row]], sampling: list[Row], link: Link) -> Iterator[tuple[str, str | None]]:
    """The pictures with their captions; None where there are no rows for one."""
    stages = "What each stage is worth: the smallest batch, from a textbook's loop to ours; factors over the first bar."
    batches = "Latency and throughput against the batch; dashed: in half precision."
    if sampling:
        for dtype in dict.fromkeys(r["dtype"] for r in sampling if "dtype" in r):
            yield stages, waterfall(sampling, dtype, link)
        yield batches, by_batch(sampling, link)
    if on := measured_ceilings(of["kernels"]):
        drawn = roofline_chart([*of["kernels"], *sampling], on, link)
        yield "Roofline with the ceilings measured on this machine.", drawn
    front = "Steps against error: nothing is both faster and nearer than a colored point."
    yield front, pareto_chart(of["solvers"], link)
    yield "What an image costs by how many are made; hollow: extrapolated.", cost_chart(of["scaling"], link)


def _about(rows: Sequence[Row]) -> str:
    """What tells machines of one name apart: when they were measured, and what with."""
    days = sorted({str(r["run"])[:10] for r in rows})
    parts = [days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"]
    torches, commits = (
        sorted({str(v) for v in found if v})
        for found in ((r["env"]["packages"].get("torch") for r in rows), (r["env"].get("commit") for r in rows))
    )
    parts += [f"{what} {', '.join(found)}" for what, found in (("torch", torches), ("commit", commits)) if found]
    return "; ".join([*parts, f"{len(rows)} row{'s' if len(rows) > 1 else ''}"])


def _own_ids(svg: str, picture: str) -> str:
    """The picture with names that no other picture of the page has; links to rows stay."""
    prefix = hashlib.sha256(picture.encode()).hexdigest()[:6]
    for own in set(re.findall(r'\bid="([^"]+)"', svg)):
        svg = re.sub(rf'(\bid="|"#|\(#){re.escape(own)}(?=["\)])', rf"\g<1>{prefix}-{own}", svg)
    return svg


def _headline(rows: Sequence[Row]) -> str:
    try:
        return headline(rows).replace("*", "").replace("`", "")
    except ValueError:  # no peer, or none of ours, in these rows
        return ""


def energy_table(rows: Sequence[Row]) -> Table | None:
    """Joules an image of each provider that NVML counted, or None."""
    body: list[list[Any]] = []
    for r in (r for r in rows if r.get("energy")):
        joules, above = (r["energy"][key] / r["batch"] for key in ("joules", "joules_above_idle"))
        body.append([r["provider"], (f"{joules:.2f}", r), f"{above:.2f}", f"{r['energy']['idle_watts']:.0f}"])
    return Table(["provider"], ["J an image", "above idle", "idle, W"], body) if body else None


def _t4(shown: dict[str, list[Row]]) -> dict[str, Any]:
    measured = [name for name in shown if "T4" in name]
    gate = [json.loads(line) for line in GATE.read_text().splitlines()]
    keys = ("registers", "spilled", "shared", "load", "f64", "warps", "cubin")
    lines = [[r["kernel"].strip("_"), r["name"], *(str(r[key]) for key in keys)] for r in gate if r["sm"] == 75]
    wrong: list[list[Any]] = []
    for name, rows in shown.items():
        found = errors(rows)
        for what, of in (
            ("ops", [e for e in found if e.row["target"] == "kernels"]),
            ("steps", [e for e in found if e.row["target"] == "sampling"]),
        ):
            if of:
                best, worst = min(of, key=lambda e: e.factor), max(of, key=lambda e: e.factor)
                span = [
                    (f"{best.factor:.2f}", best.row),
                    f"{median(e.factor for e in of):.2f}",
                    (f"{worst.factor:.2f}", worst.row),
                ]
                wrong.append([name, what, str(len(of)), *span, worst.what])
    return {
        "measured": (
            ", ".join(measured)
            or "Nothing: no row of a T4 exists yet. benchmarks/kaggle_t4.ipynb makes one on a hosted T4."
        ),
        "gate": Table(["kernel", "launches of the presets"], [key.replace("f64", ".f64") for key in keys], lines),
        "gate_note": (
            "Compiled for sm 75 by Triton and ptxas without a GPU; the worst of each column over all launches of the"
            " presets, loads and sizes in bytes, warps an SM. Compiled, not run."
        ),
        "steps": steps_table(),
        "sources": SOURCES,
        "errors": Table(["machine", "of"], ["n", "least", "median", "most", "which"], wrong),
    }


def _title(r: Row) -> str:
    what = " ".join(str(r[key]) for key in ("target", "op", "shape", "dtype", "provider") if r.get(key))
    size = f", batch {r['batch']}, {r.get('steps')} steps" if "batch" in r else ""
    return f"{r['at']}: {what}{size}"
