"""FastSampler against the textbook loop, in every mode; the pipeline; the pictures."""

from __future__ import annotations

import copy
import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor, nn

from sbldm_fast import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FastSampler,
    Pipeline,
    SchedulerConfig,
    UNet2D,
    UNetConfig,
    VAEConfig,
)
from sbldm_fast.images import NOTICE, save_grid, save_png, to_uint8
from sbldm_fast.models.layers import ResBlock, Upsample
from sbldm_fast.sampling.model import _transposed, merged_biases, phase_upsampling

SHAPE = (4, 8, 8)
UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_resolutions=(4,),
    norm_num_groups=8,
    time_embed_dim=32,
)
VAE = VAEConfig(sample_size=16, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)
module = importlib.import_module("sbldm_fast.sampling.sampler")
modes = importlib.import_module("sbldm_fast.sampling.modes")
loop = importlib.import_module("sbldm_fast.sampling.loop")
precision = importlib.import_module("sbldm_fast.sampling.precision")


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
    monkeypatch.setattr(
        importlib.import_module("sbldm_fast.diffusion.schedulers"), "_noise_like", lambda *_: next(noises)
    )
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
    """History, noise and stopping at once: every buffer that a compiled step changes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a solver with history and noise")
    sched = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    arguments: dict[str, Any] = {"shape": SHAPE, "steps": 6, "stop": "convergence", "threshold": 0.1, "check_every": 1}
    eager, compiled = (FastSampler(unet, sched, mode=mode, **arguments) for mode in ("eager", "compile"))
    for seed in (1, 2):
        assert relative(compiled(3, seed=seed), eager(3, seed=seed)) < 1e-5
    assert compiled.stats()["compiled"] == 1, compiled.reason
    assert compiled.stats().get("stopped", 0) == eager.stats().get("stopped", 0) > 0


def test_compile_with_guidance_and_scaled_input() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a scheduler that scales the model's input")

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return 0.1 * x * c.mean() + c + t / 1000

    sched, cond = diffusers.EulerDiscreteScheduler(), torch.randn(2, 3, 2, 2)
    eager, compiled = (FastSampler(model, sched, shape=(3, 2, 2), steps=4, mode=mode) for mode in ("eager", "compile"))
    for c in (cond, 2 * cond):
        assert relative(compiled(2, cond=c, guidance_scale=3.0), eager(2, cond=c, guidance_scale=3.0)) < 1e-4
    assert compiled.stats()["compiled"] == 1, compiled.reason


def test_what_cannot_be_compiled_ahead_goes_through_torch_compile() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x if float(x.mean()) < 1e9 else x  # a look at the data, which torch.export refuses

    sampler = FastSampler(model, scheduler(), shape=(3, 2, 2), steps=3, mode="compile")
    assert relative(sampler(2), FastSampler(model, scheduler(), shape=(3, 2, 2), steps=3, mode="eager")(2)) < 1e-5
    assert "torch.compile, for it cannot be compiled ahead of time" in sampler.reason


def test_compile_is_kept_for_the_next_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(tmp_path / "cache"))

    class Small(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.conv(x).tanh() + t / 1000

    def make(seed: int = 0) -> FastSampler:
        return FastSampler(Small(seed), scheduler(), shape=(3, 4, 4), steps=4, mode="compile")

    eager = FastSampler(Small(0), scheduler(), shape=(3, 4, 4), steps=4, mode="eager")(2)
    first, second = make(), make()
    assert relative(first(2), eager) < 1e-5
    assert torch.equal(second(2), first(2))
    assert (first.stats()["compiled"], second.stats()["loaded"]) == (1, 1)
    (package,) = (tmp_path / "cache").glob("*.pt2")
    good, compilations = package.read_bytes(), []

    def stub(program: Any, package_path: str, inductor_configs: Any) -> str:
        compilations.append(inductor_configs)
        Path(package_path).write_bytes(good)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", stub)
    package.write_bytes(good[:1000])
    assert relative(make()(2), eager) < 1e-5, "a package that was cut short is made again"
    make(1)(2)
    make()(3)
    assert len(compilations) == 3, "other weights and another batch size are other packages"
    assert all(c["freezing"] for c in compilations)
    package.unlink()
    (tmp_path / "planted").write_bytes(good)
    package.symlink_to(tmp_path / "planted")
    linked = make()
    assert relative(linked(2), eager) < 1e-5
    assert linked.stats() == {"samples": 2, "compiled": 1}, "a link is not loaded"
    assert not package.is_symlink()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without a GPU a recording is replaced by running the work again, which is what a replay does to the same
    buffers."""

    def record(work: Any, reset: Any, device: Any, pool: Any) -> Any:
        work()  # a warm-up, as the real one does
        reset()
        return work

    monkeypatch.setattr(loop, "capture", record)

    def graphed(model: Any, sched: Any, graph: str, **arguments: Any) -> FastSampler:
        sampler = FastSampler(model, sched, **({"shape": SHAPE, "steps": 6, "mode": "eager"} | arguments))
        # the constructor rightly refuses it on a CPU
        sampler._replan(sampler.source.options, modes.Mode(graph, None))
        return sampler

    return graphed


@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_graph_modes_walk_the_same_table(unet: UNet2D, mode: str, eta: float, recorded: Any) -> None:
    plain = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=eta, decode=torch.tanh)
    graphed = recorded(unet, scheduler(), mode, eta=eta, decode=torch.tanh)
    first = graphed(2, seed=1)
    kept = first.clone()
    torch.testing.assert_close(first, plain(2, seed=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graphed(2, seed=2), plain(2, seed=2), rtol=1e-5, atol=1e-6)
    assert torch.equal(first, kept), "an output was overwritten by the next replay"
    for n in (1, 3, 4, 5, 2):
        graphed(n)
    stats = graphed.stats()
    assert (stats["captures"], stats["replays"], stats["evictions"]) == (6, 7, 2)
    assert len(graphed._loops) == module.MAX_LOOPS


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
def test_graphs_of_solvers_with_history_and_scaled_input(unet: UNet2D, name: str, mode: str, recorded: Any) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
    sched = getattr(diffusers, name)()
    plain = FastSampler(unet, sched, shape=SHAPE, steps=6, mode="eager")
    graphed = recorded(unet, sched, mode)
    for seed in (1, 2):
        assert relative(graphed(2, seed=seed), plain(2, seed=seed)) < 1e-5


def test_a_callback_and_a_stop_leave_the_whole_loop_graph(unet: UNet2D, recorded: Any) -> None:
    graphed = recorded(unet, scheduler(), "loop-graph")
    assert graphed.trajectory(2).shape == (6, 2, *SHAPE)
    graphed(2)
    assert graphed.stats()["captures"] == 2, "one of a step, one of the loop"
    stopping = recorded(unet, scheduler(), "loop-graph", stop="eps_norm", threshold=100.0, check_every=1)
    assert (
        relative(
            stopping(2),
            FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", stop="eps_norm", threshold=100.0)(2),
        )
        < 1e-5
    )
    assert stopping.stats()["steps_saved"] == 5


def test_every_batch_is_of_one_size_and_the_last_is_padded(unet: UNet2D, recorded: Any) -> None:
    graphed = recorded(unet, scheduler(), "loop-graph", eta=0.5)
    whole = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=0.5)(7, seed=2)
    assert relative(graphed(7, seed=2, batch_size=3), whole) < 1e-5
    stats = graphed.stats()
    assert (stats["captures"], stats["replays"], stats["pads"], stats["samples"]) == (1, 3, 2, 7)
    parts = list(graphed.stream(7, seed=2, batch_size=3))
    assert [len(p) for p in parts] == [3, 3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["compile", "step-graph", "loop-graph"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cuda_modes_equal_eager(unet: UNet2D, mode: str, eta: float) -> None:
    model = UNet2D(UNET).eval()
    model.load_state_dict(unet.state_dict())
    model.cuda()
    eager, fast = (
        FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode=m, eta=eta, decode=torch.tanh)
        for m in ("eager", mode)
    )
    for seed in (0, 1, 0):
        with backend("torch"):  # else a wrong kernel would agree with itself
            expected = eager(3, seed=seed)
        assert relative(fast(3, seed=seed), expected) < 1e-4


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_float32_is_float32_inside_and_what_it_was_outside(
    convolutions: bool, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch lets convolutions on CUDA use TF32 unless told otherwise; the settings exist without a GPU too."""

    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()  # Inductor asks for the second

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    torch.set_float32_matmul_precision(products)
    try:
        cuda = torch.device("cuda")
        for asked in (True, False):
            with pytest.raises(RuntimeError, match="out"), precision.float32_precision(cuda, asked):  # noqa: PT012
                assert settings() == (asked, "high" if asked else "highest")
                raise RuntimeError("out")
            assert settings() == (convolutions, products)
            with precision.float32_precision(torch.device("cpu"), asked):
                assert settings() == (convolutions, products), "of CUDA alone"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_is_float32_where_pytorchs_newer_names_are_used() -> None:
    code = (
        "import torch\n"
        "from sbldm_fast.sampling.precision import float32_precision\n"
        "conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul\n"
        "conv.fp32_precision = matmul.fp32_precision = 'ieee'\n"
        "with float32_precision(torch.device('cuda'), True):\n"
        "    assert (conv.fp32_precision, matmul.fp32_precision) == ('tf32', 'tf32')\n"
        "assert (conv.fp32_precision, matmul.fp32_precision) == ('ieee', 'ieee')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # these settings cannot be taken back


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["eager", "step-graph", "loop-graph"])
def test_tf32_is_asked_for(unet: UNet2D, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UNet2D(UNET).eval()
    model.load_state_dict(unet.state_dict())
    expected = FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode="eager")(3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model.cuda()
    exact, rounded = (
        FastSampler(model, scheduler(), shape=SHAPE, steps=10, mode=mode, tf32=tf32) for tf32 in (False, True)
    )
    assert relative(exact(3).cpu(), expected) < 1e-5
    assert torch.backends.cudnn.allow_tf32
    assert relative(rounded(3).cpu(), expected) < 1e-2


def test_a_sample_depends_on_its_seed_and_number_alone(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", eta=0.3)
    whole = sampler(7, seed=9)
    for first, n in ((0, 1), (0, 4), (3, 4), (6, 1)):
        assert relative(sampler(indices=range(first, first + n), seed=9), whole[first : first + n]) < 1e-5
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
    assert sampler.mode == "eager"
    assert "cpu has no CUDA graphs" in sampler.reason
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [modes.choose(*c)[0] for c in ((cuda, 1, 50), (cuda, 1, 1000), (cpu, 16, 50), (cpu, 1000, 50))] == [
        "loop-graph",
        "step-graph",
        "eager",
        "compile",
    ]


def test_auto_compiles_for_a_call_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "COMPILE_PAYS", 12)
    monkeypatch.setattr(loop, "compiled_ahead", lambda function, *_: (function, False))
    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3, 2, 2), steps=4)
    eager = sampler(2)
    assert sampler.mode == "eager"
    assert relative(sampler(3)[:2], eager) < 1e-5
    assert sampler.mode == "compile"
    assert "3 samples of 4 steps" in sampler.reason
    sampler(2)
    assert sampler.mode == "compile", "what is compiled stays"


def diffusers_unet(**config: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test drops in under")
    torch.manual_seed(3)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    ).eval()


def monai_unet(**config: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is the peer that this test drops in under")
    torch.manual_seed(3)
    model = nets.DiffusionModelUNet(
        spatial_dims=2,
        in_channels=4,
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


def conditional_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test drops in under")
    torch.manual_seed(3)
    return diffusers.UNet2DConditionModel(
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
    ).eval()


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

    assert relative(got, stepped(guided, sched, 6, philox_normal((3, *SHAPE), 5))) < 1e-5
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
    expected = stepped(
        lambda x, t: model(x, t.expand(2), context=context), scheduler(), 4, philox_normal((2, *SHAPE), 0)
    )
    assert relative(got, expected) < 1e-5
    plain = FastSampler(lambda x, t, c: 0.1 * x + c, scheduler(), shape=(3,), steps=4)(2, cond=torch.ones(2, 3))
    assert relative(plain, stepped(lambda x, t: 0.1 * x + 1, scheduler(), 4, philox_normal((2, 3), 0))) < 1e-5


@pytest.mark.parametrize("make", [diffusers_unet, monai_unet])
def test_fuse_replaces_the_norms_before_silu(make: Any) -> None:
    model = make()
    plain, sampler = (
        FastSampler(model, scheduler(), shape=SHAPE, steps=4, mode="eager", fuse=f) for f in (False, True)
    )
    assert relative(sampler(2, seed=1), plain(2, seed=1)) < 1e-5
    pairs = sum(isinstance(m, nn.GroupNorm) for m in model.modules()) - sum(
        "ttention" in type(m).__name__ for m in model.modules()
    )
    assert sampler.stats()["fused"] == pairs > 8


def test_fuse_on_what_cannot_be_traced_is_named() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x

    with pytest.raises(ValueError, match=r"fuse: function cannot be traced by torch\.export"):
        FastSampler(model, scheduler(), shape=(3,), steps=2, fuse=True)(2)


def test_phase_convolutions_are_the_doubling_and_its_convolution(unet: UNet2D) -> None:
    """Four 2x2 phases, as one transposed convolution, against nearest-neighbour doubling and a 3x3 convolution."""
    layer = Upsample(5).double()
    for height, width in ((1, 1), (2, 3), (5, 4)):
        x = torch.randn(2, 5, height, width, dtype=torch.float64)
        torch.testing.assert_close(_transposed(layer.conv)(x), layer(x), rtol=1e-12, atol=1e-12)
    surgery = phase_upsampling(unet)
    assert all(p.requires_grad for p in unet.parameters()), "the caller may go on training"
    assert not any(isinstance(m, Upsample) for m in surgery.modules())
    assert any(isinstance(m, Upsample) for m in unet.modules()), "the caller's model is left as it was"
    z, t = torch.randn(2, *SHAPE), torch.tensor([5, 900])
    with torch.no_grad():
        torch.testing.assert_close(surgery(z, t), unet(z, t), rtol=1e-5, atol=1e-5)


def test_a_foreign_model_without_convolutions_keeps_its_layout_in_half_precision() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(256, 256)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(x.view(len(x), -1)).view(x.shape)

    out = FastSampler(Flat(), scheduler(), shape=(4, 8, 8), steps=2, mode="eager", dtype=torch.bfloat16)(2)
    assert out.shape == (2, 4, 8, 8)


def test_merged_biases_are_the_two_that_they_are_of(unet: UNet2D) -> None:
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    surgery, z, t = merged_biases(phase_upsampling(unet)), torch.randn(2, *SHAPE), torch.tensor([5, 900])
    shortcuts = [m for m in surgery.modules() if isinstance(m, ResBlock) and isinstance(m.skip, nn.Conv2d)]
    assert shortcuts
    assert all(m.skip.bias is None for m in shortcuts)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items()), "the caller's model is left as it was"
    with torch.no_grad():
        for which in ("torch", "triton"):
            with backend(which):
                torch.testing.assert_close(surgery(z, t), unet(z, t), rtol=1e-5, atol=1e-5)


def test_rows_of_time_are_the_embedding_of_each_step(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager")
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            torch.testing.assert_close(
                sampler.plan.network.predict(x, sampler.plan.time_rows[i : i + 1], {}),
                unet(x, int(t)),
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize(("stop", "threshold"), [("eps_norm", 0.9), ("convergence", 0.05), ("x0_delta", 0.2)])
def test_stopping_freezes_each_sample_and_returns_its_x0(unet: UNet2D, stop: str, threshold: float) -> None:
    sched, steps, n = scheduler(), 20, 3
    sampler = FastSampler(
        unet, sched, shape=SHAPE, steps=steps, mode="eager", stop=stop, threshold=threshold, check_every=3
    )
    got = sampler(n, seed=4)
    # by hand: the full run, its x0 and outputs at every step, and the first step at which each sample meets the
    # criterion
    sched.set_timesteps(steps)
    x, x0s, norms = philox_normal((n, *SHAPE), 4), [], []
    with torch.no_grad():
        for t in sched.timesteps:
            m = unet(x, t)
            x, x0 = sched.step(m, t, x)
            x0s.append(x0)
            norms.append(m.square().mean((1, 2, 3)).sqrt())
    expected, stopped = [], 0
    for k in range(n):
        for i in range(steps):
            moved = float((x0s[i][k] - x0s[i - 1][k]).square().mean().sqrt()) if i else float("inf")
            changed = abs(float(norms[i][k] / norms[i - 1][k]) - 1) if i else float("inf")
            if {"eps_norm": float(norms[i][k]), "convergence": changed, "x0_delta": moved}[stop] < threshold:
                expected.append(x0s[i][k])
                stopped += 1
                break
        else:
            expected.append(x[k])
    assert stopped > 0, "the test needs a sample that stops"
    assert sampler.stats()["stopped"] == stopped
    assert relative(got, torch.stack(expected)) < 1e-4


def test_the_papers_criterion_does_not_fire_on_noise(unet: UNet2D) -> None:
    """001 stops at RMS 0.05 of the noise prediction; noise has RMS 1 at every step."""
    sampler = FastSampler(
        lambda x, t: x / x.square().mean().sqrt(), scheduler(), shape=SHAPE, steps=20, mode="eager", stop="eps_norm"
    )
    sampler(4)
    assert "stopped" not in sampler.stats()


def test_callback_and_trajectory(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", decode=torch.tanh)
    calls: list[tuple[int, float]] = []
    out = sampler(2, seed=1, callback=lambda i, t, x: calls.append((i, t)))
    assert calls == list(enumerate(sampler.timesteps))
    path = sampler.trajectory(2, seed=1)
    assert path.shape == (5, 2, *SHAPE)
    assert relative(path[-1].tanh(), out) < 1e-6
    assert relative(path[0], path[-1]) > 1e-3


def test_interpolation_ends_at_the_two_seeds(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager")
    between = sampler.interpolate((3, 8), 5)
    assert relative(between[[0, -1]], sampler(2, seed=[3, 8])) < 1e-4
    assert relative(sampler.interpolate((3, 3), 2), sampler(2, seed=[3, 3])) < 1e-6
    a, b = (philox_normal((1, *SHAPE), s) for s in (3, 8))
    # halfway on an arc, to the first order in their lengths
    middle = (a + b) / (a + b).norm() * (a.norm() + b.norm()) / 2
    assert relative(between[2:3], sampler(noise=middle)) < 0.05


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_from_latents_is_diffusers_img2img(unet: UNet2D, name: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
    sched, z = getattr(diffusers, name)(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.3
    got = FastSampler(unet, sched, shape=SHAPE, steps=10, mode="eager").from_latents(z, 0.4, seed=7)
    sched.set_timesteps(10)
    start = 6 * sched.order
    times = sched.timesteps[start:]
    x = sched.add_noise(z, philox_normal((2, *SHAPE), 7), times[:1])
    if hasattr(sched, "set_begin_index"):
        sched.set_begin_index(start)
    with torch.no_grad():
        for t in times:
            x = sched.step(unet(sched.scale_model_input(x, t), t), t, x).prev_sample
    assert relative(got, x) < 1e-4


def test_from_latents_numbers_its_noise(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=6, mode="eager", eta=0.5)
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    whole = sampler.from_latents(z, 0.5, seed=3)
    assert relative(sampler.from_latents(z[2:], 0.5, seed=3, indices=[2]), whole[2:]) < 1e-5


def test_a_stepped_schedulers_noise_is_the_samples_own() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a scheduler with dynamic thresholding")
    sched = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0, clip_sample=False)
    with pytest.warns(UserWarning, match="stepped as it is"):
        sampler = FastSampler(lambda x, t: 0.1 * x, sched, shape=(2, 4, 4), steps=4, eta=1.0)
    whole = sampler(4, seed=2)
    assert relative(sampler(4, seed=2, batch_size=2), whole) < 1e-5
    assert relative(sampler(indices=[3], seed=2), whole[3:]) < 1e-5
    assert relative(whole[:1], whole[1:2]) > 1e-2


def test_a_model_that_cannot_be_captured_is_named_and_auto_goes_on(
    unet: UNet2D, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "capture", refuse)
    graphed = recorded(unet, scheduler(), "loop-graph")
    with pytest.raises(
        ValueError, match="mode: got 'loop-graph', and UNet2D or decode cannot be captured: operation not permitted"
    ):
        graphed(2)
    graphed._auto, graphed._choose = True, lambda n: None
    assert graphed(2).shape == (2, *SHAPE)
    assert graphed.mode == "eager"
    assert "operation not permitted" in graphed.reason
    assert graphed.stats().get("captures", 0) == 0


def test_inversion_finds_the_noise(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=50, mode="eager")
    noise = philox_normal((2, *SHAPE), 6)
    found = sampler.invert(sampler(noise=noise))
    assert relative(found, noise) < 1e-3
    with pytest.raises(ValueError, match="a step that forgets x"):
        FastSampler(unet, scheduler(prediction_type="sample"), shape=SHAPE, steps=5, mode="eager").invert(noise)
    with pytest.raises(ValueError, match="allowed is a deterministic first-order one"):
        FastSampler(unet, scheduler(), shape=SHAPE, steps=5, mode="eager", eta=1.0).invert(noise)


def test_a_table_from_a_file_is_a_scheduler(unet: UNet2D, tmp_path: Path) -> None:
    from sbldm_fast import SolverTable

    SolverTable.from_scheduler(scheduler(), 7).save(tmp_path / "t.json")
    sampler = FastSampler(unet, SolverTable.load(tmp_path / "t.json"), shape=SHAPE, mode="eager")
    assert sampler.steps == 7
    assert torch.equal(sampler(2), FastSampler(unet, scheduler(), shape=SHAPE, steps=7, mode="eager")(2))
    assert sampler.from_latents(torch.zeros(2, *SHAPE), 0.5).shape == (2, *SHAPE)


def test_what_no_table_describes_is_stepped_and_counted(unet: UNet2D) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings a scheduler with dynamic thresholding")
    sched = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0, clip_sample=False)
    with pytest.warns(UserWarning, match="DDIMScheduler is stepped as it is, without a table: x0 of step"):
        sampler = FastSampler(unet, sched, shape=SHAPE, steps=8)
    assert sampler.mode == "eager"
    got = sampler(2, seed=3)
    assert relative(got, stepped(unet, sched, 8, philox_normal((2, *SHAPE), 3))) < 1e-4  # quantiles magnify rounding
    sampler(2)
    assert sampler.stats()["fallbacks"] == 2
    with (
        pytest.raises(ValueError, match="mode, stop: got 'compile', None"),
        pytest.warns(UserWarning, match="stepped as it is"),
    ):
        FastSampler(unet, sched, shape=SHAPE, steps=8, mode="compile")


def test_nan_is_named_by_step_and_sample() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        bad = (t < 500) & (torch.arange(x.shape[0]) == 1)
        return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, 0.1 * x)

    sampler = FastSampler(model, scheduler(), shape=(2, 2, 2), steps=10, mode="eager")
    with pytest.raises(
        FloatingPointError, match=r"model: NaN or infinity at step 5 \(timestep 400\) in samples \[1\]$"
    ):
        sampler(3)
    decoded = FastSampler(
        lambda x, t: 0.1 * x, scheduler(), shape=(2, 2, 2), steps=10, mode="eager", decode=lambda z: z / 0
    )
    with pytest.raises(
        FloatingPointError, match=r"decode: NaN or infinity in samples \[0, 1\], whose latents are finite"
    ):
        decoded(2)


def test_nan_is_named_by_its_number_in_the_call() -> None:
    """Sample 4 of 5, in batches of 2: the first of the last batch, whose padding is the same sample."""
    start = torch.zeros(5, 2, 2, 2)
    start[4] = 7.0

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.mean((1, 2, 3), keepdim=True) > 5) & (t < 900), torch.nan, 0.0 * x)

    sampler = FastSampler(model, scheduler(), shape=(2, 2, 2), steps=10, mode="eager")
    with pytest.raises(
        FloatingPointError, match=r"model: NaN or infinity at step 1 \(timestep 800\) in samples \[4\]$"
    ):
        sampler(noise=start, batch_size=2)


def test_out_of_memory_of_decoding_and_other_errors() -> None:
    def decode(z: Tensor) -> Tensor:
        if len(z) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z

    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(2,), steps=3, mode="eager", decode=decode)
    with pytest.raises(MemoryError, match="n: 16 at a time do not fit into memory; 2 do"):
        sampler(16)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory") if len(x) > 2 else RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        FastSampler(broken, scheduler(), shape=(2,), steps=3, mode="eager")(4)


def test_out_of_memory_says_what_fits() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.1 * x

    sampler = FastSampler(model, scheduler(), shape=(2,), steps=3, mode="eager")
    with pytest.raises(
        MemoryError,
        match="n: 16 at a time do not fit into memory; 4 do, a step of them ran just now: give a batch size of 4",
    ):
        sampler(16)
    assert sampler(16, batch_size=4).shape == (16, 2)


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

    plain = FastSampler(lambda x, t, c: x, scheduler(), shape=SHAPE, steps=2)
    for call, message in (
        (
            lambda: make(mode="fast"),
            "mode: got 'fast', allowed are eager, compile, default, reduce-overhead, max-autotune",
        ),
        (lambda: make(mode="eager+compile"), "mode: got 'eager.compile'"),
        (lambda: make(mode="loop-graph+reduce-overhead"), "allowed in a graph are compile, max-autotune-no-cudagraphs"),
        (lambda: make(mode="loop-graph+compile"), "mode: got 'loop-graph.compile', which needs CUDA"),
        (lambda: make(stop="soon"), "stop: got 'soon', allowed are eps_norm, convergence, x0_delta and None"),
        (lambda: make(stop="eps_norm", check_every=0), "check_every: got 0"),
        (lambda: make(steps=1001), "steps: got 1001, allowed is 1 to num_train_timesteps = 1000"),
        (lambda: make()(2, batch_size=0), "batch_size: got 0"),
        (lambda: make()(2, guidance_scale=2.0), "guidance_scale: got a value without cond"),
        (lambda: make()(2, cond=torch.zeros(2, 4)), "cond: got a value, allowed is None: this model is unconditional"),
        (
            lambda: plain(2, cond=torch.zeros(3, 4)),
            "cond, uncond: got tensors of another shape, allowed is one row for each of 2",
        ),
        (
            lambda: plain(2, cond={"a": torch.zeros(2, 4)}, uncond={"b": torch.zeros(2, 4)}, guidance_scale=1.0),
            "got a of another shape",
        ),
        (lambda: plain(2, uncond=torch.zeros(2, 4), guidance_scale=1.0), "cond, uncond: got tensors"),
        (
            lambda: plain(2, cond=torch.zeros(2, 4), uncond=torch.zeros(2, 4)),
            "uncond: got a value, allowed without guidance_scale is None",
        ),
        (
            lambda: plain(2, cond=torch.zeros(2, 4), guidance_scale=float("nan")),
            "guidance_scale: got nan, allowed are finite numbers",
        ),
        (
            lambda: plain(2, cond={"a": None, "b": {"c": "text"}}),
            r"cond\['b'\]\['c'\]: got str, allowed are tensors and arrays",
        ),
        (lambda: plain(2, cond=torch.tensor(1.0)), "cond: got a number, allowed are tensors"),
        (lambda: make(threshold=0.1), "threshold: got 0.1, allowed is above 0 and, without stop, None"),
        (lambda: make(steps=True), "steps: got True, allowed is 1 to"),
        (lambda: make(shape=()), r"shape: got \(\), allowed is that of one sample"),
        (lambda: make()(2.0), "n: got 2.0, allowed is a whole number"),
        (lambda: make()(2, batch_size=1.5), "batch_size: got 1.5, allowed is a whole number"),
        (lambda: make()(2, seed=1.5), "seed: got 1.5, allowed is a whole number, or one for each sample"),
        (lambda: make()(2, seed=None), "seed: got None"),
        (lambda: make()(2, seed=torch.tensor(1)), "seed: got tensor"),
        (lambda: make()(2, seed=[1, 2.5]), "seed: got 2.5, allowed is a whole number"),
        (lambda: make()(indices=[0.5]), "indices: got 0.5, allowed is a whole number"),
        (
            lambda: make().trajectory(2, callback=print),
            "callback: got .*, allowed is None: a trajectory has one of its own",
        ),
        (lambda: make().interpolate((1, 2, 3), 4), "seeds: got 3, allowed are two"),
        (lambda: make().interpolate((1, 2), 1), "n: got 1, allowed is 2 or more"),
        (lambda: make(eta=0.5).interpolate((1, 2), 3), "scheduler: got one with noise in its steps"),
        (
            lambda: FastSampler(unet, scheduler(clip_sample=True), shape=SHAPE, steps=2).invert(torch.zeros(1, *SHAPE)),
            "clip_sample=False",
        ),
        (lambda: plain(2, cond=torch.zeros(2, 4), guidance_scale=torch.ones(3)), "guidance_scale: got 3 values"),
        (lambda: make(stop="eps_norm", threshold=-1.0), "threshold: got -1.0, allowed is above 0"),
        (lambda: make(shape=(3, 8, 8)), r"shape: got \(3, 8, 8\), allowed for this model is \(4, H, W\)"),
        (lambda: make(steps=5.5), "steps: got 5.5"),
        (
            lambda: make().trajectory(2, batch_size=1),
            "batch_size: got 1, allowed is None: a trajectory is of one batch",
        ),
        (lambda: make()(indices=[3, -1]), "indices: got -1"),
        (lambda: make().from_latents(torch.zeros(1, *SHAPE), 0.0), "strength: got 0.0, allowed is above 0 up to 1"),
        (
            lambda: FastSampler(lambda x, t: x[:, :1], scheduler(), shape=SHAPE, steps=2)(2),
            r"model: got an output of shape \(2, 1, 8, 8\)",
        ),
        (
            lambda: FastSampler(unet, object(), shape=SHAPE),
            "scheduler: got object, allowed is a scheduler with set_timesteps",
        ),
        (lambda: make(mode="loop-graph"), "mode: got 'loop-graph', which needs CUDA"),
        (lambda: make(mode="step-graph"), "mode: got 'step-graph', which needs CUDA"),
        (lambda: make(steps=0), "steps: got 0"),
        (lambda: make(eta=-1.0), "eta: got -1.0"),
        (lambda: make()(), "n, noise, indices: got none of them"),
        (lambda: make()(3, noise=torch.zeros(2, *SHAPE)), r"n, noise, indices: got \[3, 2\]"),
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


def test_a_pipeline_notices_new_weights_and_shares_the_old(pipeline: Pipeline) -> None:
    before = pipeline.sample(1, steps=2)
    shared = {p.data_ptr() for p in pipeline.unet.parameters()}
    own = [p for p in pipeline.sampler(2).source.network.model.parameters() if p.data_ptr() not in shared]
    assert len(own) == 1, "the transposed convolution alone"
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    assert relative(pipeline.sample(1, steps=2), before) > 1e-3
    for steps in range(1, 9):
        pipeline.sample(1, steps=steps)
    assert len(pipeline._samplers) == module.MAX_LOOPS


def test_solvers_by_name_start_at_the_last_timestep_and_more_steps_are_nearer(pipeline: Pipeline) -> None:
    pytest.importorskip("diffusers", reason="diffusers does the arithmetic of these solvers")
    wanted = pipeline.sampler(500)(4)
    for name in ("dpm", "unipc"):
        errors = []
        for steps in (10, 20, 50, 100):
            sampler = pipeline.sampler(steps, scheduler=name)
            assert sampler.timesteps[0] == 999
            errors.append(relative(sampler(4), wanted))
        assert errors == sorted(errors, reverse=True), name
    assert pipeline.sampler(10).timesteps[0] == 900, "DDIM is that of the paper"


def test_a_copy_of_a_pipeline_or_a_sampler_is_its_own(pipeline: Pipeline) -> None:
    before = pipeline.sample(1, steps=2)
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(2)
    assert torch.equal(pipeline.sample(1, steps=2), before)
    assert relative(other.sample(1, steps=2), before) > 1e-3
    sampler = pipeline.sampler(2)
    again = copy.deepcopy(sampler)
    assert torch.equal(again(1), sampler(1))
    assert again._turn is not sampler._turn


@pytest.mark.parametrize("name", ["vae/mine.txt", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_pipeline_is_saved_over_nothing_but_a_pipeline(name: str, pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "p" / name).parent.mkdir(parents=True)
    (tmp_path / "p" / name).write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match="which would be lost; allowed is a new folder or one that save wrote"):
        pipeline.save(tmp_path / "p")
    assert (tmp_path / "p" / name).read_text() == '{"_class_name": "DDPMPipeline"}'
    pipeline.save(tmp_path / "q")
    pipeline.save(tmp_path / "q")
    (tmp_path / "q" / "vae" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds vae/mine\.txt, which would be lost"):
        pipeline.save(tmp_path / "q")


def test_a_pipelines_own_scheduler_may_be_any(pipeline: Pipeline) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this scheduler")
    own = pipeline.sample(2, steps=4)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config.to_dict() | {"beta_schedule": "linear"}
    )
    euler = pipeline.sample(2, steps=4)
    assert relative(euler, own) > 1e-3
    assert torch.equal(euler, pipeline.sample(2, steps=4, scheduler=pipeline.scheduler))


def test_pipeline_survives_its_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "p")
    assert sorted(str(p.relative_to(tmp_path / "p")) for p in (tmp_path / "p").rglob("*") if p.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
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
        (
            lambda: Pipeline.from_pretrained(tmp_path / "nothing"),
            "is not a pipeline folder: it has no model_index.json",
        ),
        (lambda: Pipeline.from_pretrained(tmp_path / "model.pt"), "no pickle is ever read"),
        (lambda: pipeline.sample(0), "n: got 0, allowed is 1 or more"),
        (lambda: pipeline.sample(1, batch_size=0), "batch_size: got 0, allowed is 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pictures_say_what_they_are(tmp_path: Path) -> None:
    images = torch.stack([torch.full((1, 8, 8), v) for v in (-2.0, -1.0, 0.0, 1.0, 3.0)])
    assert to_uint8(images)[:, 0, 0].tolist() == [0, 0, 128, 255, 255]
    save_png(to_uint8(images)[3], tmp_path / "one.png")
    save_grid(to_uint8(images), tmp_path / "grid.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.info["Description"] == NOTICE
        assert np.asarray(one).min() == 255
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.info["Description"] == NOTICE
        assert grid.size == (24, 16 + 14)


def test_an_argument_that_no_method_has_is_refused(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE, steps=2, mode="eager")
    z = torch.zeros(1, *SHAPE)
    for call in (
        lambda: sampler(1, guidance=2.0),
        lambda: list(sampler.stream(1, guidance=2.0)),
        lambda: sampler.trajectory(1, guidance=2.0),
        lambda: sampler.interpolate((1, 2), 2, guidance=2.0),
        lambda: sampler.from_latents(z, 0.5, guidance=2.0),
        lambda: sampler.from_latents(z, 0.5, noise=z),
    ):
        with pytest.raises(TypeError, match=r"guidance|noise"):
            call()
