"""How a model is made ready: fused norms, upsampling in phases, merged biases, evaluation mode, conditioning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sbldm_fast.kernels import backend
from torch import Tensor, nn

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.models.layers import ResBlock, Upsample
from sbldm_fast.sampling.model import (
    _nested,
    _transposed,
    evaluating,
    merge_biases,
    replace_upsampling,
    tensors_by_name,
)

from ..small import SHAPE, UNET, make, relative, scheduler
from .peers import diffusers_unet, monai_unet


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
    surgery = replace_upsampling(unet)
    assert all(p.requires_grad for p in unet.parameters()), "the caller may go on training"
    assert not any(isinstance(m, Upsample) for m in surgery.modules())
    assert any(isinstance(m, Upsample) for m in unet.modules()), "the caller's model is left as it was"
    z, t = torch.randn(2, *SHAPE), torch.tensor([5, 900])
    with torch.no_grad():
        torch.testing.assert_close(surgery(z, t), unet(z, t), rtol=1e-5, atol=1e-5)


def test_merged_biases_are_the_two_that_they_are_of(unet: UNet2D) -> None:
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    surgery, z, t = merge_biases(replace_upsampling(unet)), torch.randn(2, *SHAPE), torch.tensor([5, 900])
    shortcuts = [m for m in surgery.modules() if isinstance(m, ResBlock) and isinstance(m.skip, nn.Conv2d)]
    assert shortcuts
    assert all(m.skip.bias is None for m in shortcuts)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items()), "the caller's model is left as it was"
    with torch.no_grad():
        for which in ("torch", "triton"):
            with backend(which):
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


def test_hooks_and_layers_of_the_callers_in_our_model_run() -> None:
    from sbldm_fast import UNet2D

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
        model = UNet2D(UNET).eval()
        change(model)
        got, expected = make(model)(2), make(lambda x, t, model=model: model(x, t.expand(2)))(2)
        assert relative(got, expected) < 1e-5


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


def test_a_module_evaluates_inside_and_trains_on_outside() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):  # noqa: PT012  # of one block
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]
    with evaluating(lambda x: x):
        pass


def test_two_who_evaluate_a_module_give_it_back_when_both_have_left() -> None:
    model = nn.Dropout()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not model.training
    assert model.training


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
