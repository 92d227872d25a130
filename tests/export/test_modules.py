"""The modules that are traced, in PyTorch: a step is the step of `FastSampler`, and float32 stays where it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import monai.networks.schedulers as monai
import pytest
import torch
from sbldm_fast.export.modules import (
    DecoderGraph,
    EncoderGraph,
    Float32Islands,
    Solver,
    StepGraph,
    UNetGraph,
    cast_weights,
    count_norms,
    find_not_finite,
    table_inputs,
)
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, DDPMScheduler, FastSampler, Pipeline, SolverTable, VAEConfig
from sbldm_fast.sampling.noise import draw

SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim clipped": lambda: DDIMScheduler(clip_sample=True),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "v": lambda: DDIMScheduler(clip_sample=True, prediction_type="v_prediction"),
    "monai ddim": lambda: monai.DDIMScheduler(num_train_timesteps=1000, clip_sample=False),
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_loop_of_steps_is_the_samplers_loop(name: str, tiny: Any) -> None:
    table = SolverTable.from_scheduler(SCHEDULERS[name](), 7)
    model, solver = tiny().eval(), Solver.of(table)
    expected = FastSampler(model, table, shape=(3, 6, 6), mode="eager")(2, seed=5)
    seeds = torch.tensor([[5, 0], [5, 1]])
    given = {
        "x": draw(seeds, (3, 6, 6), torch.device("cpu")) * table.init_noise_sigma,
        "index": torch.zeros(1, dtype=torch.int64),
    }
    given |= table_inputs(table)
    if solver.stochastic:
        given["noise"] = torch.stack([draw(seeds, (3, 6, 6), torch.device("cpu"), i + 1) for i in range(solver.steps)])
    if solver.history:
        # not read before it is written: its coefficients are 0
        given["history"] = torch.full((solver.history, 2, 2, 3, 6, 6), 7.0)
        assert not table.rows[0, 6:].any()
    step = StepGraph(UNetGraph(model, torch.float32), solver)
    with torch.no_grad():
        for _ in range(solver.steps):
            given |= {k.removesuffix("_next"): v for k, v in step(given).items()}
    assert given["index"].item() == solver.steps
    torch.testing.assert_close(given["x"], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_structure_is_read_off_the_table() -> None:
    assert Solver.of(SolverTable.from_scheduler(SCHEDULERS["ddim"](), 5)) == Solver(5, 0, False, False, False, None)
    assert Solver.of(SolverTable.from_scheduler(SCHEDULERS["ddim clipped"](), 5)) == Solver(
        5, 0, False, False, True, 1.0
    )
    assert Solver.of(SolverTable.from_scheduler(SCHEDULERS["ddpm"](), 5)).stochastic
    assert Solver.of(SolverTable.from_scheduler(SCHEDULERS["euler"](), 5)).scaled
    assert Solver.of(SolverTable.from_scheduler(SCHEDULERS["dpm"](), 5)).history == 1


def test_norms_and_softmax_are_wide_and_the_rest_is_not() -> None:
    seen: list[tuple[str, torch.dtype]] = []
    model = cast_weights(nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)), torch.float16)
    assert [p.dtype for p in model.parameters()] == [torch.float16] * 2 + [torch.float32] * 2 + [torch.float16] * 2

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(args[0], torch.Tensor):
                seen.append((str(function), args[0].dtype))
            return out

    q = torch.randn(1, 1, 4, 8, dtype=torch.float16)
    with Float32Islands(), Spy(), torch.no_grad():
        assert model(torch.randn(1, 2, 3, 3).half()).dtype == torch.float16
        assert nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.float16
        assert q.softmax(-1).dtype == torch.float16
        assert nn.functional.softmax(input=q, dim=-1).dtype == torch.float16
    kinds = {name.split(".")[1]: dtype for name, dtype in seen}
    assert kinds["native_group_norm"] == kinds["_softmax"] == torch.float32
    assert kinds["convolution"] == torch.float16
    assert kinds["bmm"] == torch.float16


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_with_a_mask(boolean: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(5, 5) > 0.4
    mask[:, 0] = True
    given = mask if boolean else torch.randn(5, 5)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.3)
    with Float32Islands():
        torch.testing.assert_close(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.3), expected
        )


def test_attention_however_it_is_called() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    plain = nn.functional.scaled_dot_product_attention
    calls: list[Callable[[], Tensor]] = [
        lambda: plain(q, q, q, None, 0.0, True),
        lambda: plain(query=q, key=q, value=q, is_causal=True, scale=0.2),
        lambda: plain(q, k, k, enable_gqa=True),
    ]
    for call in calls:
        expected = call()
        with Float32Islands():
            torch.testing.assert_close(call(), expected)


def test_autoencoder_graphs_are_the_pipelines(pipeline: Pipeline) -> None:
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(x)
        out = EncoderGraph(pipeline.vae, torch.float32)({"image": x})
        torch.testing.assert_close(out["mean"], posterior.mean * 2)
        # sampling from the scaled posterior is scaling a sample of the posterior
        torch.testing.assert_close((out["logvar"] / 2).exp(), (posterior.logvar / 2).exp() * 2)
        torch.testing.assert_close(
            DecoderGraph(pipeline.vae, torch.float32)({"z": out["mean"]})["image"], pipeline.decode(out["mean"])
        )


def test_the_last_stage_of_the_decoder_is_float32(pipeline: Pipeline) -> None:
    graph = DecoderGraph(pipeline.vae, torch.float16)
    assert isinstance(graph.first[-1], nn.ConvTranspose2d)
    assert {p.dtype for p in graph.last.parameters()} == {torch.float32}
    assert {m.weight.dtype for m in graph.first.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)} == {
        torch.float16
    }


def test_norms_are_counted_as_often_as_they_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = nn.GroupNorm(1, 2), nn.Sequential(nn.GroupNorm(2, 2), nn.LayerNorm(3))

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.other(self.norm(self.norm(given["x"])))
            return out

    assert count_norms(Twice(), {"x": torch.ones(1, 2, 3)}) == 3


def test_the_first_module_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 2))
    assert find_not_finite(model, lambda: model(torch.ones(1, 2))) == ""
    nn.init.constant_(model[1].weight, float("inf"))
    assert find_not_finite(model, lambda: model(torch.ones(1, 2))) == "1"


def test_a_norm_that_also_gives_the_sum_is_named_too() -> None:
    vae = AutoencoderKL(
        VAEConfig(sample_size=16, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)
    ).eval()
    vae.decoder[2].norm1.bias.data[0] = float("nan")
    with torch.no_grad():
        assert find_not_finite(vae, lambda: vae.decode(torch.ones(1, 4, 8, 8))) == "decoder.2.norm1"
