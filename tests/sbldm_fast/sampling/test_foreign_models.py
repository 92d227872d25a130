"""Models of diffusers and MONAI under the sampler: what they are called with, and in which precision."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor, nn

from sbldm_fast import FastSampler, Pipeline, SchedulerConfig
from sbldm_fast.sampling.model import _nested, tensors_by_name

from ..small import SHAPE, make, relative, scheduler, textbook_loop
from .peers import conditional_unet, diffusers_unet, monai_unet


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_drops_in_under_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test drops in under")
    model, sched = diffusers_unet(), getattr(diffusers, name)(beta_schedule="scaled_linear")
    got = FastSampler(model, sched, shape=SHAPE, steps=20, mode="eager")(2, seed=5)
    sched.set_timesteps(20)
    x = philox_normal((2, *SHAPE), 5) * sched.init_noise_sigma
    with torch.no_grad():
        for t in sched.timesteps:
            x = sched.step(model(sched.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert relative(got, x) < 1e-4


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "RFlowScheduler"])
def test_drops_in_under_monai(name: str) -> None:
    schedulers = pytest.importorskip(
        "monai.networks.schedulers", reason="MONAI is the peer that this test drops in under"
    )
    model, sched = monai_unet(), getattr(schedulers, name)()
    got = FastSampler(model, sched, shape=SHAPE, steps=20, mode="eager")(2, seed=5)
    sched.set_timesteps(20)
    x, times = philox_normal((2, *SHAPE), 5), [*sched.timesteps, torch.tensor(0)]
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            m = model(x, timesteps=torch.full((2,), float(t)))
            x = (sched.step(m, t, x, after) if name == "RFlowScheduler" else sched.step(m, t, x))[0]
    assert x.abs().max() > 0
    assert relative(got, x) < 1e-4


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_conditioning_and_guidance_in_two_passes(scale: float | None) -> None:
    model, sched = conditional_unet(), scheduler()
    cond, uncond = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    sampler = FastSampler(model, sched, shape=SHAPE, steps=6, mode="eager")
    second: dict[str, Any] = {} if scale is None else {"uncond": uncond, "guidance_scale": scale}
    got = sampler(3, seed=5, cond=cond, **second)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        m_c, m_u = (model(x, t, encoder_hidden_states=c).sample for c in (cond, uncond))
        return m_c if scale is None else m_u + scale * (m_c - m_u)

    assert relative(got, textbook_loop(guided, sched, 6, philox_normal((3, *SHAPE), 5))) < 1e-5
    named = {k: {"encoder_hidden_states": v} if k == "uncond" else v for k, v in second.items()}
    assert relative(sampler(3, seed=5, cond={"encoder_hidden_states": cond}, **named), got) < 1e-6
    in_parts = sampler(3, seed=5, cond=cond, **second, batch_size=2)
    assert relative(in_parts, got) < 1e-5
    if scale == 3.0:
        each = sampler(3, seed=5, cond=cond, uncond=uncond, guidance_scale=torch.tensor([1.0, 3.0, 5.0]))
        assert relative(each[1:2], got[1:2]) < 1e-5
        assert relative(each[:1], got[:1]) > 1e-2


def test_a_monai_context_and_a_third_argument() -> None:
    model = monai_unet(with_conditioning=True, cross_attention_dim=12)
    context = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    got = FastSampler(model, scheduler(), shape=SHAPE, steps=4, mode="eager")(2, cond=context)
    expected = textbook_loop(
        lambda x, t: model(x, t.expand(2), context=context), scheduler(), 4, philox_normal((2, *SHAPE), 0)
    )
    assert relative(got, expected) < 1e-5
    plain = FastSampler(lambda x, t, c: 0.1 * x + c, scheduler(), shape=(3,), steps=4)(2, cond=torch.ones(2, 3))
    assert relative(plain, textbook_loop(lambda x, t: 0.1 * x + 1, scheduler(), 4, philox_normal((2, 3), 0))) < 1e-5


def test_a_model_behind_a_function_or_a_module_gets_a_timestep_that_every_model_takes() -> None:
    """Conditioning by concatenation: MONAI's model wants timesteps of one dimension, whoever calls it."""
    inner, low = monai_unet(channels=5), torch.randn(2, 1, 8, 8)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: Tensor, low: Tensor) -> Tensor:
            out: Tensor = self.inner(torch.cat([x, low], 1), t)
            return out

    def function(x: Tensor, timesteps: Tensor) -> Tensor:
        out: Tensor = inner(torch.cat([x, low], 1), timesteps)
        return out

    expected = make(function)(2, seed=1)
    assert relative(make(lambda x, t: inner(torch.cat([x, low], 1), t))(2, seed=1), expected) < 1e-6
    assert relative(make(Wrapper())(2, seed=1, cond={"low": low}), expected) < 1e-6


def test_a_transformer_of_diffusers_takes_its_labels() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this model")
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ).eval()
    labels = torch.tensor([1, 7])
    sampler = make(dit)
    out = sampler(2, cond={"class_labels": labels})
    assert torch.equal(sampler(2, cond=labels), out), "whole numbers are labels"
    assert relative(sampler(2, cond={"class_labels": labels.flip(0)}), out) > 1e-4


def test_whole_numbers_are_the_labels_of_a_monai_model() -> None:
    model, labels = monai_unet(num_class_embeds=4), torch.tensor([1, 3])
    sampler = make(model)
    assert torch.equal(sampler(2, cond=labels), sampler(2, cond={"class_labels": labels}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conditioning_comes_in_the_models_precision(dtype: torch.dtype) -> None:
    cond = torch.randn(2, 5, 12)
    model = conditional_unet()
    half = make(model, dtype=dtype)(2, cond=cond, guidance_scale=2.0)
    assert relative(half, make(model)(2, cond=cond, guidance_scale=2.0)) < 0.1
    assert relative(make(model, dtype=dtype)(2, cond=cond.numpy(), guidance_scale=2.0), half) < 1e-6


def test_what_lies_inside_another_mapping_reaches_the_model_there() -> None:
    """SDXL's second conditioning, `added_cond_kwargs`, and its lists of residuals."""
    model = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=22
    )
    cond: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(3, 5, 12),
        "added_cond_kwargs": {"text_embeds": torch.randn(3, 6), "time_ids": torch.randn(3, 2)},
        "cross_attention_kwargs": None,
    }
    sampler = make(model)
    got = sampler(3, seed=1, cond=cond, guidance_scale=2.0, batch_size=2)

    def guided(x: Tensor, t: Tensor, at: slice) -> Tensor:
        def inside(v: Any, factor: float) -> Any:
            return (
                {k: inside(w, factor) for k, w in v.items()}
                if isinstance(v, dict)
                else None
                if v is None
                else factor * v[at]
            )

        m_u, m_c = (model(x, t, **inside(cond, factor)).sample for factor in (0.0, 1.0))
        return m_u + 2.0 * (m_c - m_u)

    for at in (slice(0, 2), slice(2, 3)):
        alone = make(lambda x, t, at=at: guided(x, t, at))(indices=range(3)[at], seed=1)
        assert relative(got[at], alone) < 1e-5
    many = [torch.full((2,), float(i)) for i in range(11)]
    taken = _nested(tensors_by_name({"a": {"b": many}, "c": np.ones(2)}))
    assert all(torch.equal(x, y) for x, y in zip(taken["a"]["b"], many, strict=True))
    assert isinstance(taken["a"]["b"], tuple)
    assert torch.equal(taken["c"], torch.ones(2, dtype=torch.float64))


def test_what_is_no_network_is_refused_with_what_would_be_one() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this pipeline")
    inferers = pytest.importorskip("monai.inferers", reason="MONAI brings this inferer")

    unet = conditional_unet()
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.DDPMScheduler(),
    )
    for model, message in (
        (pipe, r"model: got DDPMPipeline, allowed is the network that it runs, its \.unet, or a function"),
        (
            inferers.DiffusionInferer(diffusers.DDPMScheduler()),
            "model: got DiffusionInferer, allowed is the network that it runs, or a",
        ),
        ("unet", "model: got str, allowed is"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model)
    vae: Any = diffusers.AutoencoderKL()
    with pytest.raises(
        ValueError, match="vae: got diffusers's AutoencoderKL, allowed is sbldm_fast's AutoencoderKL; FastSampler"
    ):
        Pipeline(vae, unet, SchedulerConfig())  # type: ignore[arg-type]  # that is the point
