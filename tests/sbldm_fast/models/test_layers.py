"""Blocks whose norms add up what convolutions leave, against the plain operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import GroupNormSiLU, backend

from sbldm_fast import AutoencoderKL, UNet2D
from sbldm_fast.models.layers import Chain, ResBlock, Sum, add_pointwise_

from ..small import UNET, VAE


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
    # few groups: the interpreter's time goes with their number
    unet = UNet2D(replace(UNET, dropout=0.0, norm_num_groups=4)).to(device)
    vae = AutoencoderKL(replace(VAE, mid_attention=True, norm_num_groups=4)).to(device)
    model: torch.nn.Module = {"unet": unet, "encoder": vae.encoder, "decoder": vae.decoder}[name]
    shape = {"unet": (2, 4, 8, 8), "encoder": (2, 1, 16, 16), "decoder": (2, 4, 8, 8)}[name]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # biases too, which begin as almost nothing
    x = torch.randn(shape, device=device)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
        x = x.contiguous(memory_format=torch.channels_last)
    time = (torch.tensor([1, 999], device=device),) if name == "unet" else ()
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
