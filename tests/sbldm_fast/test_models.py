"""The autoencoder, the UNet, their configurations and their files."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sbldm_fast.kernels import GroupNormSiLU, backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sbldm_fast import AutoencoderKL, SchedulerConfig, UNet2D, UNetConfig, VAEConfig, preset
from sbldm_fast.models import DiagonalGaussian
from sbldm_fast.models.config import PRESETS
from sbldm_fast.models.layers import Chain, ResBlock, Sum, add_pointwise_
from sbldm_fast.models.weights import WEIGHTS

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


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_paper_has_the_size_that_the_paper_implies() -> None:
    p = preset("paper")
    unet = UNet2D(p.unet).eval()
    assert 14e6 < parameters(unet) < 15e6
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        y = unet(torch.randn(1, 8, 16, 16), 500)
    assert y.shape == (1, 8, 16, 16)
    assert flops.get_total_flops() == pytest.approx(1.07e9, rel=0.01)


@pytest.mark.parametrize(("name", "latent"), [("paper", (8, 16, 16)), ("template", (4, 32, 32)), ("demo", (8, 16, 16))])
def test_presets_fit_together(name: str, latent: tuple[int, ...]) -> None:
    p = preset(name)
    assert (p.vae.latent_channels, p.vae.latent_size, p.vae.latent_size) == latent
    assert (p.unet.in_channels, p.unet.sample_size, p.unet.sample_size) == latent
    assert not p.scheduler.clip_sample
    vae = AutoencoderKL(p.vae).eval()
    with torch.no_grad():
        q = vae.encode(torch.zeros(1, 1, 128, 128))
        image = vae.decode(q.mean)
    assert q.mean.shape == q.logvar.shape == (1, *latent)
    assert image.shape == (1, 1, 128, 128)
    assert image.abs().max() <= 1


def test_demo_is_small() -> None:
    assert parameters(UNet2D(preset("demo").unet)) <= 4e6


def test_forward_is_time_rows_then_forward_rows() -> None:
    unet = UNet2D(UNET).eval()
    torch.nn.init.normal_(unet.row_offsets, std=0.1)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    with torch.no_grad():
        whole = unet(x, t)
        rows = unet.time_rows(t)
        torch.testing.assert_close(unet.forward_rows(x, rows), whole)
        each = torch.cat([unet(x[i : i + 1], int(t[i])) for i in range(3)])
        # a row shared by the batch is the row repeated
        torch.testing.assert_close(unet.forward_rows(x, rows[1:2]), unet.forward_rows(x, rows[1:2].repeat(3, 1)))
    torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-4


def test_every_block_has_its_own_place_in_the_row() -> None:
    unet = UNet2D(UNET).eval()
    x, row = torch.randn(1, 4, 8, 8), torch.randn(1, sum(unet._row_widths)).requires_grad_()
    unet.forward_rows(x, row).sum().backward()
    assert row.grad is not None
    assert (row.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["positional", "fourier"])
def test_time_embeddings_tell_neighbours_apart(kind: str) -> None:
    unet = UNet2D(replace(UNET, time_embedding_type=kind))
    e = unet.time_embedding(torch.tensor([0, 1, 500, 999]))
    assert torch.pdist(e).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_time(dtype: torch.dtype) -> None:
    """Rounded frequencies turned t = 999 by 0.2 radians."""
    unet, t = UNet2D(UNET), torch.tensor([999])
    exact = unet.time_embedding.frequencies.clone()
    with torch.no_grad():
        expected = unet.time_embedding(t)
        got = unet.to(dtype).time_embedding(t)
    assert torch.equal(unet.time_embedding.frequencies, exact)
    assert (got.float() - expected).abs().max() < 4 * torch.finfo(dtype).eps


def test_layout_does_not_change_the_result() -> None:
    unet, x = UNet2D(UNET).eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = unet(x, 10)
        got = unet.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), 10)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def run_and_gradients(model: torch.nn.Module, out: Any) -> list[torch.Tensor]:
    """What comes out, without gradient and with, and the gradient of every parameter."""
    with torch.no_grad():
        without = out()
    model.zero_grad()
    y = out()
    y.square().mean().backward()
    return [without, y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["unet", "encoder", "decoder"])
def test_what_norms_add_up_is_what_convolutions_would(name: str, last: bool, device: torch.device) -> None:
    """Biases and shortcuts that wait for the norm behind them, in the kernels, against the plain operators: values and
    gradients."""
    torch.manual_seed(1)
    unet, vae = (
        UNet2D(replace(UNET, dropout=0.0)).to(device),
        AutoencoderKL(replace(VAE, mid_attention=True)).to(device),
    )
    model: torch.nn.Module = {"unet": unet, "encoder": vae.encoder, "decoder": vae.decoder}[name]
    shape = {"unet": (3, 4, 8, 8), "encoder": (2, 1, 16, 16), "decoder": (2, 4, 8, 8)}[name]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # biases too, which begin as almost nothing
    x = torch.randn(shape, device=device)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
        x = x.contiguous(memory_format=torch.channels_last)
    time = (torch.tensor([1, 500, 999], device=device),) if name == "unet" else ()
    got = {}
    for which in ("torch", "triton"):
        with backend(which):
            got[which] = run_and_gradients(model, lambda: model(x, *time))
    assert len(got["torch"]) == len(got["triton"]) > 20
    for plain, ours in zip(got["torch"], got["triton"], strict=True):
        assert (plain - ours).abs().max() <= 2e-4 * plain.abs().max().clamp(min=1e-3)


def test_a_chain_is_its_modules_one_after_the_other(device: torch.device) -> None:
    vae, z = AutoencoderKL(VAE).to(device).eval(), torch.randn(1, 4, 8, 8, device=device)
    for which in ("torch", "triton"):
        with torch.no_grad(), backend(which):
            h = z
            for module in vae.decoder:
                h = module(Sum(h))[1].total() if isinstance(module, ResBlock) else module(h)
            torch.testing.assert_close(vae.decode(z), h.tanh(), rtol=1e-4, atol=1e-5)


def test_a_product_adds_to_what_is_there(device: torch.device) -> None:
    conv = torch.nn.Conv2d(6, 5, 1, bias=False).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            out, x = torch.randn(2, 5, 3, 4, device=device), torch.randn(2, 6, 3, 4, device=device)
            out, x = out.contiguous(memory_format=layout), x.contiguous(memory_format=other)
            with torch.no_grad():
                wanted = out + conv(x)
                torch.testing.assert_close(add_pointwise_(out, conv.weight, x), wanted)
            torch.testing.assert_close(out, wanted)


def test_a_convolution_that_is_more_is_called_as_it_is() -> None:
    """Hooks fire, and a module in a convolution's place is asked, where the norms add biases up too."""

    class Adapted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Conv2d) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    block, x = ResBlock(16, 32, 8).eval(), torch.randn(2, 16, 4, 4)
    seen: list[torch.nn.Module] = []
    for conv in (block.conv2, block.skip):
        conv.register_forward_hook(lambda m, *_: seen.append(m))
    block.conv1 = Adapted(block.conv1)  # type: ignore[assignment]  # as adapters do
    got = {}
    for which in ("torch", "triton"):
        with torch.no_grad(), backend(which):
            got[which] = block(Sum(x))[1].total()
        assert seen == [block.conv2, block.skip]
        seen.clear()
    torch.testing.assert_close(got["triton"], got["torch"], rtol=1e-4, atol=1e-5)


def test_float32_into_blocks_under_autocast() -> None:
    chain, x = Chain(ResBlock(8, 8, 2), ResBlock(8, 16, 2), GroupNormSiLU(2, 16)), torch.randn(2, 8, 4, 4)
    for which in ("torch", "triton"):
        with backend(which), torch.autocast("cpu", torch.bfloat16):
            assert chain(x).isfinite().all()


def test_a_sum_that_nobody_reads_is_not_written() -> None:
    written: list[bool] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.sbldm_fast.group_norm_silu.default:
                written.append(args[-1])
            return func(*args, **(kwargs or {}))

    unet = UNet2D(preset("paper").unet).eval().to("meta")
    with torch.no_grad(), Look():
        unet(torch.empty(1, 8, 16, 16, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    assert len(written) == 41
    assert not written[-1], "the last norm"
    assert sum(written) == 14, "what enters a block or an attention and is a sum"


def test_kl_by_hand() -> None:
    # KL(N(1, 1) || N(0, 1)) = 1/2 per element; KL(N(0, e^2) || N(0, 1)) = (e^2 - 1 - 2) / 2
    one, zero = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    assert DiagonalGaussian(one, zero).kl().item() == pytest.approx(1.0)
    assert DiagonalGaussian(zero, 2 * one).kl().item() == pytest.approx(2 * (torch.e**2 - 3) / 2)
    assert DiagonalGaussian(zero, zero).kl().item() == 0


def test_posterior_samples_have_its_moments() -> None:
    q = DiagonalGaussian(
        torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2 * torch.log(torch.tensor(0.5)).item())
    )
    z = q.sample(torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(3.0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(z, q.sample(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("model", "config"), [(UNet2D, UNET), (AutoencoderKL, VAE)])
def test_saved_and_loaded(model: Any, config: Any, tmp_path: Path) -> None:
    original = model(config)
    original.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    loaded = model.from_pretrained(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    for (name, a), b in zip(original.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    original.save_pretrained(tmp_path, torch.float16)
    stored = load_file(tmp_path / WEIGHTS)
    assert {stored[name].dtype for name, _ in original.named_parameters()} == {torch.float16}
    for name, value in original.named_buffers():
        assert torch.equal(stored[name], value), "a constant was rounded"
    assert next(model.from_pretrained(tmp_path).parameters()).dtype == torch.float32


def broken(folder: Path, how: str) -> None:
    weights = folder / WEIGHTS
    tensors = load_file(weights)
    if how == "missing tensor":
        del tensors["conv_in.bias"]
    elif how == "wrong shape":
        tensors["conv_in.bias"] = torch.zeros(3)
    elif how == "extra tensor":
        tensors["extra"] = torch.zeros(1)
    save_file(tensors, weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle":
        weights.unlink()
        torch.save({}, folder / "diffusion_pytorch_model.bin")
    elif how == "pickle in disguise":
        torch.save(tensors, weights)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config of something else":
        (folder / "config.json").write_text(json.dumps({"sample_size": 8, "cross_attention_dim": 768}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing tensor", "tensor conv_in.bias is missing"),
        ("wrong shape", r"tensor conv_in.bias has shape \[3\], allowed is \[16\]"),
        ("extra tensor", "tensor 'extra' is not in the model"),
        ("truncated", "is not a safetensors file"),
        ("pickle", "diffusion_pytorch_model.bin beside it is a pickle, which is never read"),
        ("pickle in disguise", "is not a safetensors file, and nothing else is read"),
        ("no config", "config.json does not exist"),
        ("config not JSON", "config.json is not readable as JSON"),
        ("config of something else", "UNetConfig: got 'cross_attention_dim', allowed are"),
    ],
)
def test_broken_checkpoint_is_named(how: str, message: str, tmp_path: Path) -> None:
    UNet2D(UNET).save_pretrained(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        UNet2D.from_pretrained(tmp_path)


def test_a_pickle_handed_to_load_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is a file, allowed is a folder .*no pickle is ever read"):
        UNet2D.from_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("config", [UNET, VAE, SchedulerConfig(beta_schedule="gamma"), *PRESETS["template"]])
def test_config_survives_json(config: Any) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(UNET, norm_num_groups=5), "norm_num_groups is 5, allowed are divisors"),
        (lambda: replace(UNET, sample_size=9), "sample_size is 9"),
        (lambda: replace(UNET, time_embedding_type="learned"), "time_embedding_type is 'learned'"),
        (lambda: replace(UNET, attention_head_dim=7), "attention_head_dim is 7"),
        (lambda: replace(UNET, dropout=1.0), "dropout is 1.0"),
        (lambda: replace(VAE, norm_num_groups=3), "norm_num_groups is 3"),
        (lambda: replace(VAE, scaling_factor=0.0), "scaling_factor is 0.0"),
        (lambda: replace(VAE, block_out_channels=()), "allowed are 1 to 12 widths"),
        (lambda: SchedulerConfig(beta_schedule="sigmoid"), "beta_schedule: got 'sigmoid'"),
        (lambda: SchedulerConfig(thresholding=True), "thresholding: got True"),
        (lambda: SchedulerConfig(trained_betas=(0.1,)), "trained_betas: got 1"),
        (lambda: replace(UNET, attention_head_dim=0), "attention_head_dim is 0"),
        (lambda: UNetConfig.from_dict({"block_out_channels": 32}), "block_out_channels is 32, allowed is one like"),
        (lambda: SchedulerConfig(beta_start=-0.1), "beta_start, beta_end: got -0.1"),
        (lambda: preset("large"), "preset: got 'large', allowed are paper, template, demo"),
    ],
)
def test_bad_config_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_named() -> None:
    unet, vae = UNet2D(UNET), AutoencoderKL(VAE)
    for call, message in (
        (lambda: unet(torch.randn(1, 3, 8, 8), 0), r"x: got shape \(1, 3, 8, 8\), allowed is \[N, 4, H, W\]"),
        (
            lambda: unet(torch.randn(3, 4, 8, 8), torch.tensor([1, 2])),
            "t: got 2 timesteps, allowed is 1 or the batch, 3",
        ),
        (lambda: unet(torch.randn(1, 4, 8, 8), 0, cond=torch.zeros(1)), "cond: got a value, allowed is None"),
        (lambda: vae.encode(torch.randn(1, 1, 8, 8)), "x: got shape"),
        (lambda: vae.decode(torch.randn(1, 3, 8, 8)), "z: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


BAD = [
    *(
        (k, v)
        for k in (
            "sample_size",
            "in_channels",
            "layers_per_block",
            "norm_num_groups",
            "time_embed_dim",
            "attention_head_dim",
        )
        for v in (0, -8, 10**18, True, 1.0, None, "8", [8], {})
    ),
    *(
        ("block_out_channels", v)
        for v in (["a"], [None], [[8]], [True], [8.0], [0], [10**9, 2 * 10**9], [32] * 13, 32, "32", {"a": 1})
    ),
    *(("attention_resolutions", v) for v in ([0], [-1], ["8"], [10**9], 8)),
    *(("dropout", v) for v in (-0.1, 1.0, float("nan"), float("inf"), "0", True)),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_what_a_config_file_asks_for_is_bounded(key: str, value: Any, tmp_path: Path) -> None:
    UNet2D(UNET).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        UNet2D.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling_factor", float("inf")),
        ("scaling_factor", float("nan")),
        ("scaling_factor", 0.0),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", True),
        ("trained_betas", ["a"]),
        ("trained_betas", [2.0] * 1000),
        ("clip_sample", 1),
        ("steps_offset", -1),
    ],
)
def test_numbers_that_would_sample_nonsense_are_refused(key: str, value: Any) -> None:
    kind = VAEConfig if key == "scaling_factor" else SchedulerConfig
    with pytest.raises(ValueError, match=key):
        kind.from_dict({key: value})
    assert SchedulerConfig.from_dict({"trained_betas": np.full(1000, 0.01)}).trained_betas == (0.01,) * 1000


def test_a_config_that_asks_for_more_than_its_weights_hold_takes_no_memory(tmp_path: Path) -> None:
    """16 levels of 16,384 channels would be 70 GB; they are compared with the file's shapes first."""
    UNet2D(UNET).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"block_out_channels": [16384, 16384], "time_embed_dim": 65536})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"has shape \[.*, allowed is \["):
        UNet2D.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    UNet2D(UNET).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "conv_out.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"tensor {name} is of {str(dtype)[6:]}, allowed are float32, float16"):
        UNet2D.from_pretrained(tmp_path)
