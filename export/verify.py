"""Whether graphs are sound: valid, supported by their target, fused, equal to PyTorch.

`export` asks before a folder appears, and `check` after.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import math
import reprlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbldm_fast import Pipeline
from sbldm_fast.errors import UserError
from sbldm_fast.models.covariates import MAPS
from sbldm_fast.sampling.model import TensorDict

from .fusion import fuse_group_norms, has_external_data, nodes
from .graphs import repeat
from .manifest import (
    EXAMPLE,
    GRAPHS,
    GUIDANCE,
    MANIFEST,
    Manifest,
    find_misdescribed,
    read_covariates,
    read_manifest,
    read_verified,
)
from .modules import Tensors, find_not_finite, input_name, inputs_named, is_condition
from .ort import CPU, ORTSampler, import_runtime, open_session, translate_errors
from .rtx import build_in_process
from .trace import Graph

# the largest error, of the largest value or of 1, beside twice what PyTorch itself loses; of int8 the root mean square
# error
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 2e-2}
CONTROL_FLOW = ("If", "Loop", "Scan")


def error_size(error: Tensor, dtype: str) -> float:
    """The largest absolute value; in int8 the root mean square."""
    return float(error.square().mean().sqrt() if dtype == "int8" else error.abs().max())


def measure(got: Tensor, expected: Tensor, dtype: str) -> float:
    """The error of a graph, infinite where the shapes differ."""
    return error_size(got - expected, dtype) if got.shape == expected.shape else math.inf


def require_parity(name: str, error: float, allowed: float, reference: str) -> None:
    """Refuse a graph that is too far from its reference.

    Raises:
        UserError: the error is larger than allowed, or NaN.
    """
    if not error <= allowed:
        raise UserError(f"{name}.onnx: ONNX Runtime differs from {reference} by {error:.1e}, allowed is {allowed:.1e}")


def compare(name: str, got: Tensor, expected: Tensor, loss: Tensor, dtype: str) -> dict[str, float]:
    """Hold a new graph against PyTorch: a tolerance is allowed, and twice what PyTorch loses in the same arithmetic.

    Returns:
        `error` and `allowed`, as the manifest has them.

    Raises:
        UserError: the error is larger.
    """
    error = measure(got, expected, dtype)
    allowed = TOLERANCE[dtype] * max(1.0, error_size(expected, dtype)) + 2 * error_size(loss, dtype)
    require_parity(name, error, allowed, "PyTorch")
    return {"error": error, "allowed": allowed}


def run_graph(name: str, session: Any, given: Tensors) -> list[Tensor]:
    """The outputs of a graph in ONNX Runtime."""
    with translate_errors(f"{name}.onnx"):
        return [torch.from_numpy(v) for v in session.run(None, {k: v.numpy() for k, v in given.items()})]


def compare_module(name: str, data: bytes, graph: Graph, exact: nn.Module, dtype: str) -> dict[str, float]:
    """Hold one call of a new graph against PyTorch, on the batch that was traced and, where it is free, on its first
    sample alone.

    Args:
        name: of the graph.
        data: the graph.
        graph: what it was traced from, in `dtype`.
        exact: the same module in float32.
        dtype: of the arithmetic.

    Raises:
        UserError: NaN or infinity where the module in float32 has none (the module that it begins in is named); or as
            `compare`.
    """
    session, found = open_session(data), []
    whole = len(next(iter(graph.given.values())))
    for N in (whole, 1) if any(graph.free.values()) else (whole,):
        some = {k: v[:N] for k, v in graph.given.items()}
        got = run_graph(name, session, some)
        expected, same = list(exact(some).values()), list(graph.module(some).values())
        if all(v.isfinite().all() for v in expected) and not all(v.isfinite().all() for v in got + same):
            where = find_not_finite(graph.module, functools.partial(graph.module, some)) or "none that PyTorch runs"
            raise UserError(
                f"{name}.onnx: NaN or infinity in {dtype}, first out of module {where}; allowed for this model is fp32"
            )
        found += [compare(name, g, e, s - e, dtype) for g, e, s in zip(got, expected, same, strict=True)]
    return max(found, key=lambda parity: parity["error"] / parity["allowed"])


def example_call(cond: TensorDict, named: bool, guided: bool) -> dict[str, Any]:
    """The arguments of a sampler that an example is made with; of covariates (`named`) what is unknown is None, as a
    NaN of a caller's is refused."""
    if not cond:
        return {}
    asked: dict[str, Any] = dict(cond)
    if named:
        asked |= {k: [None if v != v else v for v in rows.tolist()] for k, rows in cond.items() if k != MAPS}
    return {"cond": asked, **({"guidance_scale": GUIDANCE} if guided else {})}


def _example_call(manifest: Manifest, example: Tensors) -> dict[str, Any]:
    content = manifest.content
    return example_call(inputs_named(example, "cond"), bool(content["covariates"]), content["guided"])


def sample_again(manifest: Manifest, mode: str, example: Tensors) -> tuple[ORTSampler, Tensor]:
    """The samples of an example, made by ONNX Runtime on the CPU through `step` or `sampler`."""
    sampler = ORTSampler(manifest, providers=CPU, mode=mode)
    given: dict[str, Any] = {"noise": example["noise"]}
    if sampler.solver.stochastic:
        given = {"n": len(example["noise"])}
    return sampler, torch.from_numpy(sampler(**given, **_example_call(manifest, example)))


def count_fused_norms(data: bytes) -> int:
    """How many group norms of a graph ONNX Runtime fuses for CUDA."""
    try:
        return fuse_group_norms(data)[1]
    except Exception:  # ONNX Runtime's optimizer is made for the forms of known models
        return 0


def find_faults(name: str, data: bytes, manifest: Manifest, found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a graph before it is run: its form, its operators, its norms; `found` gets their numbers."""
    import onnx

    content, entry = manifest.content, manifest.graphs[name]
    try:
        model = onnx.load_model_from_string(data)
        if has_external_data(model):
            yield "it refers to other files, allowed is a graph in one file"
            return
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # protobuf's, onnx.checker's and the shape inference's have no common class
        yield f"not valid: {str(error).strip().splitlines()[0]}"
        return
    if unlike := find_misdescribed(model, entry):
        yield f"its {unlike} are not those in {MANIFEST}"
    yield from _operator_faults(model, content, found)
    yield from _form_faults(name, model)
    if "norms" in entry:
        found["norms"], found["fused_norms"] = entry["norms"], count_fused_norms(data)
        ours = content["model"].get("class") == "Pipeline"
        if found["fused_norms"] != (entry["norms"] if ours else entry.get("fused_norms", found["fused_norms"])):
            yield f"ONNX Runtime fuses {found['fused_norms']} of {entry['norms']} norms"


def _operator_faults(model: Any, content: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    used = {node.domain or "ai.onnx" for node in nodes(model.graph)}
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import if (o.domain or "ai.onnx") in used}
    if opsets != {"ai.onnx": content["opset"]}:
        yield f"got opsets {opsets}, allowed is ai.onnx {content['opset']}"
    target = content["target"]
    support = json.loads(Path(__file__).with_name("operators.json").read_text())[target]
    operators = {node.op_type for node in nodes(model.graph)}
    found["operators"] = len(operators)
    if other := sorted(operators - set(support["operators"].split())):
        source = f"{support['source']}, {support['date']}"
        yield f"operators {', '.join(other)} are not in the list of {target} ({source})"
    if content["opset"] < 21 and "GroupNormalization" in operators:
        yield "GroupNormalization before opset 21 is deprecated: its scale was per group"


def _form_faults(name: str, model: Any) -> Iterator[str]:
    """What of `step` CUDA could not capture, and a `sampler` that is no loop."""
    operators = [node.op_type for node in nodes(model.graph)]
    if name == "step":
        if other := sorted(set(operators) & {*CONTROL_FLOW, "Shape", "Size", "NonZero"}):
            capture = "a graph that CUDA captures is what neither branches nor asks for a shape"
            yield f"got {', '.join(other)}, allowed in {capture}"
        axes = [d for v in (*model.graph.input, *model.graph.output) for d in v.type.tensor_type.shape.dim]
        if not all(axis.HasField("dim_value") for axis in axes):
            yield "got a free axis, allowed are fixed shapes"
    if name == "sampler" and [kind for kind in operators if kind in CONTROL_FLOW] != ["Loop"]:
        yield "allowed is exactly one Loop"


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
        UserError: not such a folder.
        ImportError: onnx or onnxruntime is not installed.
    """
    import_runtime()
    found = _Check(read_manifest(Path(folder)))
    shape = found.manifest.content["latent_shape"]
    if pipeline is not None and not found.manifest.content["decodes"]:
        raise UserError("pipeline: got one, allowed is None: the folder is of a model alone")
    graphs, example = found.check_files()
    if pipeline is not None and list(pipeline.latent_shape) != shape:
        latents = list(pipeline.latent_shape)
        found.failures.append(f"the pipeline's latents are {latents}, those of the folder {shape}")
    if pipeline is not None and (unlike := _find_unlike(found.manifest.content, pipeline)):
        found.failures.append(unlike)
    if not found.failures:
        found.check_samples(example, pipeline)
        if pipeline is not None:
            found.check_models(example, pipeline)
    if build and found.manifest.content["target"] == "tensorrt":
        found.check_engines(graphs)
    compared = {name for name, values in found.graphs.items() if any(key.startswith("error against") for key in values)}
    return {
        "failures": found.failures,
        "remarks": found.remarks,
        "graphs": found.graphs,
        "not_compared": [name for name in found.graphs if name not in compared],
    }


def _find_unlike(content: dict[str, Any], pipeline: Pipeline) -> str:
    """How a pipeline is asked otherwise than a folder, or ''."""
    config, own = pipeline.unet.config, read_covariates(content, MANIFEST)
    maps = content["cond"].get(MAPS, [0])[0]
    if config.covariates == own and config.concat_channels == maps:
        return ""
    asked = [", ".join(f"{c.name} ({c.allowed})" for c in some) or "none" for some in (config.covariates, own)]
    return (
        f"the pipeline's covariates are {asked[0]} and {config.concat_channels} maps, those of the folder {asked[1]}"
        f" and {maps}"
    )


class _Check:
    """What is found of a folder, check by check."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.failures: list[str] = []
        self.remarks: list[str] = []
        self.graphs: dict[str, dict[str, Any]] = {}

    def check_files(self) -> tuple[dict[str, bytes], Tensors]:
        """The graphs that are the ones that were written, and the example, which is empty where it is another."""
        wanted = GRAPHS if self.manifest.content["decodes"] else GRAPHS[:3]
        self.failures += [f"{MANIFEST} names no {name}.onnx" for name in wanted if name not in self.manifest.graphs]
        graphs, example = {}, Tensors()
        for name, entry in self.manifest.graphs.items():
            try:
                data = graphs[name] = self.manifest.read_graph(name)
            except UserError as error:
                self.failures.append(str(error))
                continue
            found = self.graphs[name] = {"bytes": len(data)}
            self.failures += [f"{name}.onnx: {fault}" for fault in find_faults(name, data, self.manifest, found)]
            if "parity" not in entry:
                self.failures.append(f"{name}.onnx: {MANIFEST} has no parity of it")
            if found.get("fused_norms", 0) < found.get("norms", 0):
                fuses = f"{found['fused_norms']} of {found['norms']}"
                self.remarks.append(f"{name}.onnx: ONNX Runtime fuses {fuses} norms")
        try:
            example = _read_example(self.manifest)
        except UserError as error:
            self.failures.append(str(error))
        return graphs, example

    def compare(self, name: str, got: Tensor, expected: Tensor, reference: str) -> None:
        """Note the error of a graph, and a failure where it is more than the manifest allows."""
        entry = self.manifest.graphs[name]
        error = self.graphs[name][f"error against {reference}"] = measure(got, expected, entry["dtype"])
        try:
            require_parity(name, error, entry["parity"]["allowed"], reference)
        except UserError as failure:
            self.failures.append(str(failure))

    def check_samples(self, example: Tensors, pipeline: Pipeline | None) -> None:
        """The graphs that sample, against the example and the pipeline."""
        for mode in ("step", "sampler"):
            try:
                sampler, got = sample_again(self.manifest, mode, example)
            except UserError as failure:
                self.failures.append(f"{mode}.onnx does not make {EXAMPLE} again: {failure}")
                continue
            self.compare(mode, got, example["images" if self.manifest.content["decodes"] else "latents"], EXAMPLE)
            if pipeline is not None:
                ours = pipeline.sampler(sampler.solver.steps, "eager", scheduler=sampler.table)
                expected = ours(len(got), **_example_call(self.manifest, example)).cpu()
                self.compare(mode, got, expected, "the pipeline")

    def check_models(self, example: Tensors, pipeline: Pipeline) -> None:
        """The graphs of one call each, against the pipeline's models."""
        x, image = example["noise"], example["images"]
        times = torch.tensor(self.manifest.content["solver"]["timesteps"])
        t = times[torch.linspace(0, len(times) - 1, len(x)).long()]
        asked = {k: v for k, v in example.items() if is_condition(k)}
        cond = _example_call(self.manifest, example).get("cond")
        with torch.no_grad():
            unet, vae = copy.deepcopy(pipeline.unet).cpu().eval(), copy.deepcopy(pipeline.vae).cpu().eval()
            scale = vae.config.scaling_factor
            calls = {
                "unet": ({"x": x, "t": t, **asked}, unet(x, t, cond)),
                "vae_encoder": ({"image": image}, vae.encode(image).mean * scale),
                "vae_decoder": ({"z": x}, vae.decode(x / scale)),
            }
        for name, (given, expected) in calls.items():
            size = self.manifest.graphs[name]["inputs"][next(iter(given))]["shape"][0]
            N = size if isinstance(size, int) else len(x)
            some = {k: repeat(v, N) for k, v in given.items()}
            got = run_graph(name, open_session(self.manifest.read_graph(name)), some)[0]
            self.compare(name, got, repeat(expected, N), "the pipeline")

    def check_engines(self, graphs: dict[str, bytes]) -> None:
        """Engines of TensorRT-RTX, where it is installed."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            self.remarks.append("no engine was built: pip install 'sbldm_fast[tensorrt]'")
            return
        for name, data in graphs.items():
            found, failure = build_in_process(data, self.manifest.content["dtype"])
            self.graphs[name] |= found
            if failure:
                self.failures.append(f"{name}.onnx: {failure}")
            elif "engine for default" in found:
                limit = "TensorRT-RTX has no float32 matrix product for SM75; built for its defaults"
                self.remarks.append(f"{name}.onnx: {limit}")


def _read_example(manifest: Manifest) -> Tensors:
    """The arrays of `example.npz`, of the shapes that the folder has.

    Raises:
        UserError: it is not the file that was written, or its arrays are others.
    """
    path, content = manifest.folder / EXAMPLE, manifest.content
    data = read_verified(manifest.folder, EXAMPLE, content.get("example", {}))
    try:
        with np.load(BytesIO(data), allow_pickle=False) as file:
            arrays = {k: torch.from_numpy(v) for k, v in file.items()}
    except Exception:  # those of zip, of zlib and of NumPy's headers have no common class
        raise UserError(f"{path}: not an archive of arrays") from None
    shapes = {"noise": content["latent_shape"]} | {input_name("cond", k): v for k, v in content["cond"].items()}
    shapes |= {"images": None} if content["decodes"] else {"latents": content["latent_shape"]}
    sizes = {v.shape[:1] for v in arrays.values()}
    if (
        set(arrays) != set(shapes)
        or len(sizes) != 1
        or any(shape not in (None, list(arrays[k].shape[1:])) for k, shape in shapes.items())
    ):
        got = reprlib.repr({k: list(v.shape) for k, v in arrays.items()})
        raise UserError(f"{path}: got {got}, allowed are {', '.join(shapes)} in the shapes of {MANIFEST}")
    return arrays
