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
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.presets import PRESETS

from ..small import AGE, ASKED, UNET, VAE

OTHERWISE = replace(ASKED, conditioning=("context", "concat"), concat_channels=3)


@pytest.mark.parametrize(
    ("name", "latent", "size"),
    [
        ("paper", (8, 16, 16), (128, 128)),
        ("template", (4, 32, 32), (128, 128)),
        ("covariates", (8, 16, 16), (128, 128)),
        ("demo", (8, 16, 16), (128, 128)),
        ("brain", (8, 28, 20), (224, 160)),
    ],
)
def test_presets_fit_together(name: str, latent: tuple[int, ...], size: tuple[int, int]) -> None:
    p = preset(name)
    assert p.vae.latent_shape == p.unet.shape == latent
    assert p.vae.latent_size == p.unet.sample_size
    assert p.vae.size == size
    assert not p.scheduler.clip_sample
    vae = AutoencoderKL(p.vae).eval()
    with torch.no_grad():
        q = vae.encode(torch.zeros(1, 1, *size))
        image = vae.decode(q.mean)
    assert q.mean.shape == q.logvar.shape == (1, *latent)
    assert image.shape == (1, 1, *size)
    assert image.abs().max() <= 1


def test_the_table_of_presets_is_complete() -> None:
    assert list(PRESETS) == ["paper", "template", "covariates", "volume", "demo", "brain"]


def test_slices_of_the_brain_preset_are_those_of_document_003() -> None:
    p = preset("brain")
    assert (p.vae.size, p.vae.spacing) == ((224, 160), 1.0)
    assert p.scheduler.prediction_type == "v_prediction"
    assert [p.unet.attends(level) for level in range(3)] == [False, True, True]
    assert p.unet.covariates == preset("covariates").unet.covariates


def test_a_square_has_one_configuration_and_its_file_one_number() -> None:
    square = replace(VAE, sample_size=(16, 16))
    assert square == VAE
    assert json.dumps(square.to_dict()) == json.dumps(VAE.to_dict())
    assert VAE.to_dict()["sample_size"] == 16
    assert "spacing" not in VAE.to_dict()
    assert list(replace(VAE, spacing=1.5).to_dict())[-2:] == ["scaling_factor", "spacing"]
    wide = replace(VAE, sample_size=[16, 24])  # type: ignore[arg-type]  # as JSON has it
    assert (wide.sample_size, wide.latent_size, wide.latent_shape) == ((16, 24), (8, 12), (4, 8, 12))
    assert hash(wide) == hash(replace(VAE, sample_size=(16, 24)))


@pytest.mark.parametrize(
    "config",
    [UNET, ASKED, OTHERWISE, VAE, SchedulerConfig(beta_schedule="gamma"), *PRESETS["template"], *PRESETS["brain"]],
)
def test_config_survives_json(config: Any) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(UNET, norm_num_groups=5), "norm_num_groups is 5, allowed are divisors"),
        (
            lambda: replace(UNET, sample_size=9),
            "sample_size is 9, allowed are multiples of 2, the stride: 8 or 10 for 9",
        ),
        (lambda: replace(UNET, sample_size=1), "sample_size is 1, allowed are multiples of 2, the stride: 2 for 1"),
        (
            lambda: VAEConfig(sample_size=(224, 161)),
            r"VAEConfig: sample_size is \(224, 161\), allowed are multiples of 8, the stride: 160 or 168 for 161",
        ),
        (lambda: VAEConfig(sample_size=(8, 8, 8)), r"sample_size is \(8, 8, 8\), allowed is one like 128, or two"),
        (lambda: VAEConfig(sample_size=(8, 8.0)), r"sample_size is \(8, 8.0\), allowed is one like 128"),
        (lambda: VAEConfig(sample_size=(8, True)), r"sample_size is \(8, True\), allowed is one like 128"),
        (lambda: VAEConfig(sample_size=(0, 8)), r"sample_size is \(0, 8\), allowed is 1 to 8192"),
        (lambda: VAEConfig(spacing=-1.0), "spacing is -1.0, allowed is 0.0 to 100.0"),
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
        (lambda: replace(ASKED, covariates=(AGE, AGE)), "covariates are .*, allowed are different names"),
        (lambda: replace(ASKED, covariates=(Covariate(),)), r"covariates are \[''\], allowed are different names"),
        (lambda: replace(ASKED, conditioning=()), "conditioning is \\(\\), allowed are some of adaln, cross_attention"),
        (lambda: replace(ASKED, conditioning=("film",)), "conditioning is \\('film',\\), allowed are some of"),
        (lambda: replace(ASKED, conditioning=("cross_attention", "context")), "of cross_attention and context one"),
        (lambda: UNetConfig.from_dict({"covariates": ["age"]}), "covariates are allowed to be a list of mappings"),
        (lambda: UNetConfig.from_dict({"covariates": {"age": 1}}), "covariates are allowed to be a list of mappings"),
        (lambda: UNetConfig.from_dict({"concat_channels": -1}), "concat_channels is -1, allowed is 0 to 4096"),
        (lambda: preset("large"), "preset: got 'large', allowed are paper, template, covariates, volume, demo, brain"),
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
    *(("covariates", v) for v in ("age", ["age"], {"name": "age"}, [[]], 1, True, None)),
    *(("conditioning", v) for v in ("adaln", [], ["film"], [1], None, 1, ["adaln", "Z" * 10**4])),
    *(("concat_channels", v) for v in (-1, 1.0, True, "1", 10**18, None)),
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
    ("told", "message"),
    [
        ({"low": float("nan")}, "low is nan, allowed are finite numbers"),
        ({"high": float("inf")}, "high is inf, allowed are finite numbers"),
        ({"high": 10**400}, "high is .*, allowed is -1e\\+30 to 1e\\+30"),
        ({"low": 80.0}, "age is from 80 to 80, allowed is a rising range"),
        ({"values": [str(i) for i in range(257)]}, "values of age are allowed to be 256 different names at most"),
        ({"values": "T1"}, "values is 'T1'"),
        ({"name": "maps"}, "name is 'maps'"),
        ({"name": "modality"}, r"covariates are \['modality', 'modality'\], allowed are different names"),
        ({"name": "\x1b[2J"}, r"name is '\\x1b\[2J'"),
        ({"unit": None}, "unit is None"),
        ({"kind": "number"}, "Covariate: got 'kind', allowed are"),
        # what the weights know must be what is listed
        ({"name": "keys"}, ""),
        ({"name": "n"}, ""),
        ({"values": ["young", "old"]}, r"tensor conditioning.embedding.embed.0.weight has shape \[32, 9\], allowed is"),
    ],
)
def test_covariates_of_a_config_file_are_checked(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    UNet2D(ASKED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["covariates"][0] |= told
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not message:
        assert UNet2D.from_pretrained(tmp_path)(torch.zeros(1, 4, 8, 8), 0, {told["name"]: 30}).isfinite().all()
        return
    with pytest.raises(ValueError, match=message):
        UNet2D.from_pretrained(tmp_path)


def test_covariates_that_weights_do_not_know_are_named(tmp_path: Path) -> None:
    for saved, listed, message in (
        (UNET, ASKED, "safetensors: tensor conditioning.embedding.unknown is missing"),
        (ASKED, UNET, "safetensors: tensor 'conditioning.embedding.embed.0.bias' is not in the model"),
        (
            ASKED,
            replace(ASKED, covariates=(AGE,)),
            r"tensor conditioning.embedding.unknown has shape \[2, 32\], allowed",
        ),
        (ASKED, OTHERWISE, r"tensor conv_in.weight has shape \[16, 4, 3, 3\], allowed is \[16, 9, 3, 3\]"),
    ):
        UNet2D(saved).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(listed.to_dict()))
        with pytest.raises(ValueError, match=message):
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
