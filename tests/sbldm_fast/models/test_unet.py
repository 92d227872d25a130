"""The UNet: its size, its rows of time, its layouts."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbldm_fast.kernels import GroupNormSiLU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sbldm_fast import AutoencoderKL, UNet2D, preset
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.layers import CrossAttention, Sum
from sbldm_fast.models.weights import digest_weights

from ..small import ASKED, UNET, VAE, trained


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


def test_an_unconditional_model_is_what_it_was(tmp_path: Path) -> None:
    """Names, draws and file of before there were conditions."""
    torch.manual_seed(0)
    unet = UNet2D(UNET).eval()
    assert digest_weights(unet) == "95e1b3c963e4192573b7c902de31f29c93b8612fdafa4ba73a3d6f8feaa8a8ac"
    names = hashlib.sha256(" ".join(unet.state_dict()).encode()).hexdigest()
    assert names == "46edc2979c66cc22dcb5b8d9f1b39f6206ed58cfddfeb95c59c802b9e12e3135"
    unet.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"covariates", "conditioning", "concat_channels"} & saved.keys()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        rows = unet.time_rows(torch.tensor([7]))
        assert unet.condition({}) == unet.read_condition(None, 2) == {}
        assert torch.equal(unet.forward_rows(x, rows, {}), unet.forward_rows(x, rows))
        asked = UNet2D(ASKED).eval()
        left = asked.load_state_dict(unet.state_dict(), strict=False)
        assert all(k.startswith("conditioning.") for k in left.missing_keys)
        assert not left.unexpected_keys
        for cond in (None, {"age": 70, "modality": "T2"}):
            assert torch.equal(asked(x, 7, cond), unet(x, 7)), "at first a condition changes nothing"


def plain_norm(norm: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def plain_attention(m: Any, x: Tensor, tokens: Tensor | None) -> Tensor:
    """Head by head; `tokens` `[N, L, D]`, or None for the pixels themselves."""
    N, C, H, W = x.shape
    pixels = plain_norm(m.norm, x).reshape(N, C, H * W).permute(0, 2, 1)
    if tokens is None:
        q, k, v = F.linear(pixels, m.to_qkv.weight, m.to_qkv.bias).chunk(3, dim=2)
    else:
        q = F.linear(pixels, m.to_q.weight, m.to_q.bias)
        k, v = F.linear(tokens, m.to_kv.weight, m.to_kv.bias).chunk(2, dim=2)
    d = C // m.heads
    heads = []
    for i in range(m.heads):
        of = slice(i * d, (i + 1) * d)
        weights = torch.softmax(torch.einsum("npd,nld->npl", q[..., of], k[..., of]) / math.sqrt(d), dim=2)
        heads.append(torch.einsum("npl,nld->npd", weights, v[..., of]))
    out = F.linear(torch.cat(heads, 2), m.to_out.weight, m.to_out.bias)
    return x + out.permute(0, 2, 1).reshape(N, C, H, W)


def plain_unet(unet: UNet2D, x: Tensor, row: Tensor, tokens: Tensor | None) -> Tensor:
    """The network written out, without any of its modules' forward passes; `x` with all that goes beside it."""
    parts = iter(row.split(unet._row_widths, dim=1))

    def conv(m: Any, h: Tensor) -> Tensor:
        return F.conv2d(h, m.weight, m.bias, m.stride, m.padding)

    def run(b: Any, h: Tensor) -> Tensor:
        scale, shift = (next(parts)[:, :, None, None] for _ in "ab")
        y = conv(b.block.conv1, F.silu(plain_norm(b.block.norm1, h)))
        y = conv(b.block.conv2, F.silu(plain_norm(b.block.norm2, y) * (1 + scale) + shift))
        h = y + (h if isinstance(b.block.skip, torch.nn.Identity) else conv(b.block.skip, h))
        h = h if isinstance(b.attention, torch.nn.Identity) else plain_attention(b.attention, h, None)
        return h if b.cross is None else plain_attention(b.cross, h, tokens)

    h = conv(unet.conv_in, x)
    skips = [h]
    for level, stage in enumerate(unet.down):
        for b in stage.children():
            h = run(b, h)
            skips.append(h)
        if level < len(unet.downsample):
            h = conv(unet.downsample[level], h)
            skips.append(h)
    for b in unet.mid:
        h = run(b, h)
    for level, stage in enumerate(unet.up):
        for b in stage.children():
            h = run(b, torch.cat([h, skips.pop()], 1))
        if level < len(unet.upsample):
            up: Any = unet.upsample[level]
            h = conv(up.conv, h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert not skips
    return conv(unet.conv_out, F.silu(plain_norm(unet.norm_out, h)))


def plain_tokens(unet: UNet2D, values: Tensor) -> Tensor:
    """A token of each covariate `[N, K, D]`, one sample and one covariate at a time."""
    e: Any = unet.conditioning.embedding  # type: ignore[union-attr]
    samples = []
    for sample in values:
        tokens = []
        for i, (covariate, value) in enumerate(zip(unet.config.covariates, sample, strict=True)):
            if value.isnan():
                tokens.append(e.unknown[i])
            elif covariate.values:
                tokens.append(e.embed[i].weight[int(value)])
            else:  # of a number, in float32 as the model has them whatever its weights are
                u = (value - covariate.low) * (2 / (covariate.high - covariate.low)) - 1
                angles = [u * (math.pi / 2 * 2.0**k) for k in range(4)]
                waves = torch.stack([u, *(a.sin() for a in angles), *(a.cos() for a in angles)]).double()
                tokens.append(e.embed[i].weight @ waves + e.embed[i].bias)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


def plain_scaled(unet: UNet2D, values: Tensor) -> Tensor:
    """Covariates in 0 to 1, `[N, K]`, a learned value where unknown."""
    unknown: Any = unet.conditioning.unknown_value  # type: ignore[union-attr]
    rows = []
    for sample in values:
        for i, (c, v) in enumerate(zip(unet.config.covariates, sample, strict=True)):
            low, high = (0.0, len(c.values) - 1.0) if c.values else (c.low, c.high)
            u = (v - low) * (2 / (high - low)) - 1  # in float32, as the model has it
            assert v.isnan() or float(0.5 + 0.5 * u) == pytest.approx((float(v) - low) / (high - low), abs=1e-6)
            rows.append(unknown[i] if v.isnan() else (0.5 + 0.5 * u).double())
    return torch.stack(rows).reshape(values.shape)


class ExactNorm(torch.nn.Module):
    """What `GroupNormSiLU` computes, in float64, which the op does not take."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.num_groups, self.eps, self.activation = norm.num_groups, norm.eps, norm.activation
        self.weight, self.bias = norm.weight, norm.bias

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        conv_bias: Tensor | None = None,
        residual: Tensor | None = None,
        return_sum: bool = False,
    ) -> Any:
        h = Sum(x, conv_bias, residual).total()
        y = plain_norm(self, h)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        y = y if self.activation == "none" else F.silu(y)
        return (y, h) if return_sum or residual is not None else y


def exact(model: torch.nn.Module) -> None:
    for name, module in model.named_children():
        if isinstance(module, GroupNormSiLU):
            setattr(model, name, ExactNorm(module))
        exact(module)


WAYS: list[dict[str, Any]] = [
    {},
    {"conditioning": ("cross_attention",)},
    {"conditioning": ("adaln", "cross_attention"), "attention_resolutions": (8, 4)},
    {"conditioning": ("context",)},
    {"conditioning": ("concat",)},
    {"conditioning": ("context", "concat")},
    {"conditioning": ("adaln", "concat"), "concat_channels": 3},
    {"covariates": (), "concat_channels": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.get("conditioning", tuple(w) or ("adaln",)))))
def test_every_way_in_is_the_network_written_out(way: dict[str, Any]) -> None:
    """In float64, to its rounding."""
    unet = trained(replace(ASKED, **way)).double()
    exact(unet)
    config, ways = unet.config, set(unet.config.conditioning if unet.config.covariates else ())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    maps = torch.randn(3, config.concat_channels, 8, 8, generator=generator, dtype=torch.float64)
    values = torch.tensor([[20.0, 2.0], [math.nan, 0.0], [53.5, math.nan]])
    row = unet.time_rows(torch.tensor([3, 500, 999]))
    cond: dict[str, Any] = {}
    if config.covariates:
        cond = {"age": [20, None, 53.5], "modality": ["FLAIR", "T1", None]}
    if config.concat_channels:
        cond["maps"] = maps
    with torch.no_grad():
        made = unet.condition(unet.read_condition(cond, 3))
        got = unet.forward_rows(x, row, made)
        tokens, beside, plain_row = None, [x], row
        if ways & {"adaln", "cross_attention"}:
            tokens = plain_tokens(unet, values)
        if "adaln" in ways:
            assert tokens is not None
            c: Any = unet.conditioning
            h = F.silu(F.linear(tokens.sum(1), c.linear1.weight, c.linear1.bias))
            h = F.silu(F.linear(h, c.linear2.weight, c.linear2.bias))
            each = [F.linear(h, m.weight, m.bias) for m in c.to_row]
            plain_row = row + torch.cat([each[level] for level in unet._levels], 1)
        if "context" in ways:
            tokens = plain_scaled(unet, values)[:, None]
        if "concat" in ways:
            beside.append(plain_scaled(unet, values)[:, :, None, None].expand(3, 2, 8, 8))
        if config.concat_channels:
            beside.append(maps)
        expected = plain_unet(unet, torch.cat(beside, 1), plain_row, tokens)
        error = float((got - expected).abs().max() / expected.abs().max())
        assert error < 1e-12
        torch.testing.assert_close(unet(x, torch.tensor([3, 500, 999]), cond), got, rtol=1e-12, atol=1e-12)
        nothing = unet(x, torch.tensor([3, 500, 999]))
        assert (nothing - got).abs().max() > 1e-3, "a condition matters"
        if config.covariates and not config.concat_channels:
            torch.testing.assert_close(unet(x, torch.tensor([3, 500, 999]), values), got, rtol=1e-12, atol=1e-12)


def test_the_form_of_the_published_brains() -> None:
    """Four planes of values in 0 to 1 beside x, and one token of the four (Pinaya et al. 2022, MONAI's bundle)."""
    four = tuple(Covariate(name, low=10.0, high=20.0) for name in ("age", "gender", "ventricles", "brain"))
    unet = trained(replace(UNET, covariates=four, conditioning=("context", "concat")))
    assert unet.conv_in.in_channels == 4 + 4
    assert not [k for k in unet.state_dict() if "embedding" in k and "time" not in k], "no learned token"
    values = {"age": 10, "gender": 20, "ventricles": [12.5, None], "brain": 15}
    seen: list[Tensor] = []
    unet.conv_in.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    block = unet.mid[0]
    assert isinstance(block.cross, CrossAttention)
    assert block.cross.to_kv.in_features == 4
    attended: list[tuple[Tensor, Tensor]] = []
    block.cross.register_forward_hook(lambda m, given, out: attended.append((given[0].total(), out.total())))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        unet(x, 500, values)
    conditioning: Any = unet.conditioning
    unknown = float(conditioning.unknown_value[2].detach())
    context = torch.tensor([[[0, 1, 0.25, 0.5]], [[0, 1, unknown, 0.5]]])
    planes = context.permute(0, 2, 1)[..., None].expand(2, 4, 8, 8)
    torch.testing.assert_close(seen[0], torch.cat([x, planes], 1), rtol=0, atol=1e-6)
    # attention to a single token is its value, whatever the pixel
    (entered, out), cross = attended[0], block.cross
    v = F.linear(context, cross.to_kv.weight, cross.to_kv.bias).chunk(2, 2)[1]
    expected = entered + F.linear(v, cross.to_out.weight, cross.to_out.bias).permute(0, 2, 1)[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_bad_conditions_are_named() -> None:
    asked, maps = UNet2D(ASKED), UNet2D(replace(ASKED, concat_channels=2))
    x = torch.randn(3, 4, 8, 8)
    for call, message in (
        (lambda: UNet2D(UNET)(x, 0, {"age": 3}), "cond: got a value, allowed is None: this model is unconditional"),
        (lambda: UNet2D(UNET)(x, 0, torch.zeros(3, 2)), "cond: got a value, allowed is None"),
        (lambda: asked(x, 0, torch.zeros(3)), r"cond: got shape \(3,\), allowed is \[N, 2\]"),
        (lambda: asked(x, 0, torch.zeros(3, 3)), r"cond: got shape \(3, 3\), allowed is \[N, 2\]"),
        (lambda: asked(x, 0, {"age": [30, 40]}), r"cond\['age'\]: got 2 values, allowed is one, or 3"),
        (lambda: asked(x, 0, {"maps": torch.zeros(3, 2, 8, 8)}), r"cond\['maps'\]: got shape .*, allowed is none"),
        (lambda: maps(x, 0, torch.zeros(3, 2)), "cond: got Tensor, allowed is a mapping of age, modality"),
        (lambda: maps(x, 0, {"age": 30}), r"cond\['maps'\]: got none, allowed is \[3, 2, H, W\]"),
        (lambda: maps(x, 0, {"maps": torch.zeros(3, 2)}), r"cond\['maps'\]: got shape \(3, 2\), allowed is \[3, 2, H"),
        (lambda: maps(x, 0, {"maps": torch.zeros(2, 2, 8, 8)}), r"cond\['maps'\]: got shape \(2, 2, 8, 8\), allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
