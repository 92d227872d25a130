"""Sampling with ONNX Runtime from an exported folder: the call and the seeds of `FastSampler`, the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.errors import MissingExtra, NotFinite, UserError
from sbldm_fast.models.covariates import MAPS, Covariate, encode
from sbldm_fast.sampling.model import Cond
from sbldm_fast.sampling.noise import draw
from sbldm_fast.sampling.request import Batch, SampleRequest

from .fusion import fuse_group_norms, has_external_data
from .manifest import MANIFEST, Manifest, find_misdescribed, read_covariates, read_manifest
from .modules import Solver, input_name, table_inputs

Given = Cond | np.ndarray | Mapping[str, np.ndarray]  # what a caller gives
CPU = ("CPUExecutionProvider",)


def import_runtime() -> Any:
    """The onnxruntime package.

    Raises:
        ImportError: it, or onnx, is not installed.
    """
    try:
        import onnx  # noqa: F401  # to look at a graph before it is run
        import onnxruntime
    except ImportError as missing:
        raise MissingExtra("running a graph", str(missing.name), "onnx") from None
    return onnxruntime


def parse_graph(data: bytes) -> Any:
    """An ONNX graph in memory.

    Raises:
        ValueError: it is no graph, or refers to other files; onnx or onnxruntime is not installed.
    """
    import_runtime()
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # protobuf's own class
        raise UserError("not an ONNX graph") from None
    if has_external_data(model):
        raise UserError("the graph refers to other files, allowed is one in a single file")
    return model


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """ONNX Runtime's errors in the block, whose classes are private, as one."""
    try:
        yield
    except Exception as failure:
        raise UserError(f"{what}: {(str(failure).strip() or type(failure).__name__).splitlines()[0]}") from failure


def open_session(data: bytes, providers: Sequence[Any] = CPU) -> Any:
    """An ONNX Runtime session of a graph in memory, with as many threads as PyTorch has.

    Raises:
        ValueError: onnxruntime is not installed, has not got a provider, or refuses the graph; the graph refers to
            other files.
    """
    onnxruntime = import_runtime()
    parse_graph(data)
    here = onnxruntime.get_available_providers()
    if missing := [p for p in (p if isinstance(p, str) else p[0] for p in providers) if p not in here]:
        raise UserError(f"providers: got {missing[0]}, allowed on this machine are {', '.join(here)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are about what it folded
    with translate_errors("ONNX Runtime refuses the graph"):
        return onnxruntime.InferenceSession(data, options, providers=list(providers))


def _providers(providers: Sequence[Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """The providers of ONNX Runtime with their options; None: CUDA if it is there, then the CPU."""
    if providers is None:
        # without TF32, so that float32 means float32
        cuda = [("CUDAExecutionProvider", {"use_tf32": "0"})]
        here = import_runtime().get_available_providers()
        return [*(cuda if cuda[0][0] in here else []), ("CPUExecutionProvider", {})]
    if not providers:
        raise UserError("providers: got none, allowed is one or more, or None")
    return [(p, {}) if isinstance(p, str) else (p[0], p[1]) for p in providers]


def _open(manifest: Manifest, name: str, providers: Sequence[Any], fuse: bool) -> Any:
    """A session of a graph that is the one that was written."""
    path, data = manifest.folder / f"{name}.onnx", manifest.read_graph(name)
    with translate_errors(str(path)):
        model = parse_graph(data)
    if other := find_misdescribed(model, manifest.graphs[name]):
        raise UserError(f"{path}: its {other} are not those in {MANIFEST}: export again")
    return open_session(fuse_group_norms(data)[0] if fuse else data, providers)


class ORTSampler:
    """Samples from the graphs of a folder that `export` wrote.

    - `step`: the loop here, a session run per step, states bound to two buffers that change places: nothing is copied
      between steps. Batches have the size that `step` was exported with.
    - `sampler`: the loop inside one graph; any batch.

    On CUDA the buffers are on the device, and `cuda_graph` replays a captured step: not run, no CUDA machine has
    measured it yet.

    Args:
        folder: what `export` wrote, or its manifest; every file is checked against its sha256.
        providers: of ONNX Runtime, by name or with options; None: CUDA if it is there, without TF32, then the CPU.
        mode: one of the above.
        cuda_graph: let the CUDA provider capture `step`.
        fuse: on CUDA, a folder for `ort` with its norms fused (`sbldm_fast.export.fusion`).

    Raises:
        ValueError: an argument that is not allowed, or a folder that is not whole.
    """

    def __init__(
        self,
        folder: str | Path | Manifest,
        *,
        providers: Sequence[Any] | None = None,
        mode: str = "step",
        cuda_graph: bool = False,
        fuse: bool = False,
    ) -> None:
        if mode not in ("step", "sampler"):
            raise UserError(f"mode: got {mode!r}, allowed are step, sampler")
        manifest = folder if isinstance(folder, Manifest) else read_manifest(Path(folder))
        providers = _providers(providers)
        first, options = providers[0]
        self.manifest, self.table, self.mode, self.graph = manifest.content, manifest.table, mode, cuda_graph
        self.device = "cuda" if first == "CUDAExecutionProvider" else "cpu"
        self.device_id = int(options.get("device_id", 0))
        target = self.manifest["target"]
        if fuse and (self.device != "cuda" or target != "ort"):
            raise UserError(f"fuse: got True for {first} and {target!r}, allowed is CUDAExecutionProvider and 'ort'")
        if cuda_graph and (self.device != "cuda" or mode != "step"):
            raise UserError(
                f"cuda_graph: got True for {first} and {mode!r}, allowed is CUDAExecutionProvider and 'step'"
            )
        captured = [(first, options | {"enable_cuda_graph": "1"}), *providers[1:]] if cuda_graph else providers
        decodes = mode == "step" and self.manifest["decodes"]
        if missing := [n for n in (mode, *(["vae_decoder"] if decodes else [])) if n not in manifest.graphs]:
            path = manifest.folder / MANIFEST
            raise UserError(f"{path}: got no graph {missing[0]}, allowed is one with it: export again")
        self.run = _open(manifest, mode, captured, fuse)
        self.decoder = _open(manifest, "vae_decoder", providers, fuse) if decodes else None
        self.solver = Solver.of(self.table)
        self.covariates = read_covariates(self.manifest, str(manifest.folder))
        self.shape = tuple(self.manifest["latent_shape"])
        size = manifest.graphs[mode]["inputs"]["x"]["shape"][0]
        self.batch: int | None = size if isinstance(size, int) else None
        self._loop: _Loop | None = None

    def __call__(self, n: int | None = None, **arguments: Any) -> np.ndarray:
        """Images `[n, 1, S, S]` in [-1, 1], or latents where the folder has no decoder, as float32 arrays; arguments as
        `stream`."""
        return np.concatenate(list(self.stream(n, **arguments)))

    def stream(
        self,
        n: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        noise: Tensor | np.ndarray | None = None,
        indices: Sequence[int] | None = None,
        cond: Given = None,
        uncond: Given = None,
        guidance_scale: float | Tensor | None = None,
        extrapolate: bool = False,
        callback: Callable[[int, float, np.ndarray], None] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """What a call makes, batch by batch; arguments as in `FastSampler`, a guidance_scale of None is 1, `callback`
        gets x as an array.

        Raises:
            ValueError: as `FastSampler`; a batch size that the graph has not; conditioning of other names or shapes; a
                callback in a loop.
            FloatingPointError: NaN or infinity, with the samples.
        """
        if self.batch is not None and batch_size not in (None, self.batch):
            raise UserError(
                f"batch_size: got {batch_size}, allowed is {self.batch}, which {self.mode}.onnx was exported with"
            )
        if callback is not None and self.mode == "sampler":
            raise UserError("callback: got one, allowed in mode 'sampler' is None: its loop is inside the graph")
        wanted = self.manifest["cond"]
        reads = _Reads(self.covariates, wanted.get(MAPS)) if self.covariates else None
        cond, guidance_scale = self._complete(cond, guidance_scale)
        start = torch.as_tensor(noise) if noise is not None else None
        asked = SampleRequest(
            self.shape,
            torch.device("cpu"),
            n,
            model=reads,
            seed=seed,
            noise=start,
            indices=indices,
            cond=cond if self.covariates else _tensors(cond),  # type: ignore[arg-type]
            uncond=uncond if self.covariates else _tensors(uncond),  # type: ignore[arg-type]
            guidance_scale=guidance_scale,
            extrapolate=extrapolate,
            batch_size=self.batch or batch_size,
        )
        if {k: list(v.shape[1:]) for k, v in asked.cond.items()} != wanted:
            raise UserError(
                f"cond: got { ({k: list(v.shape) for k, v in asked.cond.items()}) }, allowed is one row each of"
                f" {wanted}"
            )
        for batch in asked.batches():
            out = self._run_batch(self._inputs(batch), callback)[: len(batch.places)]
            finite = np.isfinite(out).all(axis=tuple(range(1, out.ndim)))
            if not finite.all():
                broken = [batch.places[i] for i in np.flatnonzero(~finite)]
                raise NotFinite(f"{self.mode}.onnx: NaN or infinity in samples {broken}")
            yield out

    def _complete(self, cond: Given, guidance_scale: float | Tensor | None) -> tuple[Given, float | Tensor | None]:
        """What the graphs have inputs for though nobody asked: unknown covariates, a guidance of 1."""
        wanted, guided = self.manifest["cond"], self.manifest["guided"]
        if guidance_scale is not None and wanted and not guided:
            raise UserError(f"guidance_scale: got {guidance_scale}, allowed is None: it was exported without guidance")
        if self.covariates and cond is None and guidance_scale is None:
            cond = dict.fromkeys(wanted)
        if wanted and guided and cond is not None and guidance_scale is None:
            guidance_scale = 1.0
        return cond, guidance_scale

    def _inputs(self, batch: Batch) -> dict[str, np.ndarray]:
        x, seeds, guidance = batch.x, batch.seeds, batch.guidance
        given = {"x": x * self.table.init_noise_sigma, **table_inputs(self.table)}
        if self.solver.stochastic:
            given["noise"] = torch.stack([draw(seeds, self.shape, x.device, i + 1) for i in range(self.solver.steps)])
        for key, value in batch.cond.items():
            if guidance is None:
                given[input_name("cond", key)] = value
            else:
                given[input_name("uncond", key)], given[input_name("cond", key)] = value.chunk(2)
        if guidance is not None:
            given["guidance_scale"] = guidance
        kinds = self.manifest["graphs"][self.mode]["inputs"]
        # a buffer takes whatever bytes it is given
        return {k: np.ascontiguousarray(v.detach().cpu().numpy(), dtype=kinds[k]["dtype"]) for k, v in given.items()}

    def _run_batch(
        self, given: dict[str, np.ndarray], callback: Callable[[int, float, np.ndarray], None] | None
    ) -> np.ndarray:
        if self.mode == "sampler":
            with translate_errors("sampler.onnx"):
                out: np.ndarray = self.run.run(None, given)[0]
            return out
        if self._loop is None:
            self._loop = _Loop(self, given)
        latent = self._loop.run(given, callback, self.table.timesteps.tolist())
        if self.decoder is None:
            return np.array(latent.numpy())
        bound = self.decoder.io_binding()
        bound.bind_ortvalue_input("z", latent)
        bound.bind_output("image", "cpu")
        with translate_errors("vae_decoder.onnx"):
            self.decoder.run_with_iobinding(bound)
        image: np.ndarray = bound.get_outputs()[0].numpy()
        return image


def _tensors(cond: Given) -> Cond:
    if cond is None or isinstance(cond, Tensor):
        return cond
    return {k: torch.as_tensor(v) for k, v in cond.items()} if isinstance(cond, Mapping) else torch.as_tensor(cond)


class _Reads:
    """Reads a condition by the covariates of a manifest, as the exported model did."""

    def __init__(self, covariates: Sequence[Covariate], maps: list[int] | None) -> None:
        self.covariates, self.maps = covariates, maps

    def read_condition(self, cond: Any, n: int, **options: Any) -> dict[str, Tensor]:
        """As `UNet2D.read_condition`: what is None is unknown, maps are 0; those that are given are looked at with the
        shapes."""
        given = cond
        if self.maps and (cond is None or (isinstance(cond, dict) and cond.get(MAPS, cond) is None)):
            given = {**(cond or {}), MAPS: torch.zeros(n, *self.maps)}
        return encode(self.covariates, {} if given is None else given, n, **options)


class _Loop:
    """The buffers of `step`, made once, on the device, and the two ways they are bound: from a to b and from b to a."""

    def __init__(self, sampler: ORTSampler, given: dict[str, np.ndarray]) -> None:
        onnxruntime, run, solver = import_runtime(), sampler.run, sampler.solver

        def value(array: np.ndarray) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array), sampler.device, sampler.device_id)

        state = {"x": given["x"], "index": np.zeros(1, np.int64)}
        if solver.history:
            state["history"] = np.zeros((solver.history, 2, *given["x"].shape), np.float32)
        self.session, self.start = run, state
        self.fixed = {k: value(v) for k, v in given.items() if k != "x"}
        self.states = [{k: value(v) for k, v in state.items()} for _ in range(2)]
        self.bindings: list[Any] = []
        self.options: list[Any] = []
        for here, there in (self.states, self.states[::-1]):
            binding, options = run.io_binding(), onnxruntime.RunOptions()
            for name, held in (self.fixed | here).items():
                binding.bind_ortvalue_input(name, held)
            for name, held in there.items():
                binding.bind_ortvalue_output(f"{name}_next", held)
            if sampler.graph:
                options.add_run_config_entry("gpu_graph_id", str(len(self.bindings) + 1))
            self.bindings.append(binding)
            self.options.append(options)

    def run(
        self,
        given: dict[str, np.ndarray],
        callback: Callable[[int, float, np.ndarray], None] | None,
        times: list[float],
    ) -> Any:
        """The value that holds the last x."""
        for name, array in (self.start | given).items():
            (self.states[0] if name in self.start else self.fixed)[name].update_inplace(array)
        for i, t in enumerate(times):
            with translate_errors("step.onnx"):
                self.session.run_with_iobinding(self.bindings[i % 2], self.options[i % 2])
            if callback is not None:
                callback(i, t, np.array(self.states[1 - i % 2]["x"].numpy()))
        return self.states[len(times) % 2]["x"]
