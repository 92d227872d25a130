"""Mixing along z: which slices meet, nothing at first, and no other slice's business."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sbldm_fast.kernels import backend
from torch import Tensor, nn

from sbldm_fast import UNet2D
from sbldm_fast.models.layers import Sum
from sbldm_fast.models.slices import MIXING as MIXED
from sbldm_fast.models.slices import SliceAttention, distance_bias, number_volumes

from ..small import ASKED, SHAPE, UNET, trained

MIXING = replace(UNET, slice_mixing=True)


def numbers(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n).float() for n in lengths])


def test_numbers_that_follow_on_one_another_are_one_volume() -> None:
    assert number_volumes(torch.tensor([0.0, 1, 2, 0, 1, 3, 4])).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert number_volumes(torch.tensor([5.0, 4, 4, math.nan, math.nan])).tolist() == [0, 1, 2, 3, 4]
    assert number_volumes(torch.tensor([7.0])).tolist() == [0]


def test_at_first_it_is_the_2d_model_to_the_bit() -> None:
    plain = trained(UNET)
    mixing = UNet2D(MIXING).eval()
    missing = mixing.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(MIXED.search(name) for name in missing)
    x = torch.randn(6, *SHAPE)
    with torch.no_grad():
        assert torch.equal(mixing(x, 500, slices=numbers(6)), plain(x, 500))


def test_without_numbers_a_trained_one_is_the_2d_model_to_the_bit() -> None:
    mixing, plain = trained(MIXING), UNet2D(UNET).eval()
    plain.load_state_dict({k: v for k, v in mixing.state_dict().items() if not MIXED.search(k)})
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(mixing(x, 500), plain(x, 500))
        assert not torch.allclose(mixing(x, 500, slices=numbers(3)), plain(x, 500), atol=1e-3)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_volumes_of_one_batch_are_those_of_their_own(name: str) -> None:
    model = trained(MIXING)
    x = torch.randn(5, *SHAPE)
    with torch.no_grad(), backend(name):
        both = model(x, 300, slices=numbers(3, 2))
        apart = torch.cat([model(x[:3], 300, slices=numbers(3)), model(x[3:], 300, slices=numbers(2))])
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_a_slice_is_told_of_its_neighbours_and_of_both_alike() -> None:
    model = trained(MIXING)
    x = torch.randn(5, *SHAPE)
    changed = x.clone()
    changed[2] += 1
    with torch.no_grad():
        moved = (model(changed, 300, slices=numbers(5)) - model(x, 300, slices=numbers(5))).abs().amax((1, 2, 3))
    assert bool((moved > 1e-4).all())


def test_attention_over_slices_by_hand() -> None:
    """One head, every projection the identity: softmax of q k / sqrt(d) less the slope times the distance."""
    layer = SliceAttention(2, 2, 1)
    layer.norm = Plain()  # type: ignore[assignment]
    with torch.no_grad():
        layer.to_qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        layer.to_out.weight.copy_(torch.eye(2))
        layer.to_qkv.bias.zero_()
    x = torch.randn(4, 2, 1, 1)
    volumes = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    with torch.no_grad():
        out = layer(Sum(x), distance_bias(volumes, 1)).total()[:, :, 0, 0].double()
    v = x[:3, :, 0, 0].double()
    distance = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    logits = v @ v.T / math.sqrt(2) - 2.0**-8 * distance
    expected = torch.cat([v + logits.softmax(1) @ v, 2 * x[3:, :, 0, 0].double()])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    """No norm."""

    def forward(self, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return x, x


def test_numbers_come_with_a_condition() -> None:
    model = trained(replace(ASKED, slice_mixing=True))
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        named = model(x, 300, {"age": 50, "slice": [0, 1, 2]})
        values = torch.tensor([[50.0, math.nan]] * 3)
        assert torch.equal(named, model(x, 300, values, numbers(3)))
        assert not torch.equal(named, model(x, 300, {"age": 50}))
        assert torch.equal(trained(MIXING)(x, 300, {"slice": range(3)}), trained(MIXING)(x, 300, slices=numbers(3)))


def test_bad_numbers_are_named() -> None:
    model, x = trained(MIXING), torch.randn(3, *SHAPE)
    with pytest.raises(ValueError, match=r"cond\['slice'\]: got 2 numbers, allowed is one for each of 3"):
        model(x, 300, {"slice": [0, 1]})
    with pytest.raises(ValueError, match=r"cond\['slice'\]: got 'no', allowed are numbers of slices"):
        model(x, 300, {"slice": "no"})
    with pytest.raises(ValueError, match=r"cond\['slice'\]: got 3.35544e\+07, allowed is up to 2\^23"):
        model(x, 300, {"slice": [2**25] * 3})
    with pytest.raises(ValueError, match="this model is unconditional"):
        model(x, 300, {"age": 3})
    with pytest.raises(ValueError, match="this model is unconditional"):
        trained(UNET)(x, 300, {"slice": [0, 1, 2]})


def test_the_config_of_a_model_without_mixing_is_what_it_was() -> None:
    assert "slice_mixing" not in UNET.to_dict()
    assert type(MIXING).from_dict(MIXING.to_dict()) == MIXING
