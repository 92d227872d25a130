"""Models of others under the sampler: what they are called with, in which precision, and what they may not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler, FastSampler
from sbldm_fast.sampling.model import _nested, evaluating, tensors_by_name

SHAPE = (4, 8, 8)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="cosine_ramp", clip_sample=False)


def make(model: Any, **arguments: Any) -> FastSampler:
    return FastSampler(model, scheduler(), **({"shape": SHAPE, "steps": 3, "mode": "eager"} | arguments))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def monai_unet(dims: int = 2, channels: int = 4, **config: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI brings this model")
    torch.manual_seed(3)
    model: nn.Module = nets.DiffusionModelUNet(
        spatial_dims=dims,
        in_channels=channels,
        out_channels=4,
        channels=(16, 32),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=8,
        **config,
    ).eval()
    for p in model.parameters():  # a fresh one ends in zeros
        nn.init.normal_(p, std=0.1)
    return model


def conditional_unet(**config: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this model")
    torch.manual_seed(3)
    model: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **config,
    ).eval()
    return model


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


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"fuse": True}, {"mode": "compile"}], ids=str)
def test_volumes_run_in_every_mode(arguments: dict[str, Any]) -> None:
    """Weights of five dimensions have no channels_last, and the kernel of norms is one of images."""
    model: nn.Module
    if arguments.get("mode") == "compile":  # a whole 3-D UNet compiles for half a minute

        class Volumes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.volume, self.norm, self.image = (
                    nn.Conv3d(4, 8, 3, padding=1),
                    nn.GroupNorm(4, 8),
                    nn.Conv2d(1, 1, 1),
                )
                self.out = nn.Conv3d(8, 4, 1)

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                out: Tensor = (
                    self.out(nn.functional.silu(self.norm(self.volume(x)))) + self.image(x[:, :1, 0])[:, :, None]
                )
                return out

        torch.manual_seed(0)
        model = Volumes().eval()
    else:
        model = monai_unet(dims=3)
    shape = (4, 4, 8, 8)
    plain, sampler = make(model, shape=shape), make(model, shape=shape, **arguments)
    error = relative(sampler(2), plain(2))
    assert error < (0.1 if "dtype" in arguments else 1e-4)
    assert sampler.stats().get("fused", 0) == 0
    if "mode" in arguments:
        assert sampler.stats()["compiled"] == 1, sampler.reason


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


def test_a_model_that_writes_into_its_input_is_refused() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(0.1)

    for arguments in ({}, {"fuse": True}, {"mode": "compile"}, {"mode": "compile", "dtype": torch.bfloat16}):
        with pytest.raises(
            ValueError, match="model: it writes into its input x, allowed is one that leaves x as it is"
        ):
            make(model, **arguments)(1)
    with torch.inference_mode():
        assert make(lambda x, t: 0.1 * x)(1).shape == (1, *SHAPE)


def test_what_is_no_network_is_refused_with_what_would_be_one() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this pipeline")
    inferers = pytest.importorskip("monai.inferers", reason="MONAI brings this inferer")
    from sbldm_fast import Pipeline, SchedulerConfig

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


def test_a_module_evaluates_inside_and_trains_on_outside() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):  # noqa: PT012  # of one block
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]
    with evaluating(lambda x: x):
        pass


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"res": [torch.ones(2), None]}, r"cond\['res'\]: got None in a list"),
        ({"x/y": torch.ones(2)}, "got the name 'x/y'"),
        ({5: torch.ones(2)}, "got the name 5"),
        ({"a": {"": torch.ones(2)}}, "got the name ''"),
        ({"#0": torch.ones(2)}, "got the name '#0'"),
    ],
    ids=str,
)
def test_names_that_would_be_taken_for_others_are_refused(cond: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(lambda x, t, **given: x)(2, cond=cond)


def test_a_mapping_of_numbers_stays_a_mapping() -> None:
    taken = _nested(tensors_by_name({"a": {"0": torch.ones(2)}, "b": [torch.ones(2)]}))
    assert (type(taken["a"]), type(taken["b"])) == (dict, tuple)


def test_two_who_evaluate_a_module_give_it_back_when_both_have_left() -> None:
    model = nn.Dropout()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not model.training
    assert model.training


def test_a_decoder_with_an_output_of_its_own_does_not_overwrite_what_it_gave() -> None:
    held = torch.zeros(2, *SHAPE)
    sampler = make(lambda x, t: 0.1 * x, decode=lambda z: held.copy_(z))
    assert torch.equal(sampler(4, batch_size=2), make(lambda x, t: 0.1 * x)(4, batch_size=2))


def test_inference_mode_and_autocast_of_a_caller_stay_the_callers() -> None:
    from sbldm_fast import UNet2D, UNetConfig

    model = UNet2D(
        UNetConfig(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_resolutions=(4,),
            norm_num_groups=8,
            time_embed_dim=32,
        )
    ).eval()
    nn.init.normal_(model.row_offsets, std=0.1)
    expected = make(model)(2)
    sampler = make(model)
    with torch.inference_mode():
        assert torch.equal(sampler(2), expected)
        inside = make(model)
        inside(2)
    assert torch.equal(sampler(2), expected)
    assert torch.equal(inside(2), expected)
    with torch.autocast("cpu", torch.bfloat16):
        cast = make(model)
    assert torch.equal(cast(2), expected)


def test_hooks_and_layers_of_the_callers_in_our_model_run() -> None:
    from sbldm_fast import UNet2D, UNetConfig

    config = UNetConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_resolutions=(4,),
        norm_num_groups=8,
        time_embed_dim=32,
    )

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Conv2d) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 3 * self.inner(x)
            return out

    class Doubled(UNet2D):
        def forward(self, x: Tensor, t: Tensor | int, cond: None = None) -> Tensor:
            return 2 * super().forward(x, t)

    def zero(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return 0 * out

    torch.manual_seed(0)
    for change in (
        lambda model: model.register_forward_hook(zero),
        lambda model: model.upsample[0].register_forward_hook(zero),
        lambda model: model.upsample[0].conv.register_forward_hook(zero),
        lambda model: setattr(model.upsample[0], "conv", Wrapped(model.upsample[0].conv)),
        lambda model: setattr(model, "__class__", Doubled),
    ):
        model = UNet2D(config).eval()
        change(model)
        got, expected = make(model)(2), make(lambda x, t, model=model: model(x, t.expand(2)))(2)
        assert relative(got, expected) < 1e-5
