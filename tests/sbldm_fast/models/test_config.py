"""Configurations and presets: what they hold and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbldm_fast import AutoencoderKL, SchedulerConfig, UNet2D, UNetConfig, VAEConfig, preset
from sbldm_fast.models.presets import PRESETS

from ..small import UNET, VAE


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
        (lambda: preset("large"), "preset: got 'large', allowed are paper, template, covariates, demo"),
    ],
)
def test_bad_config_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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
