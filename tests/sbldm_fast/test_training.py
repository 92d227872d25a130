"""Training on a small population: it learns, resumes to the bit, and stops where it must."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import Pipeline, preset
from sbldm_fast.data import prepare
from sbldm_fast.models.config import Preset
from sbldm_fast.training import Optimisation, train_pipeline
from sbldm_fast.training.loop import amp_dtype, batches, train
from sbldm_fast.training.stages import augment

SMALL = Preset(
    replace(preset("demo").vae, block_out_channels=(8, 8, 8, 8)),
    replace(preset("demo").unet, block_out_channels=(16, 16), layers_per_block=1, time_embed_dim=32, dropout=0.1),
    preset("demo").scheduler,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:3"], folder, every=6, progress=False)
    return folder


def optimisation(steps: int, **values: Any) -> Optimisation:
    return Optimisation(**({"steps": steps, "batch_size": 4, "lr": 1e-3, "save_every": 2, "amp": "off"} | values))


def weights(folder: Path) -> dict[str, Tensor]:
    pipe = Pipeline.from_pretrained(folder / "pipeline")
    return {f"{n}.{k}": v for n, m in (("vae", pipe.vae), ("unet", pipe.unet)) for k, v in m.state_dict().items()}


def test_both_stages_end_in_a_pipeline_that_samples(data: Path, tmp_path: Path) -> None:
    result = train_pipeline(SMALL, data, tmp_path, vae=optimisation(3), unet=optimisation(3, ema_decay=0.9), views=2, progress=False)
    assert result["slices"] > 4
    assert result["scaling_factor"] > 0
    assert 0 < result["val_l1"] < 2
    pipe = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vae.config.scaling_factor == result["scaling_factor"]
    assert pipe.sample(1, steps=2).shape == (1, 1, 128, 128)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["vae", "unet"]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"vae": optimisation(3), "unet": optimisation(5, ema_decay=0.9), "views": 1, "progress": False}
    train_pipeline(SMALL, data, tmp_path / "whole", **arguments)

    class Cut(Exception):
        pass

    calls = 0
    lr_at = Optimisation.lr_at

    def cut(self: Optimisation, step: int) -> float:
        nonlocal calls
        calls += 1
        if calls == 3 + 1 + 4:  # three steps of the VAE and their row, then step 3 of the UNet, after its checkpoint at 2
            raise Cut
        return lr_at(self, step)

    monkeypatch.setattr(Optimisation, "lr_at", cut)
    with pytest.raises(Cut):
        train_pipeline(SMALL, data, tmp_path / "cut", **arguments)
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-unet*")] == ["checkpoint-unet-00000002"]
    assert not (tmp_path / "cut" / "pipeline").exists()
    monkeypatch.undo()
    train_pipeline(SMALL, data, tmp_path / "cut", **arguments)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


class Line(nn.Module):
    """y = a x, which should become 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


def loss_of(model: nn.Module, index: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
    x = index.float() + 1
    return ((model(x) - 3 * x) ** 2).mean(), {}


def test_the_loop_finds_the_minimum(tmp_path: Path) -> None:
    o = Optimisation(steps=300, batch_size=4, lr=0.1, amp="off", weight_decay=0.0)
    trained = train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    assert isinstance(trained, Line)
    assert trained.a.item() == pytest.approx(3.0, abs=0.01)
    assert not trained.training


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_mixed_precision_keeps_float32_weights(amp: str, tmp_path: Path) -> None:
    trained = train(Line(), loss_of, 8, Optimisation(steps=2, batch_size=4, lr=0.1, amp=amp), tmp_path, name="line", progress=False)
    assert next(trained.parameters()).dtype == torch.float32


def test_ema_is_an_average_that_starts_young(tmp_path: Path) -> None:
    seen: list[float] = []

    def recording(model: nn.Module, index: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        seen.append(float(next(model.parameters()).detach()))
        return loss_of(model, index, step)

    o = Optimisation(steps=4, batch_size=4, lr=0.5, amp="off", ema_decay=0.5, weight_decay=0.0)
    line = Line()
    averaged = train(line, recording, 8, o, tmp_path, name="line", progress=False)
    values = [*seen[1:], line.a.item()]
    # the first update copies; then the decay is (1 + n) / (10 + n) until it reaches 0.5
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert isinstance(averaged, Line)
    assert averaged.a.item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_everything_named(tmp_path: Path) -> None:
    def nan_at_five(model: nn.Module, index: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        loss, _ = loss_of(model, index, step)
        return loss * (float("nan") if step == 5 else 1), {}

    o = Optimisation(steps=9, batch_size=4, lr=0.1, amp="off", save_every=2)
    with pytest.raises(FloatingPointError, match=r"line: the loss is nan at step 5, items \[.*\]; last good checkpoint: .*checkpoint-line"):
        train(Line(), nan_at_five, 8, o, tmp_path, name="line", progress=False)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint-line-00000004"]


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    o = Optimisation(steps=2, batch_size=4, lr=0.1, amp="off")
    train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    with pytest.raises(ValueError, match="tensor weight is missing"):
        train(nn.Linear(1, 1), loss_of, 8, o, tmp_path, name="line", progress=False)
    for other, count, message in (
        (replace(o, steps=3), 8, "steps: got 3, but .*checkpoint-line-00000002 was made with 2"),
        (replace(o, seed=1), 8, "seed: got 1"),
        (o, 9, "items: got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Line(), loss_of, count, other, tmp_path, name="line", progress=False)


def test_an_epoch_meets_every_item_once_from_any_start() -> None:
    order = batches(10, 3, 7, 0)
    first = [next(order) for _ in range(7)]
    assert len(set(torch.cat(first[:3]).tolist())) == 9
    assert not torch.equal(torch.cat(first[:3]), torch.cat(first[3:6]))
    again = batches(10, 3, 7, 4)
    for expected in first[4:]:
        assert torch.equal(next(again), expected)
    assert len(next(batches(2, 5, 0, 0))) == 2


def test_learning_rate() -> None:
    o = Optimisation(steps=110, batch_size=1, lr=1.0, warmup=10)
    assert [o.lr_at(s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert o.lr_at(109) < 0.001


def test_augmentation_keeps_air_dark_and_flips_half(device: torch.device) -> None:
    x = torch.full((64, 1, 32, 32), -1.0, device=device)
    x[:, :, 10:22, 18:26] = 1.0
    y = augment(x)
    assert y.shape == x.shape
    assert y.min() >= -1.0001
    assert y.max() <= 1.0001
    assert (y[..., 0] < -0.9).all()
    right = (y[..., 16:] > 0).flatten(1).sum(1) > (y[..., :16] > 0).flatten(1).sum(1)
    assert 16 < int(right.sum()) < 48


def test_amp_dtype_by_name() -> None:
    cpu = torch.device("cpu")
    assert amp_dtype("off", cpu) is None
    assert amp_dtype("fp16", cpu) is torch.float16
    assert amp_dtype("bf16", cpu) is torch.bfloat16
    assert amp_dtype("auto", cpu) in (None, torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "message"), [({"steps": 0}, "steps: got 0"), ({"batch_size": 0}, "batch_size: got 0"), ({"amp": "tf32"}, "amp: got 'tf32'")]
)
def test_bad_optimisation_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimisation(**({"steps": 1, "batch_size": 1, "lr": 1.0} | values))


def test_bad_recon_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recon: got 'l3', allowed are mse, l1"):
        train_pipeline(SMALL, data, tmp_path, vae=optimisation(1), unet=optimisation(1), recon="l3", progress=False)
    shutil.rmtree(tmp_path)
