"""Results as the tables of the README, rendered from the rows and never typed.

python -m sbldm_fast.benchmarks.table README.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbldm_fast.files import whole_file


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the last run of each preset, batch and steps."""
    last = {(r["preset"], r["batch"], r["steps"]): r["run"] for r in rows}
    return [r for r in rows if r["run"] == last[r["preset"], r["batch"], r["steps"]]]


def sampling_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line per provider, a column of latency and of speed-up per batch, and the conditions below."""
    batches = sorted({r["batch"] for r in rows})
    over = next((r["speedup"]["over"] for r in rows if r.get("speedup")), "its reference")
    lines = [
        "| provider | " + " | ".join(f"batch {b}: ms/step | × {over}" for b in batches) + " |",
        "|---|" + "---:|---:|" * len(batches),
    ]
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = []
        for b in batches:
            r = next((r for r in rows if r["provider"] == name and r["batch"] == b), None)
            if r is None or "absent" in r:
                cells += [r["absent"] if r else "", ""]
            else:
                factor = f"{r['speedup']['factor']:.2f}" if r["speedup"] else "no parity" if not r["parity"]["ok"] else ""
                cells += [f"{r['ms_per_step']:.2f}", factor]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    r = next(r for r in rows if "absent" not in r)
    e = r["env"]
    where = e["gpu"] or f"{e['cpu']}, {e['threads']} threads, {e['cpu_capability']}"
    versions = ", ".join(f"{p} {v}" for p, v in e["packages"].items() if p in ("torch", "triton", "diffusers", "onnxruntime"))
    lines += [
        "",
        f"Preset `{r['preset']}`, DDIM, {r['steps']} steps, median of {r['n']} interleaved runs; "
        f"{where}; {versions}; commit {e['commit']}, {r['run'][:10]}.",
    ]
    return "\n".join(lines)


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line per provider."""
    over = "plain PyTorch float32"
    lines = [f"| provider | ms/step | items/s | minutes of 100,000 steps | × {over} | loss differs by |", "|---|" + "---:|" * 5]
    for r in rows:
        if "absent" in r:
            lines.append(f"| {r['provider']} | {r['absent']} | | | | |")
            continue
        factor = f"{r['speedup']['factor']:.2f}" if r["speedup"] else "no parity"
        lines.append(f"| {r['provider']} | {r['ms_per_step']:.1f} | {r['items_per_s']:.0f} | {r['minutes_per_100k_steps']:.0f} | "
                     f"{factor} | {r['parity']['error']:.1e} |")  # fmt: skip
    r = next(r for r in rows if "absent" not in r)
    e = r["env"]
    where = e["gpu"] or f"{e['cpu']}, {e['threads']} threads, {e['cpu_capability']}"
    lines += ["", f"Preset `{r['preset']}`, batch {r['batch']}, median of {r['n']} interleaved runs of {r['steps']} steps; {where}; "
              f"torch {e['packages']['torch']}; commit {e['commit']}, {r['run'][:10]}."]  # fmt: skip
    return "\n".join(lines)


def render(readme: str | Path) -> str:
    """The text of `readme`, each block `<!-- KIND: FILE -->` ... `<!-- end KIND -->` (latency, training) rendered from FILE beside it."""
    readme = Path(readme)

    def block(match: re.Match[str]) -> str:
        table = TABLES[match[1]](latest(read_rows(readme.parent / match[2])))
        return f"<!-- {match[1]}: {match[2]} -->\n{table}\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- (latency|training): (\S+) -->.*?<!-- end \1 -->", block, readme.read_text(), flags=re.DOTALL)


TABLES = {"latency": sampling_table, "training": training_table}


if __name__ == "__main__":
    text = render(sys.argv[1])
    with whole_file(sys.argv[1]) as aside:
        aside.write_text(text)
