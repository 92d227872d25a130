"""Copies are found, and what is no copy is told from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sbldm_fast import Pipeline
from sbldm_fast.data import Slices, prepare
from sbldm_fast.evaluation import nearest
from sbldm_fast.evaluation.memorisation import memorisation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:4"], folder, every=4, progress=False)
    return folder


def test_a_copy_is_found_by_pixels_and_by_latents(data: Path, fresh_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_unseen_slices_there_is_no_measure(fresh_demo: Path, tmp_path: Path) -> None:
    prepare(["synthetic:1"], tmp_path / "d", every=20, progress=False)
    with pytest.raises(ValueError, match="has neither validation nor test slices"):
        memorisation(Pipeline.from_pretrained(fresh_demo), tmp_path / "d", tmp_path / "out", n=1, progress=False)
    assert not (tmp_path / "out").exists()
