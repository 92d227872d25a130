"""Float32 inside a sampler, and the caller's settings outside."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling import precision

from ..small import SHAPE, UNET, relative, scheduler


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
