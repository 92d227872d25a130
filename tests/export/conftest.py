"""Small exported folders, made once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, Pipeline, UNet2D, UNetConfig, VAEConfig, preset

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
from sbldm_fast.export import export


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """A pipeline with everything that the presets have, Fourier features of time too, and few weights."""
    torch.manual_seed(0)
    p = preset("template")
    vae = VAEConfig(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=2.0,
    )
    unet = UNetConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 128),
        layers_per_block=1,
        attention_resolutions=(4,),
        norm_num_groups=4,
        time_embed_dim=32,
        time_embedding_type=p.unet.time_embedding_type,
    )
    # without history: what the graphs of a solver that looks back do is tested beside it
    made = Pipeline(AutoencoderKL(vae).eval(), UNet2D(unet).eval(), DDIMScheduler.from_config(p.scheduler))
    for parameter in (*made.unet.parameters(), *made.vae.parameters()):
        if parameter.dim() < 2:  # biases and norms that are not 0 and 1
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return made


class Tiny(nn.Module):
    """A foreign model: two convolutions about a norm, time and any conditioning added."""

    def __init__(self, size: float = 0.2, num_groups: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv_in, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(num_groups, 8)
        self.conv_out, self.size = nn.Conv2d(8, 3, 3, padding=1), size

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.conv_in(x) + (t.to(x.dtype) * 1e-3).reshape(-1, 1, 1, 1)
        h = nn.functional.silu(self.norm(h))
        if cond is not None:
            h = h + cond.mean(1).reshape(-1, 1, 1, 1)
        out: Tensor = self.conv_out(h) * self.size
        return out


def SDE() -> Any:
    """A solver that looks back and draws noise."""
    return diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def exported(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that `export` makes of the small pipeline, once for each set of arguments, also among parallel
    workers."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"

    def folder(**arguments: Any) -> Path:
        given = {k: SDE() if v == "sde" else v for k, v in arguments.items()}
        out = shared / re.sub(r"\W+", "-", repr(sorted(arguments.items())))
        out.parent.mkdir(exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.exists():
                export(pipeline, out, **{"steps": 4, **given})
        return out

    return folder
