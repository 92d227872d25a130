"""A pipeline, or any model with a linear scheduler, to a folder of ONNX graphs, each proven equal before it is kept."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sbldm_fast.kernels import backend
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast import FastSampler, Pipeline, SolverTable
from sbldm_fast.errors import MissingExtra, UserError
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.images import NOTICE
from sbldm_fast.models.config import PRESETS
from sbldm_fast.sampling.model import Cond, TensorDict, tensors_by_name
from sbldm_fast.sampling.noise import draw

from .fusion import fused
from .int8 import quantised
from .manifest import EXAMPLE, FORMAT, GRAPHS, MANIFEST, described
from .modules import (
    DecoderGraph,
    EncoderGraph,
    SamplerGraph,
    Solver,
    StepGraph,
    Tensors,
    UNetGraph,
    conditioned,
    first_not_finite,
    norms,
    table_inputs,
)
from .ort import CPU, ORTSampler, session
from .trace import Graph, onnx_bytes, program

# ort: with a dynamic batch ONNX Runtime fuses GroupNorm from the form of this opset, and from no later one.
# tensorrt: GroupNormalization of opset 21 (TensorRT 10.9); that of 18 is deprecated, and Attention of 23 fails to
# build.
OPSETS = {"ort": 18, "tensorrt": 21}
# the largest error, of the largest value or of 1, beside twice what PyTorch itself loses; of int8 the root mean square
# error
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 2e-2}
MOST = 65_536  # samples of a fixed batch; the shapes of its graph are traced with tensors of that size
CALIBRATED = 2  # every other step of a run
EXAMPLES = 4  # samples kept beside the graphs, for whoever runs them elsewhere
GUIDANCE = 2.0  # of the samples of a conditional model
AXES: dict[str, dict[int, str]] = {  # the free ones; of other inputs the first is the batch
    "timesteps": {0: "steps"},
    "table": {0: "steps"},
    "input_scale": {0: "steps"},
    "noise": {0: "steps", 1: "batch"},
    "history": {2: "batch"},
    "index": {},
    "row": {},
}
RANGES = {
    "x": "standard normal times init_noise_sigma at the first step",
    "z": "a latent as the sampler makes it",
    "image": [-1, 1],
    "t": "a timestep of training",
    "index": "0 at the first step",
    "history": "zeros at the first step",
    "noise": "standard normal",
    "timesteps": "of solver",
    "table": "rows of solver, null as 0",
    "input_scale": "of solver",
    "guidance_scale": "1: no guidance",
}


class Networks(NamedTuple):
    """The parts of a pipeline, or a model alone, as modules to trace in one dtype."""

    unet: UNetGraph
    encoder: EncoderGraph | None = None
    decoder: DecoderGraph | None = None


def export(
    source: Pipeline | nn.Module,
    out: str | Path,
    *,
    target: str = "ort",
    dtype: str = "fp32",
    batch: int | str = "dynamic",
    scheduler: Any = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    shape: tuple[int, int, int] | None = None,
    cond: Cond = None,
    licence: str = "not stated",
    force: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `unet`, `step`, `sampler` and, of a pipeline, `vae_encoder` and `vae_decoder`, with `manifest.json` and
    `example.npz`.

    Each graph is one file, run by ONNX Runtime on the CPU and compared with PyTorch before the folder appears. What
    they compute: `sbldm_fast.export.modules`. Inputs and outputs are float32 whatever the dtype.

    Args:
        source: a `Pipeline`, or a diffusers or MONAI UNet, or any module `(x, t) -> prediction`.
        out: a new folder, or one that an export wrote.
        target: `"ort"`, opset 18, or `"tensorrt"`, opset 21.
        dtype: `"fp32"` or `"fp16"`, of the arithmetic between the float32 islands; `"int8"`, of the wide convolutions
            of `unet` and `step` on a CPU, for `ort`, calibrated on what the model meets while it samples.
        batch: of `step`, whose shapes are fixed, and for `tensorrt` of every graph; `"dynamic"`: 1 in `step`, free
            elsewhere.
        scheduler: a name of `Pipeline.sampler`, a scheduler object or a `SolverTable`.
        steps, eta: of the table in the manifest; a `SolverTable` has its own. `step` has as many rows; `sampler` takes
            any number.
        shape: of one sample, `(C, H, W)`; a pipeline knows its own.
        cond: an example of the conditioning, `[n, ...]` or a mapping of such; the graphs then take `cond`, `uncond`,
            `guidance_scale`.
        licence: of the weights, for the manifest.
        force: replace a folder that holds something else.
        progress: show which graph is being made.

    Returns:
        The manifest.

    Raises:
        ValueError: an argument that is not allowed; a missing package; an operator without an ONNX form (named with its
            module); a graph that is not finite, or differs from PyTorch by more than `TOLERANCE` and twice what PyTorch
            itself loses.
    """
    for name, value, allowed in (("target", target, OPSETS), ("dtype", dtype, TOLERANCE)):
        if value not in allowed:
            raise UserError(f"{name}: got {value!r}, allowed are {', '.join(allowed)}")
    if batch != "dynamic" and (type(batch) is not int or not 1 <= batch <= MOST):
        raise UserError(f"batch: got {batch!r}, allowed is 1 to {MOST}, or 'dynamic'")
    if dtype == "int8" and target != "ort":
        raise UserError(f"dtype: got int8 for {target}, allowed is ort: its quantised convolutions are for a CPU")
    claim(Path(out), force)
    versions = _versions()
    source = _own(source)
    model, shape, table = _parts(source, shape, scheduler, steps, eta)
    parts = [model, source.vae] if isinstance(source, Pipeline) else [model]
    if target == "tensorrt" and any(getattr(m, "num_groups", None) == 1 for part in parts for m in part.modules()):
        raise UserError(
            "target: got 'tensorrt' for a norm of one group, which TensorRT takes for an instance norm; allowed is ort"
        )
    example = {k: v.detach().cpu()[torch.arange(EXAMPLES) % len(v)] for k, v in tensors_by_name(cond).items()}
    asked: dict[str, Any] = {"cond": example, "guidance_scale": GUIDANCE} if example else {}
    fixed = None if batch == "dynamic" else int(batch)
    decode = source.decode if isinstance(source, Pipeline) else None
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "target": target,
        "opset": OPSETS[target],
        "dtype": dtype,
        "notice": NOTICE,
        "licence": licence,
        "versions": versions,
        "model": _origin(source),
        "latent_shape": list(shape),
        "cond": {k: list(v.shape[1:]) for k, v in example.items()},
        "decodes": decode is not None,
        "solver": table.to_dict(),
        "graphs": {},
    }
    with whole_folder(out, lose=force) as folder, torch.no_grad(), backend("torch"):
        exact = _networks(source, torch.float32)
        own = _networks(source, torch.float16) if dtype == "fp16" else exact
        noise = draw(torch.tensor([[0, i] for i in range(EXAMPLES)]), shape, torch.device("cpu"))
        met = [noise * table.init_noise_sigma]  # x before each step, and after the last
        keep = (lambda i, t, x: met.append(x.clone())) if dtype == "int8" else None
        try:
            latents = FastSampler(model, table, shape=shape, mode="eager")(noise=noise, seed=0, callback=keep, **asked)
        except RuntimeError as failure:
            why = " ".join(str(failure).split())[:300]
            raise UserError(
                f"shape, cond: got {shape}, {manifest['cond']}, which the model does not take: {why}"
            ) from failure
        expected = latents if decode is None else decode(latents)
        graphs = _graphs(own, table, latents, expected, example, fixed, target)
        plain = {"unet": exact.unet, "vae_encoder": exact.encoder, "vae_decoder": exact.decoder}
        for name, graph in tqdm(graphs.items(), desc="export", unit="graph", disable=not progress):
            data = onnx_bytes(name, graph, OPSETS[target])
            kind = "fp32" if dtype == "int8" and name not in ("unet", "step") else dtype
            if kind == "int8":
                data = quantised(
                    data, [_fed(name, graph, met[i], table, i) for i in range(0, len(met) - 1, CALIBRATED)]
                )
            (folder / f"{name}.onnx").write_bytes(data)
            manifest["graphs"][name] = _entry(name, data, graph, kind, target, isinstance(source, Pipeline))
            if (module := plain.get(name)) is not None:
                manifest["graphs"][name]["parity"] = _compared(name, data, graph, module, kind)
        write_json(folder / MANIFEST, manifest)
        # what PyTorch loses itself: in fp16 beside fp32, in a foreign model, whose weights may amplify anything, at
        # another batch size
        lost = torch.zeros(1)
        if dtype == "fp16" or decode is None:
            first = asked | ({"cond": {k: v[:1] for k, v in example.items()}} if example else {})
            again = FastSampler(_called(own.unet), table, shape=shape, mode="eager")(1, seed=0, **first)
            lost = (again if own.decoder is None else own.decoder({"z": again})["image"]) - expected[:1]
        for name in ("step", "sampler"):
            got = torch.from_numpy(ORTSampler(folder, providers=CPU, mode=name)(EXAMPLES, seed=0, **asked))
            manifest["graphs"][name]["parity"] = _parity(name, got, expected, lost, manifest["graphs"][name]["dtype"])
        kept = {"noise": noise, "images" if decode else "latents": expected} | {
            conditioned("cond", k): v for k, v in example.items()
        }
        np.savez(folder / EXAMPLE, allow_pickle=False, **{k: v.numpy() for k, v in kept.items()})
        manifest["example"] = {
            "sha256": _sha256((folder / EXAMPLE).read_bytes()),
            "seed": 0,
            **{k: list(v.shape) for k, v in kept.items()},
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def claim(out: Path, force: bool) -> None:
    """Make sure that `out` may be written, before the work begins.

    Raises:
        ValueError: a file, or a folder with something that no export wrote.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, allowed is a folder")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"out: {out} is the current folder or holds it, allowed is another")
    found = {p.name for p in out.iterdir()} if out.exists() else set()
    ours = {MANIFEST, EXAMPLE, *(f"{name}.onnx" for name in GRAPHS)} if _exported(out) else set()
    if not force and (other := sorted(found - ours)):
        raise UserError(
            f"out: {out} holds {other[0]}, which no export wrote; allowed is a new folder, or --force to replace"
            " this one"
        )


def _exported(out: Path) -> bool:
    try:
        return read_json(out / MANIFEST).get("notice") == NOTICE
    except ValueError:
        return False


def _own(source: Pipeline | nn.Module) -> Pipeline | nn.Module:
    """A copy on the CPU: the caller's stays where it is."""
    if isinstance(source, Pipeline):
        return Pipeline(copy.deepcopy(source.vae), copy.deepcopy(source.unet), source.scheduler.config).to("cpu")
    if isinstance(source, nn.Module):
        return nn.Module.to(copy.deepcopy(source), "cpu").eval()
    raise UserError(f"source: got {type(source).__name__}, allowed is a Pipeline or a torch.nn.Module")


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "sbldm_fast": importlib.metadata.version("sbldm_fast")}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            raise MissingExtra("export", package, "onnx") from None
    return found


def _parts(
    source: Pipeline | nn.Module, shape: tuple[int, int, int] | None, scheduler: Any, steps: int, eta: float
) -> tuple[nn.Module, tuple[int, int, int], SolverTable]:
    """The model, the shape of a sample, the table."""
    if isinstance(source, Pipeline):
        if shape is not None:
            raise UserError(f"shape: got {shape}, allowed with a pipeline is None: it has its own")
        sampler = source.sampler(steps, "eager", scheduler=scheduler, eta=eta)
        if not hasattr(sampler, "table"):
            raise UserError(f"scheduler: got {type(scheduler).__name__}, allowed is one that a SolverTable describes")
        return source.unet, source.latent_shape, sampler.table
    if shape is None or len(shape) != 3 or isinstance(scheduler, str):
        raise UserError(
            f"shape, scheduler: got {shape}, {scheduler!r}, allowed with a model alone are (C, H, W) and a scheduler"
            " object or SolverTable"
        )
    return (
        source,
        shape,
        scheduler if isinstance(scheduler, SolverTable) else SolverTable.from_scheduler(scheduler, steps, eta=eta),
    )


def _origin(source: Pipeline | nn.Module) -> dict[str, Any]:
    if not isinstance(source, Pipeline):
        return {"class": type(source).__name__}
    vae, unet = source.vae.config, source.unet.config
    preset = [
        name for name, p in PRESETS.items() if p.unet == unet and p.vae.block_out_channels == vae.block_out_channels
    ]
    return {
        "class": "Pipeline",
        "preset": next(iter(preset), None),
        "scaling_factor": vae.scaling_factor,
        "vae": vae.to_dict(),
        "unet": unet.to_dict(),
        "scheduler": source.scheduler.config.to_dict(),
    }


def _networks(source: Pipeline | nn.Module, dtype: torch.dtype) -> Networks:
    if not isinstance(source, Pipeline):
        return Networks(UNetGraph(source, dtype))
    return Networks(UNetGraph(source.unet, dtype), EncoderGraph(source.vae, dtype), DecoderGraph(source.vae, dtype))


def _fed(name: str, graph: Graph, x: Tensor, table: SolverTable, i: int) -> dict[str, np.ndarray]:
    """The inputs of a graph at step i of a run; `step` scales x itself."""
    N = len(graph.given["x"])
    x = torch.cat([x] * N)[:N] * (1.0 if name == "step" else float(table.input_scale[i]))
    now = {"x": x, "t": table.timesteps[i].expand(N), "index": torch.tensor([i])}
    return {k: now[k].to(v.dtype).numpy() if k in now else v.numpy() for k, v in graph.given.items()}


def _called(unet: UNetGraph) -> Any:
    """A traced network as a model that `FastSampler` calls."""

    def model(x: Tensor, t: Tensor, cond: Tensor | None = None, **others: Tensor) -> Tensor:
        given = {conditioned("cond", k): v for k, v in (tensors_by_name(cond) | others).items()}
        out: Tensor = unet({"x": x, "t": t.expand(len(x)), **given})["prediction"]
        return out

    return model


def _graphs(
    parts: Networks,
    table: SolverTable,
    latents: Tensor,
    images: Tensor,
    cond: TensorDict,
    fixed: int | None,
    target: str,
) -> dict[str, Graph]:
    """The graphs with what they are traced on; only `step`, and for TensorRT all of them, have a fixed batch."""
    rows, solver = table_inputs(table), Solver.of(table)
    frozen = fixed if target == "tensorrt" else None

    def inputs(N: int) -> tuple[Tensors, Tensors]:
        guided = {
            conditioned(p, k): v[:1].repeat(N, *[1] * (v.dim() - 1))
            for k, v in cond.items()
            for p in ("cond", "uncond")
        }
        guided |= {"guidance_scale": torch.full((N,), GUIDANCE)} if cond else {}
        noise = {"noise": torch.randn(solver.steps, N, *latents.shape[1:])} if solver.stochastic else {}
        return {"x": latents[:1].repeat(N, 1, 1, 1), **rows, **noise}, guided

    def graph(module: nn.Module, given: Tensors) -> Graph:
        axes = {name: AXES.get(name, {0: "batch"}) for name in given}
        return Graph(
            module, given, {k: {a: w for a, w in v.items() if w != "batch" or frozen is None} for k, v in axes.items()}
        )

    def repeated(v: Tensor) -> Tensor:
        return torch.cat([v] * N)[:N]

    N = frozen or 2  # the exporter takes a free axis of 1 for a constant
    t = rows["timesteps"][torch.linspace(0, solver.steps - 1, N).long()]
    index = {"index": torch.zeros(1, dtype=torch.int64)}
    state, guided = inputs(N)
    if solver.steps == 1:  # nor is a table of one row free
        state |= {k: torch.cat([v, v]) for k, v in state.items() if k in rows or k == "noise"}
    out = {
        "unet": graph(
            parts.unet, {"x": repeated(latents), "t": t, **{k: v for k, v in guided.items() if k.startswith("cond")}}
        )
    }
    if parts.encoder is not None and parts.decoder is not None:
        out["vae_encoder"] = graph(parts.encoder, {"image": repeated(images)})
        out["vae_decoder"] = graph(parts.decoder, {"z": repeated(latents)})
    step = StepGraph(parts.unet, solver)
    inside = {**state, **guided, **index, **_history(solver, state["x"]), "row": parts.unet.row(rows["timesteps"][:1])}
    del inside["timesteps"]
    traced = program("sampler", graph(step, inside)).module(check_guards=False)
    out["sampler"] = graph(SamplerGraph(step, traced, parts.decoder), state | guided)
    state, guided = inputs(fixed or 1)
    out["step"] = Graph(step, {**state, **guided, **_history(solver, state["x"]), **index}, {})
    return out


def _history(solver: Solver, x: Tensor) -> Tensors:
    return {"history": x.new_zeros(solver.history, 2, *x.shape)} if solver.history else {}


def _entry(name: str, data: bytes, graph: Graph, dtype: str, target: str, ours: bool) -> dict[str, Any]:
    """What the manifest says of a graph.

    Raises:
        ValueError: ONNX Runtime does not fuse all norms of a model of ours.
    """
    import onnx

    model = onnx.load_model_from_string(data)
    entry: dict[str, Any] = {"sha256": _sha256(data), "bytes": len(data), "dtype": dtype}
    for side, tensors in described(model).items():
        entry[side] = {k: v | ({"range": RANGES[k]} if k in RANGES else {}) for k, v in tensors.items()}
    if target == "ort" and dtype != "int8" and not isinstance(graph.module, SamplerGraph):
        entry["norms"] = norms(graph.module, graph.given)
        try:
            entry["fused_norms"] = fused(data)[1]
        except Exception:  # ONNX Runtime's optimiser is made for the forms of known models
            entry["fused_norms"] = 0
        if ours and entry["fused_norms"] != entry["norms"]:
            raise UserError(
                f"{name}.onnx: ONNX Runtime fuses {entry['fused_norms']} of {entry['norms']} norms, allowed is all of"
                " them"
            )
    return entry


def _compared(name: str, data: bytes, graph: Graph, exact: nn.Module, dtype: str) -> dict[str, float]:
    """Parity of one call, on the batch that was traced and, where it is free, on its first sample alone.

    Raises:
        ValueError: not finite, where the model is in float32, and the module that it begins in; or `_parity`.
    """
    run, found = session(data), []
    whole = len(next(iter(graph.given.values())))
    for N in (whole, 1) if any(graph.free.values()) else (whole,):
        some = {k: v[:N] for k, v in graph.given.items()}
        got = [torch.from_numpy(v) for v in run.run(None, {k: v.numpy() for k, v in some.items()})]
        want, same = list(exact(some).values()), list(graph.module(some).values())
        if all(v.isfinite().all() for v in want) and not all(v.isfinite().all() for v in got + same):
            where = first_not_finite(graph.module, functools.partial(graph.module, some)) or "none that PyTorch runs"
            raise UserError(
                f"{name}.onnx: NaN or infinity in {dtype}, first out of module {where}; allowed for this model is fp32"
            )
        found += [_parity(name, g, w, s - w, dtype) for g, w, s in zip(got, want, same, strict=True)]
    return max(found, key=lambda parity: parity["error"] / parity["allowed"])


def _parity(name: str, got: Tensor, exact: Tensor, lost: Tensor, dtype: str) -> dict[str, float]:
    """The largest error, and what is allowed: a tolerance and twice what PyTorch loses in the same arithmetic (`lost`).

    Raises:
        ValueError: it is more.
    """
    size = rms if dtype == "int8" else largest
    allowed = TOLERANCE[dtype] * max(1.0, size(exact)) + 2 * size(lost)
    error = size(got - exact)
    if not error <= allowed:
        raise UserError(f"{name}.onnx: ONNX Runtime differs from PyTorch by {error:.1e}, allowed is {allowed:.1e}")
    return {"error": error, "allowed": allowed}


def largest(v: Tensor) -> float:
    """The largest absolute value."""
    return float(v.abs().max())


def rms(v: Tensor) -> float:
    """The root mean square."""
    return float(v.square().mean().sqrt())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
