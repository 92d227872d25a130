"""The training of a stage: checkpoints, log, validation, and the errors that end it."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sbldm_fast.training import Stopped, TrainConfig, checkpoint
from sbldm_fast.training.run import Context, Stage
from sbldm_fast.training.run import train as train_stage
from sbldm_fast.training.step import LossOf

from .test_stages import curve


def train(model: nn.Module, loss_of: LossOf, items: int, config: TrainConfig, folder: Path, **stage: Any) -> nn.Module:
    return train_stage(
        Stage(model=model, loss_of=loss_of, items=items, **stage), config, Context(folder, progress=False)
    )


def test_checkpoints_are_few_and_the_best_is_kept(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    seen: list[float] = []

    def validate(model: nn.Module) -> float:
        seen.append(float(next(model.parameters()).detach()))
        return next(values)

    config = TrainConfig(steps=10, batch_size=4, lr=0.1, amp="off", save_every=2, keep=2)
    kept = train(Line(), loss_of, 8, config, tmp_path, name="line", validate=validate)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-line-00000008",
        "checkpoint-line-00000010",
    ]
    assert json.loads((tmp_path / "best-line" / "state.json").read_text()) == {"step": 4, "val": 1.0}
    assert float(next(kept.parameters()).detach()) == seen[1]


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra `train` is not installed"
    )
    config = TrainConfig(steps=4, batch_size=4, lr=0.1, amp="off", save_every=2)
    pictures = {"synthetic samples": torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)}
    train(Line(), loss_of, 8, config, tmp_path, name="line", pictures=lambda model: pictures)
    train(Line(), loss_of, 8, config, tmp_path, name="next")
    board = events.EventAccumulator(str(tmp_path / "tensorboard" / "line"))
    board.Reload()
    assert {"line/loss", "line/grad_norm", "line/lr", "line/items_per_s"} <= set(board.Tags()["scalars"])
    (tag,) = board.Tags()["images"]
    assert tag == "line/synthetic samples, not for diagnosis"
    assert [(e.step, e.width, e.height) for e in board.Images(tag)] == [(2, 8, 4), (4, 8, 4)]


class Line(nn.Module):
    """y = a x, which should become 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = index.float() + 1
    return ((model(x) - 3 * x) ** 2).mean(), {}


def test_the_loop_finds_the_minimum(tmp_path: Path) -> None:
    config = TrainConfig(steps=300, batch_size=4, lr=0.1, amp="off", weight_decay=0.0)
    trained = train(Line(), loss_of, 8, config, tmp_path, name="line")
    assert isinstance(trained, Line)
    assert trained.a.item() == pytest.approx(3.0, abs=0.01)
    assert not trained.training


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_mixed_precision_keeps_float32_weights(amp: str, dtype: torch.dtype, tmp_path: Path) -> None:
    seen = []

    def matrix(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = model(index.float()[:, None])
        seen.append(y.dtype)
        return y.float().square().mean(), {}

    config = TrainConfig(steps=2, batch_size=4, lr=0.1, amp=amp)
    trained = train(nn.Linear(1, 1), matrix, 8, config, tmp_path, name="line")
    assert next(trained.parameters()).dtype == torch.float32
    assert seen == [dtype] * 2


def test_float16_with_a_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, batch_size=4, lr=0.1, amp="fp16", save_every=2, keep=9)
    torch.manual_seed(0)
    first = nn.Linear(1, 1)
    whole = train(copy.deepcopy(first), overflowing, 8, config, tmp_path, name="line")
    scale = json.loads((tmp_path / "checkpoint-line-00000006" / "state.json").read_text())["scaler"]["scale"]
    assert scale < 2**16, "an overflow is a step left out, and a smaller scale"
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-line-{step:08d}")
    again = train(copy.deepcopy(first), overflowing, 8, config, tmp_path, name="line")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def overflowing(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(index.float()[:, None]).float().square().mean()
    return loss * torch.where(step[0] == 3, 1e37, 1.0), {}


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path: Path) -> None:
    def bent(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = loss_of(model, index, step)
        a = next(model.parameters())
        # at 0 an infinite slope
        return loss + ((a.detach() - a).sum() + torch.where(step[0] == 5, 0.0, 1.0)).sqrt(), {}

    config = TrainConfig(steps=9, batch_size=4, lr=0.1, amp="off", save_every=2)
    with pytest.raises(
        FloatingPointError, match=r"or its gradient is not finite at step 5, .*checkpoint-line-00000004"
    ):
        train(Line(), bent, 8, config, tmp_path, name="line")
    assert max(tmp_path.glob("checkpoint-*")).name == "checkpoint-line-00000004"


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    values = iter([math.nan, 2.0, math.inf])
    config = TrainConfig(steps=3, batch_size=4, lr=0.1, amp="off", save_every=1)
    train(Line(), loss_of, 8, config, tmp_path, name="line", validate=lambda model: next(values))
    assert json.loads((tmp_path / "best-line" / "state.json").read_text()) == {"step": 2, "val": 2.0}
    assert [row["val"] for row in curve(tmp_path) if "val" in row] == [None, 2.0, None]


def test_a_signal_in_the_last_validation_is_heard(tmp_path: Path) -> None:
    def validate(model: nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends what its processes got already
        return 1.0

    config = TrainConfig(steps=2, batch_size=4, lr=0.1, amp="off")
    with pytest.raises(Stopped, match="line: stopped by SIGTERM at step 2"):
        train(Line(), loss_of, 8, config, tmp_path, name="line", validate=validate)
    assert (tmp_path / "checkpoint-line-00000002").is_dir()


def test_ema_is_an_average_that_starts_young(tmp_path: Path) -> None:
    seen: list[float] = []

    def recording(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(float(next(model.parameters()).detach()))
        return loss_of(model, index, step)

    config = TrainConfig(steps=4, batch_size=4, lr=0.5, amp="off", ema_decay=0.5, weight_decay=0.0)
    line = Line()
    averaged = train(line, recording, 8, config, tmp_path, name="line")
    values = [*seen[1:], line.a.item()]
    # the first update copies; then the decay is (1 + n) / (10 + n) until it reaches 0.5
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert isinstance(averaged, Line)
    assert averaged.a.item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_everything_named(tmp_path: Path) -> None:
    seen: dict[int, list[int]] = {}

    def nan_at_five(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = loss_of(model, index, step)
        seen[int(step)] = index.tolist()
        return loss * torch.where(step[0] == 5, torch.nan, 1.0), {}

    config = TrainConfig(steps=90, batch_size=4, lr=0.1, amp="off", save_every=2, keep=1)
    with pytest.raises(
        FloatingPointError,
        match=r"line: the loss or its gradient is not finite at step 5, items \[.*\]; last good checkpoint: .*line-",
    ) as e:
        train(Line(), nan_at_five, 8, config, tmp_path, name="line")
    assert f"items {seen[5]};" in str(e.value)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint-line-00000004"]
    with pytest.raises(FloatingPointError, match=r"at step 5, items .*; last good checkpoint: none yet"):
        train(Line(), nan_at_five, 8, replace(config, save_every=80), tmp_path / "other", name="line")


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=4, lr=0.1, amp="off")
    train(Line(), loss_of, 8, config, tmp_path, name="line")
    with pytest.raises(ValueError, match="tensor weight is missing"):
        train(nn.Linear(1, 1), loss_of, 8, config, tmp_path, name="line")
    for other, count, message in (
        (replace(config, steps=3), 8, "steps: got 3, but .*checkpoint-line-00000002 was made with 2"),
        (replace(config, seed=1), 8, "seed: got 1"),
        (config, 9, "items: got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Line(), loss_of, count, other, tmp_path, name="line")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{}", "step is None, which is no state of a run"),
        (
            "state.json",
            '{"step": "2", "since": 0, "seconds": 0, "loss": 0, "settings": {}, "scaler": {}}',
            "step is '2'",
        ),
        (
            "state.json",
            '{"step": 2, "since": 0, "seconds": 0, "loss": 0, "settings": null, "scaler": {}}',
            "settings is None",
        ),
        ("optimizer.safetensors", {"7.exp_avg": torch.zeros(1)}, "tensor '7.exp_avg' is of no parameter of this model"),
        ("optimizer.safetensors", {"first.step": torch.zeros(())}, "tensor 'first.step' is of no parameter"),
        ("optimizer.safetensors", {"0.exp_avg": torch.zeros(3)}, r"tensor 0.exp_avg has shape \[3\]"),
        ("model.safetensors", {"a": torch.zeros(1, dtype=torch.int64)}, "tensor a is of int64"),
        ("../log.jsonl", "[]\n", "log.jsonl, line 1 is no row of a run"),
    ],
)
def test_a_damaged_checkpoint_is_named(file: str, content: Any, message: str, tmp_path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=4, lr=0.1, amp="off")
    train(Line(), loss_of, 8, config, tmp_path, name="line")
    path = tmp_path / "checkpoint-line-00000002" / file
    if isinstance(content, str):
        path.write_text(content)
    else:
        save_file({k: v.reshape(Line().a.shape) if k == "a" else v for k, v in content.items()}, path)
    with pytest.raises(ValueError, match=message):
        train(Line(), loss_of, 8, config, tmp_path, name="line")


def test_copies_that_a_user_made_of_checkpoints_stay_theirs(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=4, lr=0.1, amp="off", save_every=1, keep=1)
    train(Line(), loss_of, 8, config, tmp_path, name="line")
    real = tmp_path / "checkpoint-line-00000004"
    others = [
        tmp_path / "checkpoint-line-00000001-mine",
        tmp_path / "checkpoint-line-good",
        tmp_path / ".vimrc.original.old",
        tmp_path / ".notes.20261101.old",
        tmp_path / ".photos.archived.part",
    ]
    for other in others:
        shutil.copytree(real, other)
    train(Line(), loss_of, 8, config, tmp_path, name="line")
    assert all((other / "state.json").exists() for other in others)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [real.name]
    assert checkpoint.newest(tmp_path, "line") == real
