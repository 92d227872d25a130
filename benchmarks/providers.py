"""Who samples: one small class for each library, built from the same problem, and each held against its library's plain
float32 loop.

A new provider is a class with its plain loop, its family and `build`; see `Monai`. Then it is added to `providers`.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from sbldm_fast.export import ORTSampler, export
from sbldm_fast.kernels import backend
from sbldm_fast.kernels._backend import obstacle
from torch import Tensor, nn

from sbldm_fast import FastSampler
from sbldm_fast.sampling.loop import compilation

from .harness import Absent, Case
from .setup import SamplingSetup, textbook_loop
from .timing import Output

TOLERANCE = 1e-4  # float32, relative to the largest value, after all steps
FLOAT = torch.float32


@dataclass(frozen=True)
class Provider(ABC):
    """Who samples; `dtype` is the precision of the UNet's arithmetic, `compiled` a mode of torch.compile or None for
    eager."""

    dtype: torch.dtype = FLOAT
    compiled: str | None = None
    family: ClassVar[str] = "peer"  # of `schema.FAMILIES`
    plain: ClassVar[str] = "reference"  # the name of its plain float32 loop
    needs: ClassVar[tuple[str, ...]] = ()  # the modules of the library, which a fresh process imports apart
    approximate = False  # whether it computes something else by design: no speed-up, and no failure
    images = False  # whether it decodes

    @property
    def name(self) -> str:
        """As it is called in the rows."""
        return f"{self.plain}{self.suffix}"

    @property
    def reference(self) -> str:
        """The provider whose samples it must have, to rounding."""
        return f"{self.plain}{' to images' * self.images}"

    @property
    def baseline(self) -> str:
        """The plain loop in the same precision, whose error is allowed twice."""
        return f"{self.plain}{half_suffix(self.dtype)}{' to images' * self.images}"

    @property
    def prepares(self) -> bool:
        """Whether the first call compiles or captures."""
        return self.compiled is not None

    @abstractmethod
    def build(self, p: SamplingSetup) -> Output:
        """The run that is timed: noise to latents."""

    def case(self, p: SamplingSetup) -> Case:
        """The provider on a problem, for the harness."""
        return Case(
            lambda: self.build(p),
            self.reference,
            TOLERANCE,
            self.baseline,
            dtype=str(self.dtype)[6:],
            approximate=self.approximate,
            about={"family": self.family, "decodes": self.images, "prepares": self.prepares},
        )

    @property
    def suffix(self) -> str:
        """What the names of compiled and half-precision providers end with."""
        how = {None: "", "default": " torch.compile"}.get(self.compiled, f" torch.compile {self.compiled}")
        return half_suffix(self.dtype) + how

    def loop(self, model: nn.Module, scheduler: Any, p: SamplingSetup, call: Callable[..., Any]) -> Output:
        """The textbook loop of `call(model)(x, t)` with the model in this precision, compiled as this provider is."""
        if self.dtype != FLOAT:
            model = copy.deepcopy(model).to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            model = torch.compile(model, dynamic=False, mode=self.compiled)  # type: ignore[assignment]

        def run() -> Tensor:
            with compilation(p.device) if self.compiled else nullcontext():
                return textbook_loop(lambda x, t: call(model, x.to(self.dtype), t).float(), scheduler, p.steps, p.noise)

        return run


@dataclass(frozen=True)
class Reference(Provider):
    """Our UNet and scheduler stepped as in a textbook; the stages of the waterfall up to torch.compile with our
    kernels."""

    family = "reference"
    channels_last: bool = False
    fused: bool = False
    images: bool = False

    @property
    def name(self) -> str:
        how = " channels_last" * self.channels_last + self.suffix + " fused norms" * self.fused
        return f"reference{how}{' to images' * self.images}"

    def build(self, p: SamplingSetup) -> Output:
        if self.fused and (why := obstacle(p.device)):
            raise Absent(why)
        unet, scheduler = p.ours
        if self.channels_last:
            unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = self.loop(unet, scheduler, p, lambda model, x, t: model(x, t))

        def with_backend() -> Tensor:
            chosen: AbstractContextManager[Any] = backend("triton" if self.fused else "torch")
            with chosen, torch.no_grad():
                return p.decode(run()) if self.images else run()

        return with_backend


@dataclass(frozen=True)
class Ours(Provider):
    """`FastSampler` in one of its modes, on our UNet."""

    family = "ours"
    mode: str = "eager"
    images: bool = False
    tf32: bool = False

    @property
    def name(self) -> str:
        dtype = "TF32" if self.tf32 else str(self.dtype)[6:]
        return f"FastSampler {self.mode} {dtype}{' to images' * self.images}"

    @property
    def approximate(self) -> bool:  # type: ignore[override]  # of the arguments
        return self.tf32

    @property
    def prepares(self) -> bool:
        return self.mode != "eager"

    def build(self, p: SamplingSetup) -> Output:
        return self.sampler(p, *p.ours)

    def sampler(self, p: SamplingSetup, model: nn.Module, scheduler: Any) -> Output:
        """A run of FastSampler on these objects."""
        if "graph" in self.mode and p.device.type != "cuda":
            raise Absent("CUDA graphs need CUDA")
        sampler = FastSampler(
            model,
            scheduler,
            shape=p.noise.shape[1:],
            steps=p.steps,
            mode=self.mode,
            dtype=self.dtype,
            decode=p.decode if self.images else None,
            tf32=self.tf32,
        )
        return lambda: sampler(noise=p.noise)


@dataclass(frozen=True)
class Diffusers(Provider):
    """diffusers' own loop over its own UNet2DModel and DDIMScheduler."""

    plain = "diffusers"
    needs = ("diffusers.models", "diffusers.schedulers")

    def build(self, p: SamplingSetup) -> Output:
        return self.loop(*p.diffusers, p, lambda model, x, t: model(x, t, return_dict=False)[0])


@dataclass(frozen=True)
class DiffusersUnderOurs(Ours):
    """diffusers' objects, untouched, under `FastSampler`."""

    family = "drop-in"
    plain = "diffusers"
    needs = Diffusers.needs

    @property
    def name(self) -> str:
        return f"diffusers{half_suffix(self.dtype)} under FastSampler {self.mode}"

    def build(self, p: SamplingSetup) -> Output:
        return self.sampler(p, *p.diffusers)


@dataclass(frozen=True)
class Monai(Provider):
    """MONAI's DiffusionModelUNet and DDIMScheduler in the textbook loop."""

    plain = "MONAI"
    needs = ("monai.networks.nets", "monai.networks.schedulers")

    def build(self, p: SamplingSetup) -> Output:
        return self.loop(*p.monai, p, lambda model, x, t: model(x, t.reshape(1).expand(len(x)).to(x.device)))


@dataclass(frozen=True)
class Runtime(Provider):
    """diffusers' loop with its UNet in ONNX Runtime or OpenVINO on a CPU, with as many threads as PyTorch."""

    plain = "diffusers"
    runtime: str = "ONNX Runtime"

    @property
    def name(self) -> str:
        return f"diffusers {self.runtime}{self.suffix}"

    def build(self, p: SamplingSetup) -> Output:
        if p.device.type != "cpu":
            raise Absent("a runtime for CPUs")
        threads = torch.get_num_threads()
        if self.runtime == "ONNX Runtime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(p.onnx, options, providers=["CPUExecutionProvider"])

            def call(inputs: dict[str, Any]) -> Any:
                return session.run(None, inputs)[0]

        else:
            import openvino

            hint = "f32" if self.dtype == FLOAT else "bf16"
            config = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
            core = openvino.Core()
            request = core.compile_model(core.read_model(p.onnx), "CPU", config).create_infer_request()

            def call(inputs: dict[str, Any]) -> Any:
                return request.infer(inputs)["m"].copy()

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return torch.from_numpy(call({"x": x.numpy(), "t": t.expand(len(x)).numpy()}))

        return lambda: textbook_loop(predict, p.diffusers[1], p.steps, p.noise)


@dataclass(frozen=True)
class Exported(Provider):
    """`ORTSampler`: our UNet, solver and (mode `sampler`) loop in one exported graph."""

    mode: str = "sampler"
    precision: Literal["fp32", "int8"] = "fp32"
    cuda: bool = False
    cuda_graph: bool = False
    fuse: bool = False

    family = "ours"
    needs = ("onnxruntime",)

    @property
    def name(self) -> str:
        how = " graph" * self.cuda_graph + " fused" * self.fuse + " int8" * self.approximate
        return f"ORTSampler {self.mode} {'CUDA' if self.cuda else 'CPU'}{how}"

    @property
    def approximate(self) -> bool:  # type: ignore[override]  # of the arguments
        return self.precision == "int8"

    @property
    def prepares(self) -> bool:
        return self.cuda_graph

    def build(self, p: SamplingSetup) -> Output:
        importlib.import_module("onnx")
        import onnxruntime

        wanted = "CUDAExecutionProvider" if self.cuda else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers() or (self.cuda and p.device.type != "cuda"):
            raise Absent(f"this ONNX Runtime has no {wanted} here")
        unet, scheduler = p.ours
        _, channels, height, width = p.noise.shape
        folder = Path(p.folder.name) / self.precision
        if not folder.exists():
            shape = (channels, height, width)
            export(
                unet, folder, dtype=self.precision, scheduler=scheduler, steps=p.steps, shape=shape, batch=len(p.noise)
            )
        options: dict[str, str] = {"use_tf32": "0"} if self.cuda else {}
        sampler = ORTSampler(
            folder, mode=self.mode, providers=[(wanted, options)], cuda_graph=self.cuda_graph, fuse=self.fuse
        )
        start = p.noise.cpu()
        return lambda: torch.from_numpy(sampler(noise=start))


def half_suffix(dtype: torch.dtype) -> str:
    """What the name of a provider in half precision has after its library."""
    return "" if dtype == FLOAT else f" {str(dtype)[6:]}"


def export_providers(device: torch.device, compiled: bool = True) -> Iterator[Provider]:
    """The ways of ONNX Runtime, beside our own."""
    graphs = ["step-graph", "loop-graph"] * (device.type == "cuda")
    yield Reference()
    yield from (Ours(mode=mode) for mode in ["eager", *["compile"] * compiled, *graphs])
    yield from (Exported(mode="step"), Exported(), Exported(mode="step", precision="int8"))
    yield from (Exported(mode="step", cuda=True), Exported(mode="step", cuda=True, cuda_graph=True))
    yield from (Exported(mode="step", cuda=True, fuse=True), Exported(cuda=True))


def brief_providers(device: torch.device, dtypes: Sequence[torch.dtype], compiled: bool = False) -> Iterator[Provider]:
    """Our fastest ways, to latents and to images, beside the plain loops: what the first minutes on a GPU are spent on.

    With `compiled` also what torch.compile makes of the last of `dtypes`, diffusers' and ours.
    """
    graphs = ["step-graph", "loop-graph"] if device.type == "cuda" else ["eager"]
    for dtype in dtypes:
        yield Reference(dtype)
        yield from (Ours(dtype, mode=mode) for mode in graphs)
        # as fast as float16, and its plain loops take a third of the time
        if dtype == torch.bfloat16 and len(dtypes) > 2:
            continue
        yield Diffusers(dtype)
        yield DiffusersUnderOurs(dtype, mode=graphs[-1])
        yield Reference(dtype, images=True)
        yield Ours(dtype, mode=graphs[-1], images=True)
    if device.type == "cuda":
        yield Ours(mode=graphs[-1], tf32=True)
    yield Monai()
    if compiled:
        yield Diffusers(dtypes[-1], "reduce-overhead" if device.type == "cuda" else "default")
        yield Ours(dtypes[-1], mode="loop-graph+compile" if device.type == "cuda" else "compile")


def providers(device: torch.device, dtypes: Sequence[torch.dtype], compiled: bool = True) -> Iterator[Provider]:
    """Everybody, float32 first; without `compiled` those that need no compiling."""
    graphs = device.type == "cuda"
    yield Reference()
    yield Reference(channels_last=True)
    for dtype in dtypes:
        if dtype != FLOAT:
            yield Reference(dtype)
        if compiled:
            yield Reference(dtype, "default", channels_last=True)
            yield Reference(dtype, "default", channels_last=True, fused=True)
        yield Ours(dtype, mode="eager")
        modes = (
            ["compile"] * compiled
            + ["step-graph", "loop-graph"]
            + ["step-graph+compile", "loop-graph+compile"] * (compiled and graphs)
        )
        yield from (Ours(dtype, mode=mode) for mode in modes)
        yield Diffusers(dtype)
        ways = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs") if graphs else ("default",)
        yield from (Diffusers(dtype, way) for way in ways if compiled)
        yield DiffusersUnderOurs(dtype, mode="loop-graph" if graphs else "compile" if compiled else "eager")
        if compiled and not graphs:
            if dtype == FLOAT:
                yield Exported()
            yield from (Runtime(dtype, runtime=runtime) for runtime in ("ONNX Runtime", "OpenVINO")[dtype != FLOAT :])
        yield Monai(dtype)
        if compiled:
            yield Monai(dtype, "default")
