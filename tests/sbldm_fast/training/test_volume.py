"""The layers along z: the windows they are trained on, that nothing else is, and that they learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import diffuse
from torch import Tensor

from sbldm_fast import AutoencoderKL, DDPMScheduler, Pipeline, UNet2D
from sbldm_fast.models.slices import MIXING
from sbldm_fast.models.weights import digest_weights
from sbldm_fast.sampling.field import node_weights
from sbldm_fast.training import train_volume
from sbldm_fast.training.ranks import Ranks
from sbldm_fast.training.stages import Told
from sbldm_fast.training.volume import LENGTHS, Windows, mixtures, noised, places, volume_loss

from .test_stages import SMALL, config

V = replace(SMALL.scheduler, prediction_type="v_prediction")


def windows(*lengths: int) -> Windows:
    count = sum(lengths)
    told = Told(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 2, 4, 4).contiguous(), torch.zeros(count, 1))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    found = [(torch.arange(a, a + n), 2.0 + i) for i, (a, n) in enumerate(zip(starts, lengths, strict=True))]
    return Windows.of(told, found)


def test_windows_are_consecutive_slices_of_one_volume() -> None:
    made = windows(40, 33, 50)
    starts = torch.tensor([0, 39, 72, 122, 9, 41, 60, 70])
    at = made.cut(starts)
    assert len(at) == 128
    volume = torch.tensor([0] * 40 + [1] * 33 + [2] * 50)
    for part, start, length in zip(at.split(LENGTHS * 2), starts.tolist(), LENGTHS * 2, strict=True):
        assert torch.equal(part, torch.arange(int(part[0]), int(part[0]) + length))
        assert len(volume[part].unique()) == 1
        assert start in part
    # as near to its start as the volume allows
    assert int(at[0]) == 0
    assert int(at[32]) == 24
    assert int(at[48]) == 65


def test_short_volumes_are_left_out() -> None:
    made = windows(31, 32, 5)
    assert made.told.latents[:, 0, 0, 0].tolist() == [float(i) for i in range(31, 63)]
    assert made.spacing.unique().tolist() == [3.0]
    with pytest.raises(ValueError, match=r"data: its longest volume has 31 slices .* allowed is one of 32 or more"):
        windows(31, 5)


def test_each_slice_of_a_window_has_its_place() -> None:
    of, number, lengths = places(8, torch.device("cpu"))
    assert lengths.tolist() == [32, 16, 8, 8] * 2
    assert of.bincount().tolist() == lengths.tolist()
    assert number[:33].tolist() == [*range(32), 0]


def test_mixtures_are_those_of_a_volume_at_the_same_distance() -> None:
    made = mixtures([2.0, 3.5])
    for weights, mm in zip(made, (2.0, 3.5), strict=True):
        expected, nodes = node_weights([mm * i for i in range(32)])
        torch.testing.assert_close(weights[:, : len(nodes)], expected)
        assert not weights[:, len(nodes) :].any()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_noising_is_that_of_diffuse(kind: str) -> None:
    z0, t = torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 999])
    alphas = DDPMScheduler.from_config(V).alphas_cumprod
    pure, _ = diffuse(torch.zeros_like(z0), torch.zeros(3).long(), torch.zeros(1), 5)
    for ours, theirs in zip(
        noised(z0, pure, alphas[t], kind), diffuse(z0, t, alphas, 5, prediction_type=kind), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_told_is_dropped_for_a_window_as_a_whole() -> None:
    made = windows(40, 40)
    seen: list[Tensor] = []

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, values: Tensor, slices: Tensor) -> Tensor:
            seen.extend((t, values, slices))
            return x

    loss = volume_loss(made, V, Ranks())
    for step in range(12):
        loss(Model(), torch.arange(64), torch.tensor([step]))
    for t, values, slices in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert slices.tolist() == [float(i) for n in LENGTHS for i in range(n)]
        for one in (t, values[:, 0].isnan()):
            assert all(len(part.unique()) == 1 for part in one.split(LENGTHS))
    dropped = torch.stack([v[:, 0].isnan() for v in seen[1::3]])
    assert bool(dropped.any())
    assert not bool(dropped.all())


def slices_as_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbldm_fast.training.volume.LENGTHS", (4, 2, 1, 1))
    monkeypatch.setattr("sbldm_fast.training.volume.PART", 8)
    monkeypatch.setattr("sbldm_fast.training.volume.JUDGED", 16)
    places.cache_clear()


def teacher() -> Pipeline:
    torch.manual_seed(0)
    unet = UNet2D(SMALL.unet).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    return Pipeline(AutoencoderKL(SMALL.vae).eval(), unet, V)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    places.cache_clear()


def test_only_the_layers_learn_and_a_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices_as_volumes(monkeypatch)
    pipe = teacher()
    before = digest_weights(pipe.unet)
    settings: dict[str, Any] = {"batch_size": 8, "lr": 1e-3, "save_every": 2, "weight_decay": 0.0}
    done = train_volume(pipe, data, tmp_path / "a", config(4, **settings), progress=False)
    assert done["volumes"] > 0
    assert done["error"] < done["error_2d"]
    assert digest_weights(pipe.unet) == before
    made = Pipeline.from_pretrained(tmp_path / "a" / "pipeline").unet
    assert made.config.slice_mixing
    kept = dict(pipe.unet.named_parameters())
    for name, p in made.named_parameters():
        assert bool(MIXING.search(name)) == (name not in kept)
        assert name not in kept or torch.equal(p, kept[name])
    assert bool(made.mix_offsets.any())
    train_volume(pipe, data, tmp_path / "b", config(2, **settings), progress=False)
    with pytest.raises(ValueError, match="holds a run"):
        train_volume(pipe, data, tmp_path / "a", config(4, **settings), progress=False)


def test_a_volume_of_fewer_slices_than_a_batch_is_enough(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices_as_volumes(monkeypatch)
    settings: dict[str, Any] = {"batch_size": 256, "save_every": 1}
    done = train_volume(teacher(), data, tmp_path / "a", config(1, **settings), progress=False)
    assert done["slices"] < 256


def test_what_cannot_be_trained_is_named_before_slices_are_encoded(data: Path, tmp_path: Path) -> None:
    pipe = teacher()
    with pytest.raises(ValueError, match="batch_size: got 32, allowed are multiples of 64"):
        train_volume(pipe, data, tmp_path / "run", config(2, batch_size=32), progress=False)
    with pytest.raises(ValueError, match=r"data: its longest volume has .* allowed is one of 32 or more"):
        train_volume(pipe, data, tmp_path / "run", config(2, batch_size=64), progress=False)
    pipe.unet = UNet2D(replace(SMALL.unet, distilled_steps=4))
    with pytest.raises(ValueError, match="pipeline: got a network that was distilled for 4 calls"):
        train_volume(pipe, data, tmp_path / "run", config(2, batch_size=64), progress=False)
    assert not (tmp_path / "run").exists()
