"""Checkpoints: written, read, and refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbldm_fast import AutoencoderKL, UNet2D
from sbldm_fast.models.weights import WEIGHTS

from ..small import UNET, VAE


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
