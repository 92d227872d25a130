"""Settings times seeds, at the smallest size that trains: equal budgets, rows that are kept, tables of rows alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sbldm_fast import preset
from sbldm_fast.data import prepare
from sbldm_fast.evaluation import ablation
from sbldm_fast.evaluation.ablation import ablate
from sbldm_fast.evaluation.ablation_tables import render_tables
from sbldm_fast.evaluation.gan import train_gan
from sbldm_fast.evaluation.settings import BOTH, SIMPLE, TABLES, Budget
from sbldm_fast.models.covariates import Covariate

for package in ("skimage", "efficientnet_lite_pytorch", "monai"):
    pytest.importorskip(package, reason="the extras eval and bench are not installed")
BUDGET = Budget(side=32, narrow=4, vae_steps=2, steps=8, batch_size=4, samples=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:4"], folder, every=12, progress=False)
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The methods of section 4.5, of three seeds."""
    folder = tmp_path_factory.mktemp("ablation") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "STEPS", 3)
        ablate(preset("demo"), data, folder, BUDGET, tables=["4.5"], progress=False)
    return folder


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_method_has_its_rows(out: Path) -> None:
    rows = rows_in(out)
    found = {(row["setting"]["method"], row["seed"]) for row in rows}
    assert found == {(method, seed) for method in ("vae", "gan", "pixels", "ours") for seed in range(3)}
    for row in rows:
        assert row["budget"]["samples"] == row["samples"] == row["real"] == 8
        assert all(math.isfinite(row[key]) for key in ("kid", "frechet_distance", "ssim_unpaired", "psnr_unpaired"))
        assert 0 <= row["precision"] <= 1
        assert row["parameters"] > 1000
        assert row["training_seconds"] > 0
        assert row["seconds_an_image"] > 0
    assert not list(out.glob("run-*")), "what a run left is gone"


def test_the_methods_have_the_seconds_of_ours(out: Path) -> None:
    rows = {(row["setting"]["method"], row["seed"]): row for row in rows_in(out)}
    for seed in range(3):
        ours = rows["ours", seed]["training_seconds"]
        assert rows["gan", seed]["training_seconds"] == pytest.approx(ours, rel=0.5)
        assert rows["ours", seed]["steps"] == 8
        assert rows["pixels", seed]["steps"] >= ablation.TRIED


def test_seeds_differ_and_the_table_has_their_mean(out: Path) -> None:
    rows = [row for row in rows_in(out) if row["setting"] == asdict(BOTH)]
    kids = torch.tensor([row["kid"] for row in rows], dtype=torch.float64)
    assert len(set(kids.tolist())) == 3
    line = next(line for line in (out / "tables.md").read_text().splitlines() if line.startswith("| ours, + both |"))
    assert line.split(" | ")[1] == f"{1e3 * kids.mean():.1f} ± {1e3 * kids.std():.1f}"


def test_rows_that_are_there_are_kept(out: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a row is made again")

    monkeypatch.setattr(ablation._Bench, "run", refuse)
    before = rows_in(out)
    assert ablate(preset("demo"), data, out, BUDGET, tables=["4.5"], progress=False) == before


def test_processes_take_different_seeds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def note(self: Any, setting: Any, seed: int) -> dict[str, Any]:
        made.append(seed)
        return fake(setting, seed, 0.1, budget=asdict(self.budget))

    monkeypatch.setattr(ablation._Bench, "run", note)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in (("0", {0, 2}), ("1", {1})):
        made.clear()
        monkeypatch.setenv("RANK", rank)
        ablate(preset("demo"), data, tmp_path / "a", BUDGET, tables=["4.4.2"], progress=False)
        assert set(made) == wanted


def fake(setting: Any, seed: int, kid: float, **more: Any) -> dict[str, Any]:
    """A row by hand."""
    numbers = dict.fromkeys(("frechet_distance", "precision", "recall", "ssim_unpaired", "psnr_unpaired"), 0.5)
    return {
        "setting": asdict(setting),
        "seed": seed,
        "kid": kid,
        **numbers,
        "rms_between_samples": 0.5,
        "training_seconds": 10.0,
        "extractor": "e",
        "dimensions": 2,
        "real": 8,
        "floor": {"samples": 8, "kid": 0.001, "frechet_distance": 1.0, "precision": 1.0, "recall": 1.0},
        "budget": asdict(BUDGET) | {"data": "d"},
        "machine": "m",
        "threads": 1,
        "arithmetic": "float32",
        **more,
    }


def test_a_table_says_what_its_differences_are_worth() -> None:
    """By hand: differences of 10, 20, 30 have a t of 20 / (10 / sqrt 3) = 3.46, below 4.30 of two degrees of freedom;
    of 10, 12, 14 one of 10.4."""
    bands = TABLES["4.4.2"]["two bands, 1 and 0.5"]
    for more, said in (
        ((10, 20, 30), "two bands, 1 and 0.5: +20.0 ± 10.0 (not told apart)"),
        ((10, 12, 14), "two bands, 1 and 0.5: +12.0 ± 2.0 (told apart)"),
    ):
        rows = [fake(SIMPLE, i, 0.1 + 0.1 * i) for i in range(3)]
        rows += [fake(bands, i, 0.1 + 0.1 * i + d / 1e3) for i, d in enumerate(more)]
        text = render_tables(rows)
        assert f"KID ×1000 above that of simple (L2), seed by seed: {said}." in text
        assert "| simple (L2) | 200.0 ± 100.0 |" in text
        assert "| *training slices* | 1.0 | 1.0 | 1.000 |" in text


def test_a_line_without_three_seeds_has_no_value() -> None:
    text = render_tables([fake(SIMPLE, i, 0.1) for i in range(2)])
    assert "| linear | - | - |" in text
    assert "| cosine | - | - |" in text
    assert "4.5" not in text.replace("4.4.", "")[text.index("###") :], "a table without a row is left out"
    assert render_tables([]) == "No rows.\n"


def test_the_ranges_are_those_of_the_document() -> None:
    tested = TABLES["B"].values()
    assert (min(s.gamma for s in tested), max(s.gamma for s in tested)) == (0.5, 1.0)
    assert (min(s.low_weight for s in tested), max(s.low_weight for s in tested)) == (0.5, 2.0)
    assert (min(s.high_weight for s in tested), max(s.high_weight for s in tested)) == (0.1, 1.0)
    assert (min(s.cutoff for s in tested), max(s.cutoff for s in tested)) == (0.1, 0.5)


def test_bad_input_is_named(data: Path, out: Path, tmp_path: Path) -> None:
    def run(of: Path = data, to: Path = tmp_path / "a", budget: Budget = BUDGET, **how: Any) -> object:
        return ablate(preset("demo"), of, to, budget, progress=False, **how)

    with pytest.raises(ValueError, match=r"tables: got '4\.6', allowed are 4\.4\.1, 4\.4\.2, 4\.4\.3, 4\.5, B"):
        run(tables=["4.6"])
    with pytest.raises(ValueError, match="seeds: got 2, allowed is 3 or more"):
        run(seeds=2)
    with pytest.raises(ValueError, match="size: got 48, allowed are divisors of 128"):
        run(budget=replace(BUDGET, side=48))
    with pytest.raises(ValueError, match=r"samples: got 5000, allowed are as many as unseen slices, \d+"):
        run(budget=replace(BUDGET, samples=5000))
    with pytest.raises(ValueError, match="was made with steps 8, got 9; allowed is another folder"):
        run(to=out, budget=replace(BUDGET, steps=9))
    prepare(["synthetic:1"], tmp_path / "one", every=30, progress=False)
    with pytest.raises(ValueError, match="has neither validation nor test slices"):
        run(of=tmp_path / "one")
    with pytest.raises(ValueError, match="prediction_type: got flow_prediction, allowed are those with betas"):
        run(budget=replace(BUDGET, prediction_type="flow_prediction"))
    p = preset("demo")
    told = p._replace(unet=replace(p.unet, covariates=(Covariate("age", low=0.0, high=1.0),)))
    with pytest.raises(ValueError, match="preset: got a conditional one"):
        ablate(told, data, tmp_path / "a", BUDGET, progress=False)


def test_a_gan_learns_something(data: Path) -> None:
    """In ten seconds of a fake clock: 100 steps; its samples come nearer to the mean of the slices than its first."""
    slices = ablation._Reduced(data, "train", 16)
    ticks = iter(range(10_000))
    mean = slices[torch.arange(len(slices))].mean(0)

    def error(seconds: float) -> float:
        made = train_gan(slices, seconds, 8, 0, lambda: 0.1 * next(ticks), torch.device("cpu"))
        return float((made.sample(32, 1).mean(0) - mean).square().mean())

    before = error(0.05)
    after = error(15.0)
    assert after < 0.5 * before
