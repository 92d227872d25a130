"""What a UNet is told in training: covariates of slices, dropped now and then, true of augmented views."""

from __future__ import annotations

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
from torch import Tensor

from sbldm_fast import Pipeline
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.weights import read_tensors
from sbldm_fast.training import Objective, Stopped, train_pipeline
from sbldm_fast.training.conditions import drop, find_covariates, scale_volumes, values_of
from sbldm_fast.training.stages import Told, unet_loss

from .test_stages import SMALL, config, same_run

AGE = Covariate("age", low=20.0, high=33.0, unit="years")
VOLUME = Covariate("ventricle_volume", low=12.0, high=36.0, unit="ml")
GRADE = Covariate("grade", ("1", "2", "x"))


def slices(**described: Any) -> dict[str, Any]:
    """A manifest of three training slices and one held out."""
    rows = [
        {"split": "train", "modality": "T1", "covariates": {"age": 30.0, "grade": 1.0, "one": 5.0, "only": "a"}},
        {"split": "train", "modality": "unknown", "covariates": {"grade": 2.0, "one": 5.0, "only": "a"}},
        {"split": "train", "modality": "T2", "covariates": {"age": 20.5, "grade": "x", "Age at scan": 3.0}},
        {"split": "test", "modality": "PD", "covariates": {"age": 90.0, "grade": "y", "late": 1.0, "Age at scan": 4.0}},
    ]
    names = ("age", "one", "late", "Age at scan")
    known: dict[str, Any] = {name: {"low": 0.0, "high": 99.0, "slices": 4} for name in names}
    known |= {"grade": {"values": ["1", "2", "x", "y"], "slices": 4}, "only": {"values": ["a"], "slices": 2}}
    known |= {"modality": {"definition": "the contrast", "values": ["PD", "T1", "T2"], "slices": 3}}
    return {"slices": rows, "covariates": known | described}


def test_ranges_are_those_of_the_training_slices() -> None:
    manifest = slices(age={"unit": "years", "definition": "at the scan", "low": 20.5, "high": 90.0, "slices": 3})
    assert find_covariates(manifest, ["modality", "age", "grade"]) == (
        Covariate("modality", ("T1", "T2"), definition="the contrast"),
        Covariate("age", low=20.5, high=30.0, unit="years", definition="at the scan"),
        Covariate("grade", ("1", "2", "x")),
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["height"], "condition: got 'height', allowed are different ones of Age at scan, age, grade, late, modality"),
        (["age", "age"], "condition: got 'age', allowed are different ones"),
        (["one"], "condition: got 'one', of which the training slices have 1 values"),
        (["only"], "condition: got 'only', of which the training slices have 1 values"),
        (["late"], "condition: got 'late', of which the training slices have 0 values"),
        (["Age at scan"], "condition: got 'Age at scan', of which the training slices have 1 values"),
        ([""], "condition: got '', allowed are"),
    ],
)
def test_what_cannot_be_told_is_named(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_covariates(slices(), names)


def test_folders_of_before_and_names_that_no_option_can_have() -> None:
    manifest = slices()
    manifest["slices"][0]["covariates"]["Age at scan"] = 5.0
    with pytest.raises(ValueError, match=r"Covariate: name is 'Age at scan', allowed are small letters"):
        find_covariates(manifest, ["Age at scan"])
    del manifest["covariates"]
    with pytest.raises(ValueError, match=r"condition: got 'age', allowed are different ones of none: run prepare agai"):
        find_covariates(manifest, ["age"])


def test_values_of_slices_have_their_places_and_nan_where_unknown() -> None:
    values = values_of(slices()["slices"], (AGE, GRADE, Covariate("modality", ("T1", "T2"))))
    nan = math.nan
    expected = torch.tensor([[30, 0, 0], [nan, 1, nan], [20.5, 2, 1], [90, nan, nan]])
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert values_of([], (AGE, GRADE)).shape == (0, 2)
    assert values_of([{"covariates": {"age": "old"}}, {}], (AGE,)).isnan().all(), "no number is unknown, never 0"


def test_a_volume_scales_with_the_view_and_nothing_else_does() -> None:
    values = torch.tensor([[30.0, 10.0, 1.0], [40.0, math.nan, 2.0], [50.0, 20.0, 0.0]])
    got = scale_volumes(values, torch.tensor([1.0, 0.5, 1.1]), (AGE, VOLUME, GRADE))
    expected = torch.tensor([[30.0, 10.0, 1.0], [40.0, math.nan, 2.0], [50.0, 22.0, 0.0]])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_dropping_has_its_rates_and_drops_each_for_itself() -> None:
    draws = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    gone = drop(torch.ones(40_000, 3), draws).isnan()
    # all of a sample at 10 %, otherwise each at 15 %; of 40,000 five standard errors are 0.01
    assert gone.all(1).double().mean() == pytest.approx(0.1 + 0.9 * 0.15**3, abs=0.01)
    for one in gone.unbind(1):
        assert one.double().mean() == pytest.approx(0.1 + 0.9 * 0.15, abs=0.01)
    assert (~gone).all(1).double().mean() == pytest.approx(0.9 * 0.85**3, abs=0.013)
    assert (gone[:, 0] & ~gone[:, 1]).double().mean() == pytest.approx(0.9 * 0.15 * 0.85, abs=0.01)
    assert drop(torch.full((5, 1), math.nan), torch.ones(5, 2)).isnan().all(), "unknown stays unknown"


RUN: dict[str, Any] = {
    "vae": config(2),
    "unet": config(5, ema_decay=0.9),
    "condition": ("age", "modality", "ventricle_volume"),
    "views": 2,
    "progress": False,
}


def test_a_stopped_training_goes_on_to_the_same_end(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_pipeline(SMALL, told, tmp_path / "whole", **RUN)
    with monkeypatch.context() as patch:  # at the first pictures of the UNet, after two steps
        patch.setattr("sbldm_fast.training.stages._sample_some", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
        with pytest.raises(Stopped, match="unet: stopped by SIGTERM at step 3"):
            train_pipeline(SMALL, told, tmp_path / "cut", **RUN)
    train_pipeline(SMALL, told, tmp_path / "cut", resume=True, **RUN)
    same_run(tmp_path / "whole", tmp_path / "cut")
    pipe = Pipeline.from_pretrained(tmp_path / "cut" / "pipeline")
    assert pipe.unet.config.covariates == (
        Covariate("age", low=20.0, high=33.0, unit="years", definition="at the scan"),
        Covariate("modality", ("T1", "T2"), definition="the contrast"),
        Covariate("ventricle_volume", low=12.0, high=36.0, unit="ml"),
    )
    others: Any = RUN | {"condition": ("age",)}
    with pytest.raises(ValueError, match=r"unet: got .*checkpoint-unet-00000005 was made with"):
        train_pipeline(SMALL, told, tmp_path / "cut", resume=True, **others)


class Listens(torch.nn.Module):
    """A model that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.heard.append(cond)
        return x


def test_a_step_is_told_of_its_own_slices_but_for_what_is_dropped() -> None:
    torch.manual_seed(0)
    values, model = torch.arange(40.0).reshape(20, 2), Listens()
    loss_of = unet_loss(torch.randn(20, 2, 4, 4), SMALL.scheduler, Objective(), 0, values=values)
    asked = torch.randint(20, (100, 16))
    for step, index in enumerate(asked):
        loss_of(model, index, torch.tensor([step]))
    heard, all_of_it = torch.cat(model.heard), values[asked.flatten()]
    gone = heard.isnan()
    assert torch.equal(heard[~gone], all_of_it[~gone])
    # of 1,600 four standard errors are 0.03
    assert gone.all(1).double().mean() == pytest.approx(0.1 + 0.9 * 0.15**2, abs=0.03)
    assert gone[:, 1].double().mean() == pytest.approx(0.1 + 0.9 * 0.15, abs=0.04)


def test_views_are_told_of_in_their_order(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def take(unet: Any, data: Told, *_: Any, held_out: Told, **__: Any) -> None:
        given.update(train=data, val=held_out)
        raise LookupError

    monkeypatch.setattr("sbldm_fast.training.stages.train_unet", take)
    with pytest.raises(LookupError):
        train_pipeline(SMALL, told, tmp_path, **RUN | {"views": 3})
    values, areas = given["train"].values, read_tensors(tmp_path / "latents" / "latents.safetensors")["areas_train"]
    assert len(values) == len(given["train"].latents) == 3 * 14
    age = [math.nan if i == 3 else 20.0 + i for i in range(14)]
    volume = [math.nan if i % 5 == 0 or i == 3 else 10.0 + 2 * i for i in range(14)]
    exactly: Any = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(values[:, 0], torch.tensor(age * 3), **exactly)
    torch.testing.assert_close(values[:14, 2], torch.tensor(volume), **exactly)
    torch.testing.assert_close(values[:, 2], torch.tensor(volume * 3) * areas, **exactly)
    assert (areas[14:] != 1).all()
    # the modality of what is held out was never seen: it is unknown
    nan = math.nan
    expected = torch.tensor([[34.0, nan, 38.0], [35.0, nan, nan], [36.0, nan, 42.0]])
    torch.testing.assert_close(given["val"].values, expected, **exactly)


def test_what_cannot_be_trained_is_refused_before_the_first_stage(told: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cutmix_prob: got 0.25, allowed with a condition is 0: a mixture of two"):
        train_pipeline(SMALL, told, tmp_path / "a", objective=Objective(cutmix_prob=0.25), **RUN)
    height = replace(SMALL.unet, covariates=(Covariate("height", low=1.0, high=2.0),))
    with pytest.raises(ValueError, match="condition: height is known of no training slice"):
        train_pipeline(SMALL._replace(unet=height), told, tmp_path / "a", **RUN | {"condition": ()})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m | {"covariates": ["age"]}, "covariates is no description of covariates; run prepare again"),
        (lambda m: m | {"covariates": {"age": 3}}, "covariates is no description"),
        (lambda m: m["slices"][2].update(covariates=[1]), "slice 2 has covariates or a modality that are no texts"),
        (lambda m: m["slices"][2].update(covariates={"age": None}), "slice 2 has covariates"),
        (lambda m: m["slices"][2].update(covariates={"age": math.nan}), "slice 2 has covariates"),
        (lambda m: m["slices"][2].update(covariates={"age": 10**400}), "slice 2 has covariates"),
        (lambda m: m["slices"][2].update(covariates={"age": True}), "slice 2 has covariates"),
        (lambda m: m["slices"][2].update(modality=["T1"]), "slice 2 has covariates or a modality"),
    ],
)
def test_a_damaged_manifest_is_named(damage: Any, message: str, told: Path, tmp_path: Path) -> None:
    shutil.copytree(told, tmp_path / "d")
    manifest = json.loads((told / "manifest.json").read_text())
    manifest = damage(manifest) or manifest
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        train_pipeline(SMALL, tmp_path / "d", tmp_path / "run", **RUN)
    assert not (tmp_path / "run").exists()
