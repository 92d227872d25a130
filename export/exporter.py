"""A pipeline, or any model with a linear scheduler, to a folder of ONNX graphs, each proven equal before it is kept."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sbldm_fast.kernels import backend
from torch import Tensor, nn
from tqdm import tqdm

from sbldm_fast import FastSampler, Pipeline, SolverTable
from sbldm_fast.errors import MissingExtra, UserError
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.images import NOTICE
from sbldm_fast.models import UNet2D
from sbldm_fast.models.covariates import MAPS, Covariate
from sbldm_fast.models.presets import PRESETS
from sbldm_fast.sampling.model import Cond, TensorDict, tensors_by_name
from sbldm_fast.sampling.noise import draw

from .graphs import EXAMPLES, Networks, Run, as_model, build_graphs, example_condition, repeat
from .int8 import quantize
from .manifest import EXAMPLE, FORMAT, GRAPHS, MANIFEST, Manifest, describe_graph, sha256
from .modules import SamplerGraph, Tensors, count_norms, input_name
from .trace import Graph, onnx_bytes
from .verify import TOLERANCE, compare, compare_module, example_call, find_faults, sample_again

# ort: with a dynamic batch ONNX Runtime fuses GroupNorm from the form of this opset, and from no later one.
# tensorrt: GroupNormalization of opset 21 (TensorRT 10.9); that of 18 is deprecated, and Attention of 23 fails to
# build.
OPSETS = {"ort": 18, "tensorrt": 21}
MAX_BATCH = 65_536  # samples of a fixed batch; the shapes of its graph are traced with tensors of that size
CALIBRATED = 2  # every other step of a run
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


@dataclass(frozen=True)
class Plan:
    """What is exported, and how: arguments that are allowed, with a copy of the models on the CPU."""

    source: Pipeline | nn.Module
    model: nn.Module
    shape: tuple[int, ...]
    table: SolverTable
    cond: TensorDict
    guided: bool
    target: str
    dtype: str
    batch: int | None

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of a sampler that the example is made with."""
        return example_call(self.cond, bool(self.covariates), self.guided)

    @property
    def covariates(self) -> tuple[Covariate, ...]:
        """What a model of ours can be asked for."""
        return self.model.config.covariates if isinstance(self.model, UNet2D) else ()

    @property
    def opset(self) -> int:
        """Of every graph."""
        return OPSETS[self.target]

    def dtype_of(self, name: str) -> str:
        """The arithmetic of a graph: int8 is that of `unet` and `step` alone."""
        return "fp32" if self.dtype == "int8" and name not in ("unet", "step") else self.dtype


def export(
    source: Pipeline | nn.Module,
    out: str | Path,
    *,
    target: str = "ort",
    dtype: str = "fp32",
    batch: int | str = "dynamic",
    scheduler: Any = None,
    steps: int | None = None,
    eta: float = 0.0,
    shape: tuple[int, ...] | None = None,
    cond: Cond = None,
    guidance: bool | None = None,
    license: str = "not stated",
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
        scheduler: a name of `Pipeline.sampler`, a scheduler object or a `SolverTable`; None: a pipeline's own.
        steps, eta: of the table in the manifest, None: as of `Pipeline.sampler`; a `SolverTable` has its own. `step`
            has as many rows; `sampler` takes any number.
        shape: of one sample, `(C, H, W)` or `(C, D, H, W)`; a pipeline knows its own.
        cond: an example of the conditioning, `[n, ...]` or a mapping of such; the graphs then take `cond`, `uncond`,
            `guidance_scale`. A model with covariates needs none; its graphs take `cond_NAME` for each, float32 `[N]`,
            NaN where unknown.
        guidance: whether `step` and `sampler` compute the second pass of guidance, at any scale; None: where there is
            conditioning without covariates.
        license: of the weights, for the manifest.
        force: replace a folder that holds something else.
        progress: show which graph is being made.

    Returns:
        The manifest.

    Raises:
        UserError: an argument that is not allowed; an operator without an ONNX form (named with its module) or that
            the target has not; a graph that is not finite, or differs from PyTorch by more than `TOLERANCE` and twice
            what PyTorch itself loses.
        ImportError: a package of the extra `onnx` is missing.
    """
    _check_arguments(target, dtype, batch)
    claim(Path(out), force)
    versions = _versions()
    source = _copy_to_cpu(source)
    model, shape, table = _resolve(source, shape, scheduler, steps, eta)
    if isinstance(model, UNet2D):
        rows = example_condition(model, cond)
        guided = bool(guidance)
    else:
        rows = {k: v.detach().cpu()[torch.arange(EXAMPLES) % len(v)] for k, v in tensors_by_name(cond).items()}
        guided = bool(rows) if guidance is None else guidance
    if guided and not rows:
        raise UserError("guidance: got True, allowed without conditioning is False")
    fixed = None if batch == "dynamic" else int(batch)
    plan = Plan(source, model, shape, table, rows, guided, target, dtype, fixed)
    _check_norms(plan)
    with whole_folder(out, lose=force) as folder, torch.no_grad(), backend("torch"):
        exact = Networks.of(source, torch.float32)
        own = Networks.of(source, torch.float16) if dtype == "fp16" else exact
        run = _sample(plan)
        manifest = Manifest(folder, _describe(plan, license, versions), table)
        graphs = build_graphs(own, table, run, fixed, target)
        with tqdm(graphs.items(), desc="export", unit="graph", disable=not progress) as bar:
            for name, graph in bar:
                bar.set_postfix_str(f"{name}: tracing")
                data = _trace(name, graph, plan, run)
                (folder / f"{name}.onnx").write_bytes(data)
                bar.set_postfix_str(f"{name}: verifying")
                _verify_graph(name, data, graph, plan, manifest)
                if (reference := _reference(name, exact)) is not None:
                    parity = compare_module(name, data, graph, reference, plan.dtype_of(name))
                    manifest.graphs[name]["parity"] = parity
        example = _write_example(plan, run, manifest)
        _verify_samples(plan, run, own, manifest, example)
        write_json(folder / MANIFEST, manifest.content)
    return manifest.content


def _check_arguments(target: str, dtype: str, batch: int | str) -> None:
    for name, value, allowed in (("target", target, OPSETS), ("dtype", dtype, TOLERANCE)):
        if value not in allowed:
            raise UserError(f"{name}: got {value!r}, allowed are {', '.join(allowed)}")
    if batch != "dynamic" and (type(batch) is not int or not 1 <= batch <= MAX_BATCH):
        raise UserError(f"batch: got {batch!r}, allowed is 1 to {MAX_BATCH}, or 'dynamic'")
    if dtype == "int8" and target != "ort":
        raise UserError(f"dtype: got int8 for {target}, allowed is ort: its quantized convolutions are for a CPU")


def claim(out: Path, force: bool) -> None:
    """Make sure that `out` may be written, before the work begins.

    Raises:
        UserError: a file, or a folder with something that no export wrote.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, allowed is a folder")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"out: {out} is the current folder or holds it, allowed is another")
    found = {p.name for p in out.iterdir()} if out.exists() else set()
    ours = {MANIFEST, EXAMPLE, *(f"{name}.onnx" for name in GRAPHS)} if _is_exported(out) else set()
    if not force and (other := sorted(found - ours)):
        allowed = "a new folder, or --force to replace this one"
        raise UserError(f"out: {out} holds {other[0]}, which no export wrote; allowed is {allowed}")


def _is_exported(out: Path) -> bool:
    try:
        return read_json(out / MANIFEST).get("notice") == NOTICE
    except UserError:
        return False


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "sbldm_fast": importlib.metadata.version("sbldm_fast")}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            raise MissingExtra("export", package, "onnx") from None
    return found


def _copy_to_cpu(source: Pipeline | nn.Module) -> Pipeline | nn.Module:
    """A copy, so that the caller's stays where it is."""
    if isinstance(source, Pipeline):
        return copy.deepcopy(source).to("cpu")
    if isinstance(source, nn.Module):
        return nn.Module.to(copy.deepcopy(source), "cpu").eval()
    raise UserError(f"source: got {type(source).__name__}, allowed is a Pipeline or a torch.nn.Module")


def _resolve(
    source: Pipeline | nn.Module, shape: tuple[int, ...] | None, scheduler: Any, steps: int | None, eta: float
) -> tuple[nn.Module, tuple[int, ...], SolverTable]:
    """The model, the shape of a sample, the table."""
    if isinstance(source, Pipeline):
        if shape is not None:
            raise UserError(f"shape: got {shape}, allowed with a pipeline is None: it has its own")
        sampler = source.sampler(steps, "eager", scheduler=scheduler, eta=eta)
        return source.unet, source.latent_shape, sampler.table
    if shape is None or len(shape) not in (3, 4) or isinstance(scheduler, str | None):
        allowed = "(C, H, W) or (C, D, H, W) and a scheduler object or SolverTable"
        raise UserError(f"shape, scheduler: got {shape}, {scheduler!r}, allowed with a model alone are {allowed}")
    if not isinstance(scheduler, SolverTable):
        scheduler = SolverTable.from_scheduler(scheduler, 50 if steps is None else steps, eta=eta)
    return source, shape, scheduler


def _check_norms(plan: Plan) -> None:
    parts = [plan.model, plan.source.vae] if isinstance(plan.source, Pipeline) else [plan.model]
    if plan.target == "tensorrt" and any(getattr(m, "num_groups", 0) == 1 for part in parts for m in part.modules()):
        why = "a norm of one group, which TensorRT takes for an instance norm"
        raise UserError(f"target: got 'tensorrt' for {why}; allowed is ort")


def _describe(plan: Plan, license: str, versions: dict[str, str]) -> dict[str, Any]:
    """The manifest, as yet without graphs."""
    return {
        "format": FORMAT,
        "target": plan.target,
        "opset": plan.opset,
        "dtype": plan.dtype,
        "notice": NOTICE,
        "license": license,
        "versions": versions,
        "model": _describe_model(plan.source),
        "latent_shape": list(plan.shape),
        "cond": _cond_shapes(plan),
        "guided": plan.guided,
        "covariates": [{k: v for k, v in c.to_dict().items() if k[0] != "_"} for c in plan.covariates],
        "decodes": isinstance(plan.source, Pipeline),
        "solver": plan.table.to_dict(),
        "graphs": {},
    }


def _cond_shapes(plan: Plan) -> dict[str, list[int]]:
    return {k: list(v.shape[1:]) for k, v in plan.cond.items()}


def _describe_model(source: Pipeline | nn.Module) -> dict[str, Any]:
    if not isinstance(source, Pipeline):
        return {"class": type(source).__name__}
    vae, unet = source.vae.config, source.unet.config
    presets = [
        name for name, p in PRESETS.items() if p.unet == unet and p.vae.block_out_channels == vae.block_out_channels
    ]
    return {
        "class": "Pipeline",
        "preset": next(iter(presets), None),
        "scaling_factor": vae.scaling_factor,
        "vae": vae.to_dict(),
        "unet": unet.to_dict(),
        "scheduler": source.scheduler.config.to_dict(),
    }


def _sample(plan: Plan) -> Run:
    """The run of PyTorch that the graphs must repeat.

    Raises:
        UserError: the model does not take the shape or the conditioning.
    """
    noise = draw(torch.tensor([[0, i] for i in range(EXAMPLES)]), plan.shape, torch.device("cpu"))
    states = [noise * plan.table.init_noise_sigma]
    keep = (lambda i, t, x: states.append(x.clone())) if plan.dtype == "int8" else None
    sampler = FastSampler(plan.model, plan.table, shape=plan.shape, mode="eager")
    try:
        latents = sampler(noise=noise, seed=0, callback=keep, **plan.asked)
    except RuntimeError as failure:
        given, why = f"{plan.shape}, {_cond_shapes(plan)}", " ".join(str(failure).split())[:300]
        raise UserError(f"shape, cond: got {given}, which the model does not take: {why}") from failure
    images = plan.source.decode(latents) if isinstance(plan.source, Pipeline) else latents
    return Run(latents, images, plan.cond, noise, states, plan.guided)


def _trace(name: str, graph: Graph, plan: Plan, run: Run) -> bytes:
    """The graph in ONNX, calibrated on the run and quantized where int8 is asked for."""
    data = onnx_bytes(name, graph, plan.opset)
    if plan.dtype_of(name) != "int8":
        return data
    visited = range(0, len(run.states) - 1, CALIBRATED)
    return quantize(data, [_step_inputs(name, graph, run.states[i], plan.table, i) for i in visited])


def _step_inputs(name: str, graph: Graph, x: Tensor, table: SolverTable, i: int) -> dict[str, np.ndarray]:
    """The inputs of a graph at step i of a run; `step` scales x itself."""
    N = len(graph.given["x"])
    x = repeat(x, N) * (1.0 if name == "step" else float(table.input_scale[i]))
    now = {"x": x, "t": table.timesteps[i].expand(N), "index": torch.tensor([i])}
    return {k: now[k].to(v.dtype).numpy() if k in now else v.numpy() for k, v in graph.given.items()}


def _reference(name: str, exact: Networks) -> nn.Module | None:
    """The float32 module that a graph of one call repeats; what loops is held against a run."""
    return {"unet": exact.unet, "vae_encoder": exact.encoder, "vae_decoder": exact.decoder}.get(name)


def _verify_graph(name: str, data: bytes, graph: Graph, plan: Plan, manifest: Manifest) -> None:
    """Write what the manifest says of a graph, and look at its form.

    Raises:
        UserError: something is wrong with it, such as norms of a model of ours that ONNX Runtime does not fuse.
    """
    import onnx

    dtype = plan.dtype_of(name)
    entry: dict[str, Any] = {"sha256": sha256(data), "bytes": len(data), "dtype": dtype}
    for side, tensors in describe_graph(onnx.load_model_from_string(data)).items():
        ranges = RANGES | {input_name("cond", c.name): f"{_numbers(c)}; NaN: unknown" for c in plan.covariates}
        entry[side] = {k: v | ({"range": ranges[k]} if k in ranges else {}) for k, v in tensors.items()}
    if plan.target == "ort" and dtype != "int8" and not isinstance(graph.module, SamplerGraph):
        entry["norms"] = count_norms(graph.module, graph.given)
    manifest.graphs[name] = entry
    found: dict[str, Any] = {}
    for fault in find_faults(name, data, manifest, found):
        raise UserError(f"{name}.onnx: {fault}")
    if "norms" in entry:
        entry["fused_norms"] = found["fused_norms"]


def _numbers(covariate: Covariate) -> str:
    """What the numbers of a covariate mean to whoever fills the input without our Python."""
    return ", ".join(f"{i}: {v}" for i, v in enumerate(covariate.values)) or covariate.allowed


def _write_example(plan: Plan, run: Run, manifest: Manifest) -> Tensors:
    """Write samples with their noise and conditioning, for whoever runs the graphs elsewhere."""
    samples = "images" if isinstance(plan.source, Pipeline) else "latents"
    kept = {"noise": run.noise, samples: run.images} | {input_name("cond", k): v for k, v in plan.cond.items()}
    path = manifest.folder / EXAMPLE
    np.savez(path, allow_pickle=False, **{k: v.numpy() for k, v in kept.items()})
    shapes = {k: list(v.shape) for k, v in kept.items()}
    manifest.content["example"] = {"sha256": sha256(path.read_bytes()), "seed": 0, **shapes}
    return kept


def _verify_samples(plan: Plan, run: Run, own: Networks, manifest: Manifest, example: Tensors) -> None:
    """Hold the graphs that sample against PyTorch's run.

    Raises:
        UserError: they differ by more than is allowed.
    """
    # what PyTorch loses itself: in fp16 beside fp32, in a foreign model, whose weights may amplify anything, at another
    # batch size
    loss = torch.zeros(1)
    if plan.dtype == "fp16" or own.decoder is None:
        first = plan.asked | ({"cond": {k: v[:1] for k, v in plan.cond.items()}} if plan.cond else {})
        if plan.covariates and plan.guided:  # this sampler knows nothing of them
            first["uncond"] = {k: torch.full_like(v, 0.0 if k == MAPS else torch.nan) for k, v in first["cond"].items()}
        again = FastSampler(as_model(own.unet), plan.table, shape=plan.shape, mode="eager")(1, seed=0, **first)
        loss = own.decode(again) - run.images[:1]
    for name in ("step", "sampler"):
        _, got = sample_again(manifest, name, example)
        manifest.graphs[name]["parity"] = compare(name, got, run.images, loss, plan.dtype_of(name))
