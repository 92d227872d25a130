"""Networks of volumes of MONAI and diffusers under the sampler: in every mode, and equal to their own loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor, nn

from sbldm_fast import FastSampler
from sbldm_fast.sampling import loop

from ..small import make, relative, scheduler, textbook_loop
from .peers import monai_unet

SHAPE = (4, 4, 6, 4)


class Volumes(nn.Module):
    """Convolutions of both kinds about one norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volume, self.norm, self.image = nn.Conv3d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(1, 1, 1)
        self.out = nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = nn.functional.silu(self.norm(self.volume(x)))
        return self.out(h) + self.image(x[:, :1, 0])[:, :, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.bfloat16},
        {"fuse": True},
        {"mode": "loop-graph"},
        {"mode": "step-graph", "stop": "x0_delta", "threshold": 1e-9},
    ],
    ids=str,
)
def test_a_network_of_monai_runs_in_every_mode(arguments: dict[str, Any], recorded: Callable[..., FastSampler]) -> None:
    """In half precision its `upcast_attention`, too, which the library itself takes to be under autocast, and its means
    of volumes, which PyTorch has not in half precision on a CPU."""
    model = monai_unet(dims=3, upcast_attention=True, resblock_updown=True)
    sampler = recorded(model, shape=SHAPE, **({"mode": "eager"} | arguments))
    error = relative(sampler(2), make(model, shape=SHAPE)(2))
    assert error < (0.1 if "dtype" in arguments else 1e-4)
    stats = sampler.stats()
    # two norms of each block, and the one before the last convolution
    blocks = sum(name.split(".")[-1] in ("norm1", "norm2") for name, _ in model.named_modules())
    assert stats.get("fused", 0) == (blocks + 1 if "fuse" in arguments else 0)
    assert stats.get("captures", 0) == ("graph" in str(sampler.mode))


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": torch.float16}, {"mode": "compile"}, {"mode": "step-graph", "dtype": torch.bfloat16}],
    ids=str,
)
def test_fused_norms_of_volumes_run_in_every_mode(
    arguments: dict[str, Any], recorded: Callable[..., FastSampler], packages: None
) -> None:
    compiled, model = arguments.get("mode") == "compile", Volumes().eval()
    sampler = recorded(model, shape=SHAPE, fuse=True, **({"mode": "eager"} | arguments))
    with backend("torch" if compiled else "triton"):
        error = relative(sampler(2), make(model, shape=SHAPE)(2))
    assert error < (0.1 if "dtype" in arguments else 1e-4)
    assert sampler.stats()["fused"] == 1
    assert sampler.stats().get("compiled", 0) == compiled, sampler.reason


def test_half_precision_lies_with_its_channels_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = loop.solver_step

    def solver_step(x: Tensor, m: Tensor, *rest: Any, **others: Any) -> Tensor:
        seen.append(m)
        return step(x, m, *rest, **others)

    monkeypatch.setattr(loop, "solver_step", solver_step)
    sampler = make(model := Volumes().eval(), shape=SHAPE, dtype=torch.bfloat16)
    sampler.source.network.model.volume.register_forward_hook(lambda _, given, out: seen.extend((*given, out)))
    sampler(2)
    used = sampler.source.network.model
    for t in (*seen, used.volume.weight):
        assert t.is_contiguous(memory_format=torch.channels_last_3d)
    assert used.image.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.volume.weight.is_contiguous(), "the caller's stays as it is"
    assert seen[-1].stride(1) == 1


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "RFlowScheduler"])
@pytest.mark.parametrize("cfg", [None, 3.0])
def test_a_volume_is_that_of_monais_inferer(name: str, cfg: float | None) -> None:
    schedulers, inferers = pytest.importorskip("monai.networks.schedulers"), pytest.importorskip("monai.inferers")
    model, sched = monai_unet(dims=3, with_conditioning=True, cross_attention_dim=5), getattr(schedulers, name)()
    noise, context = philox_normal((2, *SHAPE), 5), torch.randn(2, 3, 5)
    guided: dict[str, Any] = {"uncond": torch.full_like(context, -1.0), "guidance_scale": cfg} if cfg else {}
    got = FastSampler(model, sched, shape=SHAPE, steps=6, mode="eager")(2, seed=5, cond=context, **guided)
    sched.set_timesteps(6)
    inferer = inferers.DiffusionInferer(sched)
    wanted = inferer.sample(noise, model, sched, conditioning=context, cfg=cfg, verbose=False)
    assert relative(got, wanted) < 1e-4


def test_a_volume_is_decoded_as_monais_latent_inferer_decodes() -> None:
    nets, inferers = pytest.importorskip("monai.networks.nets"), pytest.importorskip("monai.inferers")
    schedulers = pytest.importorskip("monai.networks.schedulers", reason="MONAI brings this scheduler")
    torch.manual_seed(0)
    sizes = {"channels": (4, 8), "num_res_blocks": 1, "attention_levels": (False, False), "norm_num_groups": 2}
    vae = nets.AutoencoderKL(spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, **sizes).eval()
    model, sched = monai_unet(dims=3), schedulers.DDIMScheduler(clip_sample=False)

    def decode(z: Tensor) -> Tensor:
        out: Tensor = vae.decode_stage_2_outputs(z / 0.5)
        return out

    got = FastSampler(model, sched, shape=SHAPE, steps=4, mode="eager", decode=decode)(2, seed=3)
    sched.set_timesteps(4)
    inferer = inferers.LatentDiffusionInferer(sched, scale_factor=0.5)
    wanted = inferer.sample(philox_normal((2, *SHAPE), 3), vae, model, sched, verbose=False)
    assert got.shape == (2, 1, 8, 12, 8)
    assert relative(got, wanted) < 1e-4


@pytest.mark.parametrize("fuse", [False, True])
def test_a_video_network_of_diffusers_drops_in(fuse: bool) -> None:
    """Its frames are the third axis; its norms are of images, and of volumes where it convolves along time."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this model")
    torch.manual_seed(0)
    model = diffusers.UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
    ).eval()
    for p in model.parameters():  # its convolutions along time end in zeros
        nn.init.normal_(p, std=0.1)
    words, shape = torch.randn(2, 3, 6), (4, 3, 4, 4)
    sampler = make(model, shape=shape, fuse=fuse)
    got = sampler(2, seed=5, cond=words)
    wanted = textbook_loop(
        lambda x, t: model(x, t, encoder_hidden_states=words).sample, scheduler(), 3, philox_normal((2, *shape), 5)
    )
    assert relative(got, wanted) < 1e-4
    kinds = [type(m).__name__ for m in model.modules()]
    norms = (
        2 * kinds.count("ResnetBlock2D") + 4 * kinds.count("TemporalConvLayer") + 1
    )  # of images, of volumes, the last
    assert sampler.stats().get("fused", 0) == fuse * norms


class Bundle(nn.Module):
    """MONAI's network as its published brain bundle calls it: planes beside x, and one token of the same numbers."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        planes = context.mT.reshape(*context.shape[:3:2], *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        out: Tensor = self.unet(torch.cat([x, planes], 1), timesteps, context=context)
        return out


def test_the_published_brain_bundle_of_monai_runs_as_its_script_does() -> None:
    """The options of `brain_image_synthesis_latent_diffusion_model`, its widths apart: 7 = 3 + 4 channels in, a token
    of 4; its sampler concatenates at each step."""
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI brings this model")
    schedulers = pytest.importorskip("monai.networks.schedulers", reason="MONAI brings this scheduler")
    torch.manual_seed(0)
    unet = nets.DiffusionModelUNet(
        spatial_dims=3,
        in_channels=7,
        out_channels=3,
        channels=(8, 16, 16),
        attention_levels=(False, True, True),
        num_res_blocks=1,
        num_head_channels=(0, 16, 16),
        norm_num_groups=8,
        resblock_updown=True,
        with_conditioning=True,
        cross_attention_dim=4,
        transformer_num_layers=1,
        upcast_attention=True,
    ).eval()
    for p in unet.parameters():  # a fresh one ends in zeros
        nn.init.normal_(p, std=0.05)
    sched = schedulers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0205, schedule="scaled_linear_beta", clip_sample=False
    )
    values = torch.tensor([[0.0, 0.1, 0.2, 0.4], [1.0, 0.9, 0.6, 0.5]])
    got = FastSampler(Bundle(unet), sched, shape=(3, 4, 8, 4), steps=4)(2, seed=5, cond={"context": values[:, None]})
    sched.set_timesteps(4)
    x = philox_normal((2, 3, 4, 8, 4), 5)
    with torch.no_grad():
        for t in sched.timesteps:
            planes = values[:, :, None, None, None].expand(2, 4, 4, 8, 4)
            m = unet(torch.cat([x, planes], 1), timesteps=torch.full((2,), float(t)), context=values[:, None])
            x = sched.step(m, t, x)[0]
    assert relative(got, x) < 1e-4
    other = FastSampler(Bundle(unet), sched, shape=(3, 4, 8, 4), steps=4)(
        2, seed=5, cond={"context": values.flip(0)[:, None]}
    )
    assert relative(other, x) > 1e-3
