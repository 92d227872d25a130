"""FastSampler against the textbook loop, in every mode; the pipeline; the pictures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, DDPMScheduler, FastSampler, Pipeline, SchedulerConfig, UNet2D, UNetConfig, VAEConfig
from sbldm_fast.sampling.images import NOTICE, save_grid, save_png, to_uint8

SHAPE = (4, 8, 8)
UNET = UNetConfig(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
                  attention_resolutions=(4,), norm_num_groups=8, time_embed_dim=32)  # fmt: skip
VAE = VAEConfig(sample_size=16, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)
module = importlib.import_module("sbldm_fast.sampling.sampler")


@pytest.fixture(scope="module")
def unet() -> UNet2D:
    torch.manual_seed(1)
    model = UNet2D(UNET).eval()
    torch.nn.init.normal_(model.row_offsets, std=0.1)
    return model


def scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(**({"beta_schedule": "cosine_ramp", "clip_sample": False} | config))


def stepped(model: Any, sched: Any, steps: int, x: Tensor, seed: int = 0, **arguments: Any) -> Tensor:
    """The loop of a textbook, noise from the stream that FastSampler documents."""
    sched.set_timesteps(steps)
    with torch.no_grad():
        for i, t in enumerate(sched.timesteps):
            z = philox_normal(x.shape, seed, stream=i + 1)
            extra = {"variance_noise": z} if arguments.get("eta") else {}
            x = sched.step(model(x, t), t, x, **arguments, **extra).prev_sample
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_equals_the_textbook_loop_over_fifty_steps(unet: UNet2D, spacing: str, prediction: str, eta: float) -> None:
    sched = scheduler(timestep_spacing=spacing, prediction_type=prediction)
    got = FastSampler(unet, sched, shape=SHAPE, steps=50, mode="eager", eta=eta)(2, seed=3)
    expected = stepped(unet, sched, 50, philox_normal((2, *SHAPE), 3), seed=3, eta=eta)
    assert relative(got, expected) < 1e-5


def test_ddpm_is_its_own_loop(unet: UNet2D, monkeypatch: pytest.MonkeyPatch) -> None:
    sched = DDPMScheduler(clip_sample=False)
    got = FastSampler(unet, sched, shape=SHAPE, steps=20, mode="eager")(2, seed=3)
    noises = iter([philox_normal((2, *SHAPE), 3, stream=i + 1) for i in range(20)])
    monkeypatch.setattr(importlib.import_module("sbldm_fast.diffusion.schedulers"), "_noise_like", lambda *_: next(noises))
    expected = stepped(unet, sched, 20, philox_normal((2, *SHAPE), 3))
    assert relative(got, expected) < 1e-5


def test_clipping_is_the_schedulers() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    sched = scheduler(clip_sample=True, clip_sample_range=0.5)
    got = FastSampler(model, sched, shape=SHAPE, steps=10, mode="eager")(2)
    assert relative(got, stepped(model, sched, 10, philox_normal((2, *SHAPE), 0))) < 1e-5
    assert (got.abs() > 0.49).any()
    assert got.abs().max() <= 0.5 + 1e-6


def test_compile_equals_eager(unet: UNet2D) -> None:
    eager, compiled = (FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode=mode) for mode in ("eager", "compile"))
    assert relative(compiled(2, seed=1), eager(2, seed=1)) < 1e-5
    assert relative(compiled(3, seed=1), eager(3, seed=1)) < 1e-5


def test_compile_meets_many_batch_sizes() -> None:
    """Dynamo gives up after eight versions of a function unless told otherwise."""
    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3, 2, 2), steps=1, mode="compile")
    for n in range(1, 12):
        assert sampler(n).shape == (n, 3, 2, 2)


@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_graph_modes_walk_the_same_table(unet: UNet2D, mode: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the recording is replaced by running the work again, which is what a replay does to the same buffers."""

    def record(work: Any, reset: Any, device: Any, pool: Any) -> Any:
        work()  # a warm-up, as the real one does
        reset()
        return work

    monkeypatch.setattr(module, "capture", record)
    plain = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=eta, decode=torch.tanh)
    graphed = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=eta, decode=torch.tanh)
    graphed.mode = mode  # the constructor rightly refuses it on a CPU
    first = graphed(2, seed=1)
    kept = first.clone()
    torch.testing.assert_close(first, plain(2, seed=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graphed(2, seed=2), plain(2, seed=2), rtol=1e-5, atol=1e-6)
    assert torch.equal(first, kept), "an output was overwritten by the next replay"
    for n in (1, 3, 4, 5, 2):
        graphed(n)
    stats = graphed.stats()
    assert (stats["captures"], stats["replays"], stats["evictions"]) == (6, 7, 2)
    assert len(graphed._graphs) == module.MAX_GRAPHS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["compile", "step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cuda_modes_equal_eager(unet: UNet2D, mode: str, eta: float) -> None:
    model = UNet2D(UNET).eval()
    model.load_state_dict(unet.state_dict())
    model.cuda()
    eager, fast = (FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode=m, eta=eta, decode=torch.tanh) for m in ("eager", mode))
    for seed in (0, 1, 0):
        with backend("torch"):  # else a wrong kernel would agree with itself
            expected = eager(3, seed=seed)
        assert relative(fast(3, seed=seed), expected) < 1e-4


def test_a_sample_depends_on_its_seed_and_number_alone(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", eta=0.3)
    whole = sampler(7, seed=9)
    for first, n in ((0, 1), (0, 4), (3, 4), (6, 1)):
        assert relative(sampler(n, seed=9, first_index=first), whole[first : first + n]) < 1e-5
    assert torch.equal(sampler(7, seed=9), whole)
    listed = sampler(3, seed=[9, 10, 9])
    assert relative(listed[:1], whole[:1]) < 1e-5
    assert relative(listed[2:], listed[:1]) < 1e-5
    assert relative(listed[1:2], listed[:1]) > 1e-2


def test_noise_in_place_of_a_count(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=3)
    assert torch.equal(sampler(noise=philox_normal((2, *SHAPE), 4)), sampler(2, seed=4))


def test_half_precision_works_on_a_copy(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=10, mode="eager", dtype=torch.bfloat16)
    half, full = sampler(2), FastSampler(unet, scheduler(), shape=SHAPE, steps=10, mode="eager")(2)
    assert half.dtype == torch.float32
    assert next(unet.parameters()).dtype == torch.float32
    assert 0 < relative(half, full) < 0.1


def test_auto_says_what_it_took_and_why(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE)
    expected = "loop-graph" if sampler.device.type == "cuda" else "eager"
    assert sampler.mode == expected
    assert "cpu has no CUDA graphs" in sampler.reason


def test_drops_in_under_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test drops in under")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    sched = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    got = FastSampler(model, sched, shape=SHAPE, steps=20, mode="eager")(2, seed=5)
    expected = stepped(lambda x, t: model(x, t).sample, sched, 20, philox_normal((2, *SHAPE), 5))
    assert relative(got, expected) < 1e-5


def test_a_plain_callable(unet: UNet2D) -> None:
    got = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3,), steps=4)(2)
    assert relative(got, stepped(lambda x, t: 0.1 * x, scheduler(), 4, philox_normal((2, 3), 0))) < 1e-5


def test_a_module_without_parameters() -> None:
    class Tenth(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    assert FastSampler(Tenth(), scheduler(), shape=(3,), steps=2)(noise=torch.ones(2, 3)).shape == (2, 3)


def test_bad_input_is_named(unet: UNet2D) -> None:
    def make(**arguments: Any) -> FastSampler:
        return FastSampler(unet, scheduler(), **({"shape": SHAPE, "steps": 2} | arguments))

    for call, message in (
        (lambda: make(mode="fast"), "mode: got 'fast', allowed are eager, compile, step-graph, loop-graph, auto"),
        (lambda: make(mode="loop-graph"), "mode: got 'loop-graph', which needs CUDA"),
        (lambda: make(mode="step-graph"), "mode: got 'step-graph', which needs CUDA"),
        (lambda: make(steps=0), "num_inference_steps: got 0"),
        (lambda: make(eta=-1.0), "eta: got -1.0"),
        (lambda: make()(), "n, noise: give one of the two"),
        (lambda: make()(2, noise=torch.zeros(2, *SHAPE)), "n, noise: give one of the two"),
        (lambda: make()(noise=torch.zeros(2, 3, 8, 8)), r"noise: got shape \(2, 3, 8, 8\), allowed is \[n, 4, 8, 8\]"),
        (lambda: make()(2, seed=[1]), "seed: got 1 seeds for 2 samples"),
        (lambda: make()(2, seed=-1), "seed: got -1"),
        (lambda: make()(-2), "n: got -2, allowed is 1 or more"),
        (lambda: make()(0), "n: got 0, allowed is 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(2)
    return Pipeline(AutoencoderKL(VAE), UNet2D(UNET), SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False))


def test_pipeline_survives_its_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "p")
    assert sorted(str(p.relative_to(tmp_path / "p")) for p in (tmp_path / "p").rglob("*") if p.is_file()) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    again = Pipeline.from_pretrained(tmp_path / "p")
    images = pipeline.sample(3, seed=1, steps=3)
    assert images.shape == (3, 1, 16, 16)
    assert images.abs().max() <= 1
    assert torch.equal(again.sample(3, seed=1, steps=3), images)
    assert relative(again.sample(3, seed=1, steps=3, batch_size=2), images) < 1e-5


def test_scheduler_file_is_diffusers(pipeline: Pipeline, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers reads the file that this test writes")
    pipeline.scheduler = scheduler(beta_schedule="scaled_linear")
    pipeline.save(tmp_path / "p")
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "p" / "scheduler")
    assert torch.equal(theirs.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_bundled_weights_make_images() -> None:
    images = Pipeline.from_pretrained("demo").sample(2, seed=0, steps=10)
    assert images.shape == (2, 1, 128, 128)
    corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < -0.8, "air around the head is dark"
    assert images[:, 0, 48:80, 48:80].mean() > -0.7, "there is a head in the middle"


def test_bad_pipelines_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    for call, message in (
        (lambda: Pipeline.from_pretrained(tmp_path / "nothing"), "is not a pipeline folder: it has no model_index.json"),
        (lambda: Pipeline.from_pretrained(tmp_path / "model.pt"), "no pickle is ever read"),
        (lambda: pipeline.sample(0), "n, batch_size: got 0, 16"),
        (lambda: pipeline.sample(1, batch_size=0), "n, batch_size: got 1, 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pictures_say_what_they_are(tmp_path: Path) -> None:
    images = torch.stack([torch.full((1, 8, 8), v) for v in (-2.0, -1.0, 0.0, 1.0, 3.0)])
    assert to_uint8(images)[:, 0, 0].tolist() == [0, 0, 128, 255, 255]
    save_png(to_uint8(images)[3], tmp_path / "one.png")
    save_grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.info["Description"] == NOTICE
        assert np.asarray(one).min() == 255
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.info["Description"] == NOTICE
        assert grid.size == (24, 16 + 14)
