"""Interleaved timing, and the rows that results are kept in."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.doctor import environment


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, `rounds` times; every other round runs backwards, so that drift favours nobody.

    The cases must be warm. On CUDA each is bracketed by a synchronisation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in list(cases) if i % 2 == 0 else list(cases)[::-1]:
            _synchronise()
            start = time.perf_counter()
            cases[name]()
            _synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(raw: Sequence[float]) -> dict[str, Any]:
    """Median, p10, p90, interquartile range and n of `raw`, in its unit, with the raw values."""
    t = torch.tensor(raw, dtype=torch.float64)
    p10, q1, median, q3, p90 = torch.quantile(t, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    return {"median_s": median, "p10_s": p10, "p90_s": p90, "iqr_s": q3 - q1, "n": len(raw), "raw_s": [round(v, 9) for v in raw]}


def machine() -> dict[str, Any]:
    """The environment block of a row: machine, versions, commit, clocks and temperature where NVML tells them."""
    info = environment()
    info["commit"] = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", ".", ":!results") else "")
    if info["gpu"]:
        fields = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,clocks_throttle_reasons.active"
        values = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split(", ")
        info["nvidia_smi"] = dict(zip(fields.split(","), values, strict=False))  # empty where nvidia-smi is missing
    return info


def machine_name(info: dict[str, Any]) -> str:
    """The folder of a machine's results: its GPU, or its processor and cores."""
    name = info["gpu"] or f"{info['cpu']} {info['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def append(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSONL file; what is there stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def _git(*arguments: str) -> str:
    return _run("git", "-C", str(Path(__file__).parent), *arguments)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
