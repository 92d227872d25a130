"""The graphs of an export: their modules, the inputs they are traced with, and which axes stay free."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbldm_fast import Pipeline, SolverTable
from sbldm_fast.models import UNet2D
from sbldm_fast.models.covariates import MAPS
from sbldm_fast.sampling.model import Cond, TensorDict, tensors_by_name
from sbldm_fast.sampling.noise import draw

from .manifest import GUIDANCE
from .modules import (
    DecoderGraph,
    EncoderGraph,
    SamplerGraph,
    Solver,
    StepGraph,
    Tensors,
    UNetGraph,
    input_name,
    is_condition,
    table_inputs,
)
from .trace import Graph, program

EXAMPLES = 4  # samples kept beside the graphs, for whoever runs them elsewhere
AXES: dict[str, dict[int, str]] = {  # the free ones; of other inputs the first is the batch
    "timesteps": {0: "steps"},
    "table": {0: "steps"},
    "input_scale": {0: "steps"},
    "noise": {0: "steps", 1: "batch"},
    "history": {2: "batch"},
    "index": {},
    "row": {},
}


class Networks(NamedTuple):
    """The parts of a pipeline, or a model alone, as modules to trace in one dtype."""

    unet: UNetGraph
    encoder: EncoderGraph | None = None
    decoder: DecoderGraph | None = None

    @classmethod
    def of(cls, source: Pipeline | nn.Module, dtype: torch.dtype) -> Networks:
        """Copies of the networks of a pipeline, or of a model."""
        if not isinstance(source, Pipeline):
            return cls(UNetGraph(source, dtype))
        return cls(UNetGraph(source.unet, dtype), EncoderGraph(source.vae, dtype), DecoderGraph(source.vae, dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, where there is a decoder."""
        image: Tensor = latents if self.decoder is None else self.decoder({"z": latents})["image"]
        return image


class Run(NamedTuple):
    """A run of the model in PyTorch, which graphs are traced with and must repeat.

    Its latents, images where there is a decoder (else latents), conditioning, noise, for int8 x before each step and
    after the last, and whether the graphs guide.
    """

    latents: Tensor
    images: Tensor
    cond: TensorDict
    noise: Tensor
    states: list[Tensor]
    guided: bool = False

    def state(self, table: SolverTable, N: int) -> Tensors:
        """x, the table and the noise that it asks for, at a batch of N."""
        x, solver = repeat(self.latents[:1], N), Solver.of(table)
        noise = {"noise": torch.randn(solver.steps, *x.shape)} if solver.stochastic else {}
        return {"x": x, **table_inputs(table), **noise}

    def guidance(self, N: int) -> Tensors:
        """Conditioning and its guidance scale at a batch of N, where the model has any."""
        prefixes = ("cond", "uncond") if self.guided else ("cond",)
        given = {input_name(p, k): repeat(v[:1], N) for k, v in self.cond.items() for p in prefixes}
        return given | ({"guidance_scale": torch.full((N,), GUIDANCE)} if given and self.guided else {})


def repeat(rows: Tensor, N: int) -> Tensor:
    """N rows, those given again and again."""
    return torch.cat([rows] * N)[:N]


def build_graphs(networks: Networks, table: SolverTable, run: Run, batch: int | None, target: str) -> dict[str, Graph]:
    """The graphs with what they are traced on; only `step`, and for TensorRT all of them, have a fixed batch."""
    solver = Solver.of(table)
    frozen = batch if target == "tensorrt" else None
    N = frozen or 2  # the exporter takes a free axis of 1 for a constant
    state, guidance = run.state(table, N), run.guidance(N)
    t = state["timesteps"][torch.linspace(0, solver.steps - 1, N).long()]
    first_row = networks.unet.row(state["timesteps"][:1])
    if solver.steps == 1:  # nor is a table of one row free
        state |= {k: torch.cat([v, v]) for k, v in state.items() if k != "x"}
    cond = {k: v for k, v in guidance.items() if k.startswith("cond")}
    graphs = {"unet": _free(networks.unet, {"x": repeat(run.latents, N), "t": t, **cond}, frozen)}
    if networks.encoder is not None and networks.decoder is not None:
        graphs["vae_encoder"] = _free(networks.encoder, {"image": repeat(run.images, N)}, frozen)
        graphs["vae_decoder"] = _free(networks.decoder, {"z": repeat(run.latents, N)}, frozen)
    step, index = StepGraph(networks.unet, solver), {"index": torch.zeros(1, dtype=torch.int64)}
    prepared = {input_name("prepared", k): v for k, v in step.prepare(guidance).items()}
    others = {k: v for k, v in guidance.items() if not is_condition(k)}
    inside = {**state, **others, **prepared, **index, **_history(solver, state["x"]), "row": first_row}
    del inside["timesteps"]
    traced = program("sampler", _free(step, inside, frozen)).module(check_guards=False)
    graphs["sampler"] = _free(SamplerGraph(step, traced, networks.decoder), state | guidance, frozen)
    state, guidance = run.state(table, batch or 1), run.guidance(batch or 1)
    graphs["step"] = Graph(step, {**state, **guidance, **_history(solver, state["x"]), **index}, {})
    return graphs


def _free(module: nn.Module, given: Tensors, frozen: int | None) -> Graph:
    """A graph with free axes; its batch is free where it is not frozen."""
    axes = {name: AXES.get(name, {0: "batch"}) for name in given}
    free = {k: {axis: word for axis, word in v.items() if word != "batch" or frozen is None} for k, v in axes.items()}
    return Graph(module, given, free)


def _history(solver: Solver, x: Tensor) -> Tensors:
    return {"history": x.new_zeros(solver.history, 2, *x.shape)} if solver.history else {}


def example_condition(model: UNet2D, cond: Cond) -> TensorDict:
    """`EXAMPLES` rows of what a model of ours can be asked for: those given, or values spread over what is allowed."""
    if cond is None and model.config.conditional:
        at = [(i + 1) / (EXAMPLES + 1) for i in range(EXAMPLES)]
        cond = {
            c.name: [i % len(c.values) if c.values else c.low + p * (c.high - c.low) for i, p in enumerate(at)]
            for c in model.config.covariates
        }
        if channels := model.config.concat_channels:
            seeds = torch.tensor([[1, i] for i in range(EXAMPLES)])
            cond[MAPS] = draw(seeds, (channels, *model.config.size), torch.device("cpu"))
    return model.read_condition(cond, EXAMPLES)  # type: ignore[arg-type]  # whatever was given is looked at there


def as_model(unet: UNetGraph) -> Any:
    """A traced network as a model that `FastSampler` calls."""

    def model(x: Tensor, t: Tensor, cond: Tensor | None = None, **others: Tensor) -> Tensor:
        given = {input_name("cond", k): v for k, v in (tensors_by_name(cond) | others).items()}
        out: Tensor = unet({"x": x, "t": t.expand(len(x)), **given})["prediction"]
        return out

    return model
