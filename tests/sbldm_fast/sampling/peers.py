"""Small networks of diffusers and MONAI."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


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


def monai_unet(dims: int = 2, channels: int = 4, **config: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI brings this model")
    torch.manual_seed(3)
    model: nn.Module = nets.DiffusionModelUNet(
        spatial_dims=dims,
        in_channels=channels,
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


def conditional_unet(**config: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this model")
    torch.manual_seed(3)
    model: nn.Module = diffusers.UNet2DConditionModel(
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
        **config,
    ).eval()
    return model
