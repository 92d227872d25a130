"""Copies are found, and what is no copy is told from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, preset
from sbldm_fast.cli_evaluate import evaluate
from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.evaluation import nearest
from sbldm_fast.evaluation.memorisation import memorisation
from sbldm_fast.training.conditions import find_covariates


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:4"], folder, every=4, progress=False)
    return folder


def test_a_copy_is_found_by_pixels_and_by_latents(
    data: Path, fresh_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbldm_fast.evaluation.memorisation.CHUNK", 7)  # the nearest may lie in any chunk
    slices, vae = Slices(data), Pipeline.from_pretrained(fresh_demo).vae
    some = torch.tensor([len(slices) - 1, 0, 9])
    copies = slices[some] + 0.01 * torch.randn(3, 1, 128, 128)
    for model in (None, vae):
        assert nearest(copies, slices, model).index.tolist() == some.tolist()
    assert nearest(copies, slices).distance.tolist() == pytest.approx([0.01] * 3, rel=0.05)


def test_the_distance_is_its_formula(data: Path) -> None:
    slices = Slices(data)
    images = torch.randn(2, 1, 128, 128)
    every = slices[torch.arange(len(slices))].double()
    by_hand = ((images.double()[:, None] - every[None]) ** 2).mean(dim=(2, 3, 4)).sqrt().min(1)
    found = nearest(images, slices)
    assert torch.equal(found.index, by_hand.indices)
    torch.testing.assert_close(found.distance.double(), by_hand.values, rtol=1e-5, atol=0)


def test_the_report_and_its_picture(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    report = memorisation(Pipeline.from_pretrained(fresh_demo), data, tmp_path / "out", n=3, steps=2, progress=False)
    assert json.loads((tmp_path / "out" / "memorisation.json").read_text()) == report
    assert report["training_slices"] == len(Slices(data))
    for by in ("pixels", "latents"):
        for who in ("samples", "unseen"):
            q = report[by][who]
            assert 0 < q["min"] <= q["p10"] <= q["median"] <= q["p90"]
    assert report["pixels"]["samples_nearer_than_unseen_p1"] == 0, "noise is no copy"
    assert Image.open(tmp_path / "out" / "neighbours.png").width == 16 * 64


@pytest.mark.parametrize("n", [3, 16, 18])
def test_slices_stand_below_their_samples(
    data: Path, fresh_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """In each column of each three rows: a sample, and twice the training slice nearest to it."""
    copies = Slices(data)[torch.arange(n) % len(Slices(data))]
    pipe = Pipeline.from_pretrained(fresh_demo)
    monkeypatch.setattr(Pipeline, "sample", lambda *_, **__: copies)
    memorisation(pipe, data, tmp_path / "out", n=n, progress=False)
    with Image.open(tmp_path / "out" / "neighbours.png") as image:
        tiles = torch.from_numpy(np.array(image)[:-14]).unfold(0, 64, 64).unfold(1, 64, 64)
    assert tiles.shape[:2] == (3 * -(-n // 16), 16)
    for i in range(0, len(tiles), 3):
        assert torch.equal(tiles[i], tiles[i + 1])
        assert torch.equal(tiles[i], tiles[i + 2])
    drawn = tiles[::3].flatten(0, 1).flatten(1).any(1)
    assert drawn.tolist() == [i < n for i in range(len(drawn))]


def test_a_folder_with_other_files_is_refused_and_kept(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which would be lost"):
        memorisation(Pipeline.from_pretrained(fresh_demo), data, tmp_path, n=1, steps=1, progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_says_whether_samples_look_like_copies(
    data: Path, fresh_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"only": ["memorisation"], "steps": 1, "n": 8}
    evaluate(str(fresh_demo), data, tmp_path / "noise", **only)
    said = capsys.readouterr().out
    assert "- 0 by pixels and " in said
    assert "of 8 samples lie nearer to one of " in said
    assert "training slices than 99 of 100 unseen slices do; by chance it were about 0.1: " in said
    monkeypatch.setattr(Pipeline, "sample", lambda *_, **__: Slices(data)[torch.arange(8)])
    evaluate(str(fresh_demo), data, tmp_path / "copies", **only)
    said = capsys.readouterr().out
    assert "- 8 by pixels and 8 by latents of 8 samples " in said
    assert "look at these for copies" in said


def test_without_unseen_slices_there_is_no_measure(fresh_demo: Path, tmp_path: Path) -> None:
    prepare(["synthetic:1"], tmp_path / "d", every=20, progress=False)
    with pytest.raises(ValueError, match="has neither validation nor test slices"):
        memorisation(Pipeline.from_pretrained(fresh_demo), tmp_path / "d", tmp_path / "out", n=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_samples_under_the_conditions_of_training_slices_are_compared_too(data: Path, tmp_path: Path) -> None:
    manifest = read_manifest(data)
    p = preset("demo")
    told = replace(p.unet, covariates=find_covariates(manifest, ["age", "position"]))
    pipeline = Pipeline(AutoencoderKL(p.vae), UNet2D(told), p.scheduler)
    slices = Slices(data)
    asked: list[Any] = []

    def sample(n: int, *, cond: Any = None, **_: Any) -> torch.Tensor:
        """A model that remembers: whoever names a training slice gets it."""
        if cond is None:
            return torch.zeros(n, 1, 128, 128)
        asked.append(cond)
        rows = [(row["covariates"]["age"], row["covariates"]["position"]) for row in slices.rows]
        ages, positions = (torch.stack(cond[name]).tolist() for name in ("age", "position"))
        found = [
            next(i for i, (a, p) in enumerate(rows) if abs(a - age) < 1e-3 and abs(p - z) < 1e-3)
            for age, z in zip(ages, positions, strict=True)
        ]
        return slices[torch.tensor(found)]

    pipeline.sample = sample  # type: ignore[method-assign,assignment]
    report = memorisation(pipeline, data, tmp_path / "out", n=5, steps=2, progress=False)
    assert len(asked) == 1
    for by in ("pixels", "latents"):
        assert report[by]["asked"]["p90"] < 0.01
        assert (report[by]["asked_nearer_than_unseen_p1"], report[by]["samples_nearer_than_unseen_p1"]) == (5, 0)
