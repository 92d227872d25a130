"""An exported folder, verified again: whole, valid, supported by its target, equal to PyTorch, and buildable for a
T4."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import reprlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbldm_fast import Pipeline
from sbldm_fast.errors import UserError

from .fusion import external, fused, nodes
from .graphs import GUIDANCE, largest, rms
from .manifest import EXAMPLE, GRAPHS, MANIFEST, manifest_of, misdescribed, verified
from .modules import conditioned
from .ort import CPU, ORTSampler, named, runtime, session

BUILDER, BUILD_SECONDS = Path(__file__).with_name("rtx.py"), 300
CONTROL_FLOW = ("If", "Loop", "Scan")
# TensorRT-RTX compiles no float32 matrix product for Turing; TensorRT, its sibling for T4s, may
KNOWN_LIMIT = "FP32 GEMM is not supported"


def check(folder: str | Path, pipeline: Pipeline | None = None, *, build: bool = True) -> dict[str, Any]:
    """Verify a folder that `export` wrote.

    Of every file the sha256; of every graph onnx.checker with strict shape inference and data propagation, its opset,
    its operators against the dated list of its target (`operators.json`); for `ort` that all norms fuse; that `step`
    has fixed shapes and nothing that branches or asks for a shape; the samples of `example.npz`, made again by ONNX
    Runtime on the CPU through `step` and through `sampler`; and, where tensorrt-rtx is installed, an engine for SM75 of
    every graph for `tensorrt`, in a process of its own.

    Args:
        folder: what `export` wrote.
        pipeline: to compare its own samples, and its models, with the graphs too.
        build: whether to build engines.

    Returns:
        `failures`, a list of sentences, empty if all is well; `graphs`, what was found of each; `not_compared`, the
        graphs whose output was held against nothing; `remarks`.

    Raises:
        ValueError: not such a folder, or onnx or onnxruntime is not installed.
    """
    runtime()
    folder = Path(folder)
    manifest, _ = manifest_of(folder)
    report: dict[str, Any] = {"failures": [], "remarks": [], "graphs": {}}
    wanted = GRAPHS if manifest["decodes"] else GRAPHS[:3]
    report["failures"] += [f"{MANIFEST} names no {name}.onnx" for name in wanted if name not in manifest["graphs"]]
    sound = {}
    for name, entry in manifest["graphs"].items():
        try:
            data = sound[name] = verified(folder, f"{name}.onnx", entry)
        except ValueError as error:
            report["failures"].append(str(error))
            continue
        report["graphs"][name] = {"bytes": len(data)}
        report["failures"] += [
            f"{name}.onnx: {fault}" for fault in _faults(name, data, manifest, report["graphs"][name])
        ]
        found = report["graphs"][name]
        if found.get("fused_norms", 0) < found.get("norms", 0):
            report["remarks"].append(
                f"{name}.onnx: ONNX Runtime fuses {found['fused_norms']} of {found['norms']} norms"
            )
    example = None
    try:
        example = _example(folder, manifest)
    except ValueError as error:
        report["failures"].append(str(error))
    if pipeline is not None and not manifest["decodes"]:
        raise UserError("pipeline: got one, allowed is None: the folder is of a model alone")
    if pipeline is not None and list(pipeline.latent_shape) != manifest["latent_shape"]:
        report["failures"].append(
            f"the pipeline's latents are {list(pipeline.latent_shape)}, those of the folder {manifest['latent_shape']}"
        )
    if not report["failures"] and example is not None:
        report["failures"] += _parity(folder, manifest, example, pipeline, report)
        report["failures"] += _single(folder, manifest, example, pipeline, report) if pipeline is not None else []
    report["not_compared"] = [
        name for name, found in report["graphs"].items() if not any(key.startswith("error against") for key in found)
    ]
    if build and manifest["target"] == "tensorrt":
        if importlib.util.find_spec("tensorrt_rtx") is None:
            report["remarks"].append("no engine was built: pip install 'sbldm_fast[tensorrt]'")
        else:
            for name, data in sound.items():
                report["failures"] += _built(name, data, manifest["dtype"], report)
    return report


def _faults(name: str, data: bytes, manifest: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    import onnx

    try:
        model = onnx.load_model_from_string(data)
        if external(model):
            yield "it refers to other files, allowed is a graph in one file"
            return
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # protobuf's, onnx.checker's and the shape inference's have no common class
        yield f"not valid: {str(error).strip().splitlines()[0]}"
        return
    if unlike := misdescribed(model, manifest["graphs"][name]):
        yield f"its {unlike} are not those in {MANIFEST}"
    used = {node.domain or "ai.onnx" for node in nodes(model.graph)}
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import if (o.domain or "ai.onnx") in used}
    if opsets != {"ai.onnx": manifest["opset"]}:
        yield f"got opsets {opsets}, allowed is ai.onnx {manifest['opset']}"
    support = json.loads(Path(__file__).with_name("operators.json").read_text())[manifest["target"]]
    operators = {node.op_type for node in nodes(model.graph)}
    found["operators"] = len(operators)
    if other := sorted(operators - set(support["operators"].split())):
        yield (
            f"operators {', '.join(other)} are not in the list of {manifest['target']} ({support['source']},"
            f" {support['date']})"
        )
    if manifest["opset"] < 21 and "GroupNormalization" in operators:
        yield "GroupNormalization before opset 21 is deprecated: its scale was per group"
    if name == "step":
        if other := sorted(operators & {*CONTROL_FLOW, "Shape", "Size", "NonZero"}):
            yield (
                f"got {', '.join(other)}, allowed in a graph that CUDA captures is what neither branches nor asks for a"
                " shape"
            )
        if not all(
            d.HasField("dim_value")
            for v in (*model.graph.input, *model.graph.output)
            for d in v.type.tensor_type.shape.dim
        ):
            yield "got a free axis, allowed are fixed shapes"
    if name == "sampler" and [n.op_type for n in nodes(model.graph) if n.op_type in CONTROL_FLOW] != ["Loop"]:
        yield "allowed is exactly one Loop"
    entry = manifest["graphs"][name]
    if "norms" in entry:
        found["norms"] = entry["norms"]
        try:
            found["fused_norms"] = fused(data)[1]
        except Exception:  # ONNX Runtime's optimiser is made for the forms of known models
            found["fused_norms"] = 0
        if found["fused_norms"] != entry["norms" if manifest["model"].get("class") == "Pipeline" else "fused_norms"]:
            yield f"ONNX Runtime fuses {found['fused_norms']} of {entry['norms']} norms"
    if "parity" not in entry:
        yield f"{MANIFEST} has no parity of it"


def _example(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `example.npz`, of the shapes that the folder has.

    Raises:
        ValueError: it is not the file that was written, or its arrays are others.
    """
    data = verified(folder, EXAMPLE, manifest.get("example", {}))
    try:
        with np.load(BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
    except Exception:  # those of zip, of zlib and of NumPy's headers have no common class
        raise UserError(f"{folder / EXAMPLE}: not an archive of arrays") from None
    one = {
        "noise": manifest["latent_shape"],
        **{conditioned("cond", k): shape for k, shape in manifest["cond"].items()},
    }
    one |= {"images": None} if manifest["decodes"] else {"latents": manifest["latent_shape"]}
    n = {v.shape[:1] for v in arrays.values()}
    if (
        set(arrays) != set(one)
        or len(n) != 1
        or any(shape not in (None, list(arrays[k].shape[1:])) for k, shape in one.items())
    ):
        got = {k: list(v.shape) for k, v in arrays.items()}
        raise UserError(
            f"{folder / EXAMPLE}: got {reprlib.repr(got)}, allowed are {', '.join(one)} in the shapes of {MANIFEST}"
        )
    return arrays


def _parity(
    folder: Path,
    manifest: dict[str, Any],
    example: dict[str, np.ndarray],
    pipeline: Pipeline | None,
    report: dict[str, Any],
) -> Iterator[str]:
    expected = example["images" if manifest["decodes"] else "latents"]
    cond = {k.removeprefix("cond").removeprefix("_"): v for k, v in example.items() if k.startswith("cond")}
    for mode in ("step", "sampler"):
        allowed = manifest["graphs"][mode]["parity"]["allowed"]
        try:
            sampler = ORTSampler(folder, providers=CPU, mode=mode)
            given = {"n": len(expected)} if sampler.solver.stochastic else {"noise": example["noise"]}
            got = sampler(**given, **_asked(cond))
        except (ValueError, FloatingPointError) as failure:
            yield f"{mode}.onnx does not make {EXAMPLE} again: {failure}"
            continue
        pairs = [(EXAMPLE, expected)]
        if pipeline is not None:
            pairs.append(
                (
                    "the pipeline",
                    pipeline.sampler(sampler.solver.steps, "eager", scheduler=sampler.table)(len(got)).cpu().numpy(),
                )
            )
        for against, want in pairs:
            error = _error(manifest["graphs"][mode], got, want)
            report["graphs"][mode][f"error against {against}"] = error
            if not error <= allowed:
                yield f"{mode}.onnx: ONNX Runtime differs from {against} by {error:.1e}, allowed is {allowed:.1e}"


def _single(
    folder: Path, manifest: dict[str, Any], example: dict[str, np.ndarray], pipeline: Pipeline, report: dict[str, Any]
) -> Iterator[str]:
    """The graphs of one call each, against the pipeline's models."""
    x, image = torch.from_numpy(example["noise"]), torch.from_numpy(example["images"])
    t = torch.tensor(manifest["solver"]["timesteps"])[
        torch.linspace(0, len(manifest["solver"]["timesteps"]) - 1, len(x)).long()
    ]
    with torch.no_grad():
        unet, vae = copy.deepcopy(pipeline.unet).cpu().eval(), copy.deepcopy(pipeline.vae).cpu().eval()
        scale = vae.config.scaling_factor
        wanted = {
            "unet": ({"x": x, "t": t}, unet(x, t)),
            "vae_encoder": ({"image": image}, vae.encode(image).mean * scale),
            "vae_decoder": ({"z": x}, vae.decode(x / scale)),
        }
    for name, (given, want) in wanted.items():
        entry = manifest["graphs"][name]
        run, size = session(verified(folder, f"{name}.onnx", entry)), entry["inputs"][next(iter(given))]["shape"][0]
        N = size if isinstance(size, int) else len(x)
        some = {k: torch.cat([v] * N)[:N].numpy() for k, v in given.items()}
        with named(f"{name}.onnx"):
            got = run.run(None, some)[0]
        error = _error(entry, got, torch.cat([want] * N)[:N].numpy())
        report["graphs"][name]["error against the pipeline"] = error
        if not error <= entry["parity"]["allowed"]:
            yield (
                f"{name}.onnx: ONNX Runtime differs from the pipeline by {error:.1e}, allowed is"
                f" {entry['parity']['allowed']:.1e}"
            )


def _error(entry: dict[str, Any], got: np.ndarray, want: np.ndarray) -> float:
    if got.shape != want.shape:
        return math.inf
    return (rms if entry["dtype"] == "int8" else largest)(torch.from_numpy(got - want))


def _asked(cond: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"cond": {k: torch.from_numpy(v) for k, v in cond.items()}, "guidance_scale": GUIDANCE} if cond else {}


def _built(name: str, data: bytes, dtype: str, report: dict[str, Any]) -> Iterator[str]:
    """Build an engine in another process: the builder can crash, and would take this one along."""
    found = report["graphs"][name]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.onnx"
        path.write_bytes(data)
        for capability in ("SM75", "default"):
            command = [sys.executable, str(BUILDER), str(path), capability]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
                last = done.stdout.strip().splitlines()[-1:] or ["{}"]
                said = done.stderr.strip().splitlines()[-1:]
                ended = {"why": " ".join([f"the builder ended with code {done.returncode}", *said])}
                result = json.loads(last[0]) if done.returncode == 0 else ended
            except subprocess.TimeoutExpired:
                result = {"why": f"not built in {BUILD_SECONDS} s"}
            found[f"engine for {capability}"] = result
            if result.get("built"):
                if capability == "default":
                    report["remarks"].append(
                        f"{name}.onnx: TensorRT-RTX has no float32 matrix product for SM75; built for its defaults"
                    )
                return
            why = re.sub(r"\s+", " ", result.get("why", "no answer"))
            if capability == "SM75" and dtype == "fp32" and KNOWN_LIMIT in why:
                continue
            yield f"{name}.onnx: TensorRT-RTX cannot build it for {capability}: {why[:300]}"
            return
