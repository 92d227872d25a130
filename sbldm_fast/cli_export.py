"""The command that writes ONNX graphs, and the one that verifies them."""

from __future__ import annotations

import json
import re
import reprlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Eta, Json, Scheduler, Steps, count, place, say

Target = StrEnum("Target", ["ort", "tensorrt"])
Precision = StrEnum("Precision", ["fp32", "fp16", "int8"])


def export(
    pipeline: Annotated[
        str | None, typer.Argument(help="A pipeline folder, demo, or a folder that holds a diffusers UNet2DModel.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", callback=place, help="Folder to write.")] = None,
    target: Annotated[Target, typer.Option(help="ort: opset 18; tensorrt: opset 21.")] = Target.ort,
    dtype: Annotated[
        Precision, typer.Option(help="Norms and softmax stay in fp32; int8: wide convolutions, on a CPU.")
    ] = Precision.fp32,
    batch: Annotated[
        str, typer.Option(help="Of step, and for tensorrt of all graphs: a number or dynamic.")
    ] = "dynamic",
    scheduler: Annotated[Scheduler | None, typer.Option(help="Default: the pipeline's own.")] = None,
    steps: Steps = None,
    eta: Eta = 0.0,
    guidance: Annotated[
        bool, typer.Option("--guidance", help="Graphs with the second pass of guidance, twice the work at any scale.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the manifest (default: as in model_index.json).")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a folder that holds something else.")] = False,
    checked: Annotated[
        Path | None, typer.Option("--check", help="Verify this exported folder instead; with PIPELINE, against it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX graphs and prove them. Example: sbldm-fast export demo -o onnx && sbldm-fast export --check onnx"""
    from sbldm_fast.export import export as run
    from sbldm_fast.export.foreign import load

    if checked is not None:
        _check(checked, pipeline, as_json)
        return
    if pipeline is None or out is None:
        raise typer.BadParameter(
            "got none, allowed is PIPELINE -o OUT, or --check FOLDER", param_hint="PIPELINE, --out"
        )
    size = _batch_size(batch)
    source, own = load(pipeline)
    if scheduler is not None and "scheduler" in own:
        raise typer.BadParameter(
            f"got {scheduler}, allowed with a diffusers folder is none: it has its own", param_hint="--scheduler"
        )
    own.setdefault("scheduler", scheduler and scheduler.value)
    own |= {"license": license} if license is not None else {}
    options: dict[str, Any] = {
        "target": target.value,
        "dtype": dtype.value,
        "batch": size,
        "steps": steps,
        "eta": eta,
        "force": force,
        "guidance": guidance or None,
    }
    manifest = run(source, out, progress=not as_json, **options, **own)
    if as_json:
        print(json.dumps(manifest))
    else:
        _print_graphs(manifest, out)


def _batch_size(text: str) -> int | str:
    from sbldm_fast.export.exporter import MAX_BATCH

    if text == "dynamic":
        return text
    if not (re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= MAX_BATCH):
        raise typer.BadParameter(
            f"got {reprlib.repr(text)}, allowed is 1 to {MAX_BATCH}, or dynamic", param_hint="--batch"
        )
    return int(text)


def _print_graphs(manifest: dict[str, Any], out: Path) -> None:
    for name, graph in manifest["graphs"].items():
        norms = f", {graph['fused_norms']} of {graph['norms']} norms fuse" if "norms" in graph else ""
        print(
            f"{out / name}.onnx: opset {manifest['opset']}, {graph['bytes'] / 1e6:.1f} MB, "
            f"error {graph['parity']['error']:.1e} (allowed {graph['parity']['allowed']:.1e}){norms}"
        )


def _check(folder: Path, pipeline: str | None, as_json: bool) -> None:
    """Verify an exported folder, against a pipeline if there is one, and say the verdict."""
    from sbldm_fast import Pipeline
    from sbldm_fast.export import check

    report = check(folder, None if pipeline is None else Pipeline.from_pretrained(pipeline))
    if as_json:
        print(json.dumps(report))
    else:
        for name, found in report["graphs"].items():
            print(f"{folder / name}.onnx: " + ", ".join(f"{k} {_brief(v)}" for k, v in found.items()))
        for line in report["remarks"]:
            print(f"remark: {line}")
        print(_verdict(folder, report))
    for line in report["failures"]:
        say(f"FAILED {line}")
    if report["failures"]:
        raise typer.Exit(1)


def _verdict(folder: Path, report: dict[str, Any]) -> str:
    if report["failures"]:
        return f"FAILED: {folder}, {count(len(report['failures']), 'fault')}"
    lines = [f"PASSED: {folder}"]
    if alone := report["not_compared"]:
        how = f"sbldm-fast export PIPELINE --check {folder}" if "vae_encoder" in report["graphs"] else ""
        why = f"to compare them: {how}" if how else "only their export could: the model is not here"
        lines.insert(0, f"not compared with PyTorch: {', '.join(alone)}; {why}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"built in {value['seconds']} s" if value.get("built") else "not built"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
