"""The table of a solver as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbldm_fast import DDIMScheduler, SolverTable

diffusers = pytest.importorskip("diffusers", reason="diffusers brings the schedulers that these tests read")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_file_keeps_every_bit(name: str, tmp_path: Path) -> None:
    table = SolverTable.from_scheduler(getattr(diffusers, name)(), 10)
    table.save(tmp_path / "t.json")
    again = SolverTable.load(tmp_path / "t.json")
    for field in table.__dataclass_fields__:
        a, b = getattr(table, field), getattr(again, field)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b, field


def test_unknown_x0_is_null_in_the_file(tmp_path: Path) -> None:
    table = SolverTable.from_scheduler(diffusers.IPNDMScheduler(), 5)
    assert table.rows[:, :2].isnan().all()
    table.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0][:2] == [None, None]
    assert SolverTable.load(tmp_path / "t.json").rows[:, :2].isnan().all()


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 3).to_dict()
    for change, message in (
        ({"rows": [[1.0]]}, "rows: got"),
        ({"rows": "x"}, "not a solver table"),
        ({"sigma": [1.0]}, "rows: got"),
        ({"input_scale": [None] * 3}, "not finite"),
        ({"timesteps": None}, "not a solver table"),
        ({"timesteps": [[1], [2], [3]]}, "format, timesteps, init_noise_sigma"),
        ({"format": 2}, "format, timesteps, init_noise_sigma"),
        ({"init_noise_sigma": 0}, "format, timesteps, init_noise_sigma"),
        ({"clip_range": "x"}, "not a solver table"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            SolverTable.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps({k: v for k, v in good.items() if k != "alpha"}))
    with pytest.raises(ValueError, match="not a solver table"):
        SolverTable.load(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"nothing\.json"):
        SolverTable.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [900, -1, 0]}, "timesteps: got one that no model is asked for"),
        ({"timesteps": [900, float("nan"), 0]}, "timesteps: got one that no model"),
        ({"timesteps": [900, 10**30, 0]}, "not a solver table"),
        ({"timesteps": [900, 10**400, 0]}, "not a solver table"),
        ({"timesteps": [True, False, True]}, "timesteps: got one that no model"),
        ({"timesteps": [900, None, 0]}, "not a solver table"),
        ({"sigma": [float("inf"), 1.0, 1.0]}, "rows, alpha, sigma: got infinity"),
        ({"alpha": "text"}, "not a solver table"),
        ({"clip_range": float("nan")}, "clip_range: got nan"),
        ({"clip_range": -1.0}, "clip_range: got -1.0"),
        ({"init_noise_sigma": float("inf")}, "init_noise_sigma: allowed are"),
        ({"init_noise_sigma": 10**400}, "not a solver table"),
        ({"rows": None}, "not a solver table"),
    ],
    ids=str,
)
def test_a_table_that_no_run_has_is_refused(change: dict[str, Any], message: str) -> None:
    good = SolverTable.from_scheduler(DDIMScheduler(), 3).to_dict()
    with pytest.raises(ValueError, match=message):
        SolverTable.from_dict(good | change)
