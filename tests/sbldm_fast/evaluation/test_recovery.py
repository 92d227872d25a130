"""Covariate recovery: who follows what is asked is told from who does not, with its interval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, preset
from sbldm_fast.data import prepare
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.evaluation import recovery
from sbldm_fast.evaluation.measure import MODALITIES, Measurer, Reading
from sbldm_fast.evaluation.recovery import (
    LEVELS,
    covariate_recovery,
    draw_people,
    draw_scatter,
    find_people,
    fisher_interval,
    measure_requests,
    summarize,
    wilson_interval,
)
from sbldm_fast.training.conditions import find_covariates

NAMES = ("age", "sex", "ventricle_volume", "modality", "position")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:12"], folder, every=6, progress=False)
    return folder


def pipeline(data: Path, names: tuple[str, ...] = NAMES) -> Pipeline:
    torch.manual_seed(0)
    p = preset("demo")
    told = replace(p.unet, covariates=find_covariates(read_manifest(data), names))
    return Pipeline(AutoencoderKL(p.vae).eval(), UNet2D(told).eval(), p.scheduler)


def test_intervals_by_hand() -> None:
    """atanh .9 = 1.47222; 1.95996 / sqrt 100 = .195996; Wilson's for 95 of 100 is in every table."""
    assert fisher_interval(0.9, 103) == pytest.approx((0.85546, 0.93126), abs=1e-4)
    assert wilson_interval(0.95, 100) == pytest.approx((0.88825, 0.97846), abs=1e-4)
    assert wilson_interval(1.0, 20) == pytest.approx((0.83887, 1.0), abs=1e-4)


def test_requests_are_of_people_who_are(data: Path) -> None:
    people = find_people(data)
    rows = [row for row in read_manifest(data)["slices"] if row["split"] == "train"]
    assert len(people) == len({row["subject"] for row in rows})
    drawn = draw_people(people, 200, 3)
    known = [{k: v for k, v in one.items() if k != "positions"} for one in people]
    for one in drawn:
        person = people[known.index({k: v for k, v in one.items() if k != "positions"})]
        assert len(one["positions"]) == 4
        assert set(one["positions"]) <= set(person["positions"])
    assert len({one["age"] for one in drawn}) == len(people)
    assert drawn == draw_people(people, 200, 3) != draw_people(people, 200, 4)


class Answering:
    """A sampler whose images are what they were asked for, as numbers in their first pixels."""

    def stream(self, *, cond: dict[str, Any], seed: list[int], indices: list[int], **_: Any) -> Any:
        images = torch.zeros(len(seed), 1, 128, 128)
        images[:, 0, 0, 0] = torch.tensor(cond["ventricle_volume"]) / len(LEVELS) * 1000 / 4  # mm^2 a slice
        each = len(LEVELS) + 4
        images[:, 0, 0, 1] = torch.as_tensor(cond["position"])
        images[:, 0, 0, 2] = torch.tensor([float(MODALITIES.index(m)) for m in cond["modality"]])
        assert set(indices) == {0}
        assert [len(set(seed[i : i + each])) for i in range(0, len(seed), each)] == [1] * 6
        yield from images.split(50)


class Reader(Measurer):
    """Reads those numbers, the modality of every third slice wrong."""

    def read(self, images: torch.Tensor) -> Reading:
        modality = images[:, 0, 0, 2].long()
        modality[::3] = (modality[::3] + 1) % 3
        return Reading(images[:, 0, 0, 0], images[:, 0, 0, 1] + 2.0, modality)


def test_what_is_found_is_what_was_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(data)
    monkeypatch.setattr(pipe, "sampler", lambda *_, **__: Answering())
    requests = draw_people(find_people(data), 6, 0)
    found = measure_requests(pipe, Reader(), requests, range(6), 10, None, False)
    torch.testing.assert_close(found["found"], found["asked"])
    figures = summarize(found)
    assert figures["ventricle"]["r"] == pytest.approx(1.0)
    assert figures["ventricle"]["error_ml"] == pytest.approx(0.0, abs=1e-4)
    assert figures["position"]["error_mm"] == pytest.approx(2.0)
    assert figures["modality"]["right"] == pytest.approx(2 / 3, abs=0.01)
    assert figures["modality"]["interval"] == pytest.approx(wilson_interval(2 / 3, 6), abs=0.01)


def test_the_report_of_a_model_that_follows_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LEVELS", (0, 4))
    monkeypatch.setattr(recovery, "FEW", 4)
    monkeypatch.setattr(recovery, "SWEEP", 3)
    monkeypatch.setattr(recovery, "SEEDS", 2)
    monkeypatch.setattr(recovery, "train_measurer", lambda *_, **__: Measurer(4).eval())
    monkeypatch.setattr(recovery, "measure_ceiling", lambda *_: {"ventricle_r": 1.0})
    report = covariate_recovery(pipeline(data), data, tmp_path / "out", n=5, steps=2, progress=False)
    assert json.loads((tmp_path / "out" / "recovery.json").read_text()) == json.loads(json.dumps(report))
    low, high = report["inside"]["ventricle"]["interval"]
    assert low < report["inside"]["ventricle"]["r"] < high
    assert abs(report["age_swept"]["ml_a_unit"]) < 1e-3, "it starts as a model without a condition"
    low, high = report["edge"]["interval"]
    assert low < report["edge"]["r"] < high

    assert (report["edge"]["brains"], report["outside"]["brains"]) == (4, 4)
    assert Image.open(tmp_path / "out" / "ages.png").width == 5 * 128
    assert "not for diagnosis" in Image.open(tmp_path / "out" / "recovery.png").info["Description"]


def test_a_slope_is_the_mean_of_those_of_each_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: from one noise 2 ml a unit, from the other 3, on top of 5 and 7 ml."""
    monkeypatch.setattr(recovery, "SWEEP", 3)
    monkeypatch.setattr(recovery, "SEEDS", 2)

    def ask(requests: Any, seeds: Any) -> dict[str, torch.Tensor]:
        rule = {0: (2.0, 5.0), 1: (3.0, 7.0)}
        found = [rule[seed][0] * one["age"] + rule[seed][1] for one, seed in zip(requests, seeds, strict=True)]
        assert [one["sex"] for one in requests] == ["F"] * 6
        return {"found": torch.tensor(found)}

    slope = recovery._slope(ask, {"sex": "F"}, "age", 20.0, 80.0, 0)
    assert slope["ml_a_unit"] == pytest.approx(2.5)
    assert slope["of_one_noise"] == pytest.approx((2.0, 3.0))


def test_who_cannot_be_asked_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it cannot be asked for ventricle_volume"):
        covariate_recovery(pipeline(data, ("age", "sex", "modality", "position")), data, tmp_path / "out")
    with pytest.raises(ValueError, match="n: got 3, allowed is 4 or more"):
        covariate_recovery(pipeline(data), data, tmp_path / "out", n=3)
    assert not (tmp_path / "out").exists()


def test_a_point_lies_where_its_brain_is(tmp_path: Path) -> None:
    draw_scatter(torch.tensor([0.0, 100.0, 50.0]), torch.tensor([0.0, 100.0, 0.0]), tmp_path / "s.png", "ml")
    with Image.open(tmp_path / "s.png") as image:
        assert image.getpixel((180, 340)) == 230  # half to the right, at the bottom
        assert image.getpixel((340, 20)) == 230
        assert image.getpixel((260, 340)) != 230
