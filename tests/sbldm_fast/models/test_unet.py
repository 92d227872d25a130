"""The UNet: its size, its rows of time, its layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sbldm_fast import AutoencoderKL, UNet2D, preset

from ..small import UNET, VAE


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
