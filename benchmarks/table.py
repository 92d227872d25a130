"""Results as the tables of the README, rendered from the rows and never typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each preset, batch, steps and provider."""
    keep = {(r["preset"], r["batch"], r["steps"], r["provider"]): r for r in rows}
    return list(keep.values())


def sampling_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line per provider, a column of latency and of speed-up per batch, and the conditions below."""
    batches = sorted({r["batch"] for r in rows})
    lines = [
        "| provider | " + " | ".join(f"batch {b}: ms/step | × diffusers" for b in batches) + " |",
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
    versions = ", ".join(f"{p} {v}" for p, v in e["packages"].items() if p in ("torch", "triton", "diffusers"))
    lines += [
        "",
        f"Preset `{r['preset']}`, DDIM, {r['steps']} steps, median of {r['n']} interleaved runs; "
        f"{where}; {versions}; commit {e['commit']}.",
    ]
    return "\n".join(lines)
