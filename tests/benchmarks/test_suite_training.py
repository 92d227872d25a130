"""The training benchmark: every provider trains the same, and one that does not has no speed-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import suite_training as module
from sbldm_fast.benchmarks.suite_training import PLAIN, bench_training
from sbldm_fast.benchmarks.table import training_table


def rows() -> list[dict[str, Any]]:
    return list(bench_training(preset_name="demo", batch=4, steps=1, rounds=2, compiled=False))


def test_providers_have_the_loss_of_the_plain_loop() -> None:
    got = {row["provider"]: row for row in rows()}
    assert PLAIN in got
    assert got["sbldm_fast float32"]["parity"]["ok"]
    assert got["sbldm_fast float32"]["parity"]["error"] < 1e-5
    assert all(row["parity"]["ok"] and row["speedup"]["factor"] > 0 for row in got.values())
    row = got[PLAIN]
    assert row["speedup"]["factor"] == 1
    assert row["items_per_s"] == pytest.approx(4 / row["median_s"])
    assert row["minutes_per_100k_steps"] == pytest.approx(row["median_s"] * 1e5 / 60)
    assert row["n"] == len(row["raw_s"]) == 2
    assert f"| {PLAIN} |" in training_table(list(got.values())).markdown()


def test_another_loss_has_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.unet_loss

    def wrong(*arguments: Any) -> Any:
        loss_of = right(*arguments)
        return lambda *a: (1.01 * loss_of(*a)[0], {})

    monkeypatch.setattr(module, "unet_loss", wrong)
    row = next(row for row in rows() if row["provider"] == "sbldm_fast float32")
    assert not row["parity"]["ok"]
    assert row["speedup"] is None
    assert "| no parity |" in training_table([row]).markdown()


def test_a_provider_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        def loss_of(*_: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("out of memory")

        return loss_of

    monkeypatch.setattr(module, "unet_loss", fails)
    got = {row["provider"]: row for row in rows()}
    assert got["sbldm_fast float32"]["failed"] == "OutOfMemoryError: out of memory"
    assert got[PLAIN]["speedup"]["factor"] == 1
    assert "out of memory" in training_table(list(got.values())).markdown()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch, steps, rounds: got 0, 1, 1"):
        next(bench_training(batch=0, steps=1, rounds=1))
