"""A T4 without a T4: the roofline model of each op and of a step, and how far the same model is from machines that were
measured.

python -m sbldm_fast.benchmarks.t4 > benchmarks/ROOFLINE.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .counts import Counts, count
from .rows import Row
from .suite_kernels import OPS, problems
from .table import Table


class Ceilings(NamedTuple):
    """What a machine can do: bytes/s (at least, at most), operations/s by dtype, seconds of the smallest launch."""

    bandwidth: tuple[float, float]
    flops: dict[str, float]
    launch: float


# No T4 has been measured for this project. 320e9 bytes/s, 8.1e12 and 65e12 operations/s at 1590 MHz are NVIDIA's data
# sheet. Under load the board's 70 W hold it near 990 MHz (ONNX Runtime's Stable Diffusion benchmarks lock it there),
# and a copy reaches 70 to 80 % of a data sheet's bandwidth: an assumption, as is the launch.
T4 = Ceilings((220e9, 250e9), {"float32": 5e12, "float16": 40e12}, 3e-6)
SOURCES = (
    "bandwidth 220 to 250 GB/s: 70 to 80 % of the data sheet's 320, assumed",
    (
        "arithmetic 5 (float32) and 40 (float16, tensor cores) Tflop/s: the data sheet's 8.1 and 65, scaled from 1590"
        " to the 990 MHz of 70 W"
    ),
    "a launch 3 µs, assumed",
)
# An H200, of which steps were measured but no ceilings: fitted to preset paper's, captured (results/nvidia-h200): 0.60
# to 0.62 ms for a step in float16 of one image, 1.06 of 64, 23.7 ms for decoding 64 in float32.
H200 = Ceilings((3.36e12, 3.84e12), {"float32": 22e12, "float16": 90e12}, 4.5e-6)


class Prediction(NamedTuple):
    """Seconds, at most and at least, and by what they are bound."""

    slow: float
    fast: float
    bound: str


def predict(moved: float, flops: float, launches: float, dtype: str, on: Ceilings) -> Prediction:
    """max(bytes / bandwidth, operations / rate, launches · launch): a lower bound, which assumes that nothing waits for
    anything else."""
    low, high = on.bandwidth
    times = {
        "launches": (launches * on.launch,) * 2,
        "memory": (moved / low, moved / high),
        "arithmetic": (flops / on.flops.get(dtype, on.flops["float32"]),) * 2,
    }
    bound = max(times, key=lambda k: times[k][0])
    return Prediction(*times[bound], bound)


def step(batch: int, dtype: torch.dtype, on: Ceilings = T4, preset_name: str = "paper") -> tuple[Prediction, Row]:
    """A step of `FastSampler`: the sum of the predictions of its launches, and what they do; operators as counted on
    meta tensors."""
    counted = count(batch, dtype, preset_name=preset_name)[0]
    work = {"launches": len(counted.work), "bytes": counted.bytes, "flops": counted.flops}
    return total(counted, str(dtype)[6:], on), work


def total(counted: Counts, dtype: str, on: Ceilings) -> Prediction:
    """The sum of the predictions of what was counted."""
    each = [predict(moved, flops, 1, dtype, on) for moved, flops in counted.work]
    bounds = {b: sum(p.slow for p in each if p.bound == b) for b in ("launches", "memory", "arithmetic")}
    return Prediction(sum(p.slow for p in each), sum(p.fast for p in each), max(bounds, key=lambda b: bounds[b]))


def measured_ceilings(rows: Sequence[Row]) -> Ceilings | None:
    """The ceilings that a machine's rows hold (`bench kernels` begins with them), or None."""
    found = {r["provider"]: r["rate"] for r in rows if r.get("op") == "ceilings" and "rate" in r}
    if not {"copy", "launch", "matmul float32"} <= set(found):
        return None
    flops: dict[str, float] = {}
    for name, rate in found.items():
        kind, _, dtype = name.partition(" ")
        if kind in ("matmul", "convolution"):
            flops[dtype] = max(rate, flops.get(dtype, 0.0))
    return Ceilings((found["copy"], found["copy"]), flops, 1 / found["launch"])


class Error(NamedTuple):
    """The model against a measurement; `factor` is measured over predicted."""

    what: str
    predicted_s: float
    measured_s: float
    factor: float
    row: Row


def errors(rows: Sequence[Row]) -> list[Error]:
    """How far the model, with the machine's own measured ceilings, is from our ops (on a CPU the reference's) and steps
    there."""
    on = measured_ceilings(rows)
    found = []
    for r in rows if on else ():
        mine = r["provider"] == ("ours" if r["env"]["gpu"] else "reference")
        if "median_s" not in r:
            continue
        if r["target"] == "kernels" and mine and "flops" in r:
            s = predict(r["moved"] + r["again"], r["flops"], r["launches"], "float32", on).slow  # type: ignore[arg-type]
            found.append(
                Error(f"{r['op']} {r['shape']} {r['layout']} {r['dtype']}", s, r["median_s"], r["median_s"] / s, r)
            )
        elif r["target"] == "sampling" and "work" in r:
            s = step(r["batch"], getattr(torch, r["dtype"]), on, r["preset"])[0].slow  # type: ignore[arg-type]
            took = r["median_s"] / r["steps"]
            found.append(Error(f"a step, {r['provider']}, batch {r['batch']}", s, took, took / s, r))
    return found


def steps_table() -> Table:
    """The model of a step of preset `paper` on a T4."""
    body = []
    for dtype in (torch.float32, torch.float16):
        for batch in (1, 4, 16, 64):
            p, work = step(batch, dtype)
            figures = (
                f"{work['bytes'] / 1e6:.0f}",
                f"{work['flops'] / 1e9:.2f}",
                str(work["launches"]),
                _span(p, 1e3, 2),
                p.bound,
            )
            body.append([f"batch {batch}, {str(dtype)[6:]}", *figures])
    return Table(["a step of preset paper"], ["MB", "Gflop", "launches", "predicted ms", "most of it"], body)


def volume_table() -> Table:
    """The model of a volume of document 003's size, 160 slices of preset brain: a step, and decoding."""
    step, decode = count(160, preset_name="brain", volume=True)
    apart, _ = count(160, preset_name="brain")
    body = []
    for what, counted, dtype in (
        ("a step, slices mixed", step, "float16"),
        ("a step, slices apart", apart, "float16"),
        ("decoding", decode, "float32"),
    ):
        spans = (_span(total(counted, dtype, on), 1e3, 2) for on in (T4, H200))
        figures = f"{counted.bytes / 1e6:.0f}", f"{counted.flops / 1e9:.2f}", str(len(counted.work))
        body.append([f"{what}, {dtype}", *figures, *spans])
    columns = ["MB", "Gflop", "launches", "predicted ms, T4", "predicted ms, H200"]
    return Table(["160 slices of 160 x 224, preset brain"], columns, body)


def roofline() -> str:
    """The model of each op and of a step on a T4 as Markdown. A model, not a measurement."""
    lines = [
        "# Roofline of the ops on a T4\n",
        (
            "A **model**, not a measurement: the largest of bytes / bandwidth, operations / rate and launches × launch;"
            " of a step the sum over"
        ),
        f"its operators. Constants: {'; '.join(SOURCES)}.",
        (
            "The basis of `frequency_loss`, 0.05 MB at 16x16 and 0.8 MB at 32x32, is read by every image and taken to"
            " come from the L2 cache."
        ),
        "How far the same model is from machines that were measured is in the report (`sbldm-fast report`).",
        "Rendered by `python -m sbldm_fast.benchmarks.t4`.\n",
        steps_table().markdown(),
        (
            "\nA volume is one batch. The H200's constants are fitted to steps of preset `paper` that were measured"
            " there; no volume was.\n"
        ),
        volume_table().markdown(),
    ]
    lines += [
        "\n| op | problem | MB | Mflop | launches | predicted µs | bound by |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for op in OPS:
        for c in problems(op, torch.device("meta"), large=True):
            moved = c.moved + c.again
            # what these ops compute runs on the scalar units, whatever the dtype
            p = predict(moved, c.flops, c.launches, "float32", T4)
            case = f"{c.shape} {c.layout} {str(c.dtype)[6:]}"
            lines.append(
                f"| {op} | {case} | {moved / 1e6:.2f} | {c.flops / 1e6:.2f} | {c.launches} | {_span(p, 1e6, 0)} |"
                f" {p.bound} |"
            )
    return "\n".join(lines) + "\n"


def _span(p: Prediction, unit: float, digits: int) -> str:
    return " to ".join(dict.fromkeys(f"{unit * t:.{digits}f}" for t in (p.fast, p.slow)))


if __name__ == "__main__":
    print(roofline(), end="")
