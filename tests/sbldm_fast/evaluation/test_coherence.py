"""Known answers of what is measured along z, and the part of an evaluation that compares volumes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, preset
from sbldm_fast.data import prepare
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.evaluation import gradients, neighbour_ssim, spectrum_along
from sbldm_fast.evaluation.coherence import choose_comparable, find_head, measure
from sbldm_fast.evaluation.material import Settings
from sbldm_fast.evaluation.report import evaluate_pipeline
from sbldm_fast.training.conditions import find_covariates

pytest.importorskip("skimage", reason="the extra eval is not installed")
DEPTH, SIDE = 64, 24


def along(values: Tensor) -> Tensor:
    """The volume whose slices have these values, as pixels of 24 x 24."""
    return values.double()[:, None, None, None].expand(-1, 1, SIDE, SIDE).float()


def noise(depth: int, seed: int = 0) -> Tensor:
    return torch.rand(depth, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.7


def test_a_ramp_has_its_gradient() -> None:
    ramp = along(torch.linspace(-0.5, 0.5, 11))  # 0.1 a slice
    assert gradients(ramp, 2.0, 1.0) == (pytest.approx(0.05, rel=1e-6), 0.0)
    across = ramp[:2].clone()
    across[:, 0] = torch.linspace(-0.5, 0.65, SIDE)  # 0.05 a column, nothing a row
    found = gradients(across, 2.0, 0.5)
    assert found == (0.0, pytest.approx(0.05 / 0.5 / 2, rel=1e-5))


def test_only_what_is_head_counts() -> None:
    """Half of each slice is air, which is as noisy below the threshold; what the head encloses is head."""
    volume = noise(6) * 0.1 - 0.9
    volume[:, :, :, 12:] = torch.tensor([0.0, 0.2] * 3)[:, None, None, None]
    volume[:, :, 8, 16] = -1.0  # dark, and enclosed
    head = find_head(volume)
    assert int(head.sum()) == 6 * SIDE * 12 + int((volume[:, 0, :, :12] > -0.8).sum())
    assert bool(head[:, 8, 16].all())
    clean = volume.clone()
    clean[:, :, :, :12] = -1.0
    n = SIDE * 12
    assert gradients(clean, 1.0, 1.0)[0] == pytest.approx(0.2 * (n - 1) / n, rel=1e-6)


def test_noise_is_as_rough_along_z_as_within_and_a_copied_slice_is_not() -> None:
    rough = measure(noise(32), 1.0, 1.0)
    assert rough["gradient along z over that within slices"] == pytest.approx(1, abs=0.02)
    assert abs(rough["SSIM of neighbours"]) < 0.05
    same = measure(noise(1).expand(32, -1, -1, -1), 1.0, 1.0)
    assert same["gradient along z"] == same["gradient along z over that within slices"] == 0
    assert same["SSIM of neighbours"] == pytest.approx(1, abs=1e-12)
    assert same["fine power along z"] < 1e-12


def test_white_noise_has_a_flat_spectrum_of_its_variance() -> None:
    """One-sided, per cycle a mm: twice the variance times the distance; uniform over 1.4 has 1.4^2 / 12."""
    frequencies, power = spectrum_along(noise(DEPTH), 2.0)
    assert frequencies.tolist() == pytest.approx([k / 128 for k in range(33)])
    expected = 2 * 2.0 * 1.4**2 / 12
    # of 576 columns: 4 % is their standard error; the ends and what the mean takes are left out
    torch.testing.assert_close(power[3:-1], torch.full((29,), expected).double(), rtol=0.16, atol=0)
    assert float(power[3:-1].mean()) == pytest.approx(expected, rel=0.02)


def test_a_wave_along_z_has_its_peak_and_its_variance() -> None:
    wave = along(0.5 * torch.cos(2 * math.pi * 8 * torch.arange(DEPTH) / DEPTH))
    frequencies, power = spectrum_along(wave, 2.0)
    assert float(frequencies[power.argmax()]) == pytest.approx(8 / (DEPTH * 2.0))
    assert float(power.sum() * (frequencies[1] - frequencies[0])) == pytest.approx(0.5**2 / 2, rel=1e-6)
    assert float(power[12:].max()) < 1e-9 * float(power.max())


def test_neighbours_that_are_alike_have_an_ssim_of_one() -> None:
    volume = noise(4)
    volume[1] = volume[0]
    found = neighbour_ssim(volume)
    assert found[0] == pytest.approx(1, abs=1e-12)
    assert found[1] < 0.2
    assert len(found) == 3


def test_air_has_no_figures() -> None:
    air = torch.full((8, 1, SIDE, SIDE), -1.0)
    assert all(math.isnan(v) for v in gradients(air, 1.0, 1.0))
    assert neighbour_ssim(air).isnan().all()
    assert spectrum_along(air, 1.0)[1].isnan().all()


@pytest.mark.parametrize("volume", [noise(1), noise(8)[:, 0], noise(8) * 9, noise(8) * float("nan")])
def test_what_is_no_volume_is_refused(volume: Tensor) -> None:
    with pytest.raises(ValueError, match="volume: got "):
        gradients(volume, 1.0, 1.0)


def test_volumes_of_one_distance_are_compared() -> None:
    fine, own, thick = ([d * k for k in range(n)] for d, n in ((1.0, 30), (2.0, 20), (3.0, 20)))
    near, short, coarse = [2.15 * k for k in range(10)], [2.0 * k for k in range(7)], [0.5 * k for k in range(40)]
    distance, found = choose_comparable([thick, own, fine, near, short, own, coarse], 9)
    assert distance == 2.0
    assert [(i, len(kept)) for i, kept in found] == [(1, 20), (2, 15), (3, 10), (5, 20), (6, 10)]
    assert found[1][1] == list(range(0, 30, 2))
    assert [i for i, _ in choose_comparable([own] * 9, 3)[1]] == [0, 4, 8]
    for none in ([], [short], [[0.0] * 20]):
        with pytest.raises(ValueError, match="volumes: got none of 8 slices or more"):
            choose_comparable(none, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:3"], folder, every=6, progress=False)
    return folder


def pipeline_of(data: Path, *names: str, **options: Any) -> Pipeline:
    p = preset("demo")
    told = replace(p.unet, covariates=find_covariates(read_manifest(data), names), **options)
    return Pipeline(AutoencoderKL(p.vae), UNet2D(told), replace(p.scheduler, prediction_type="v_prediction"))


def run(pipeline: Pipeline, data: Path, out: Path) -> dict[str, Any]:
    settings = Settings(n=8, steps=2, extractor="vae")
    report = evaluate_pipeline(pipeline, data, out, settings, only=["coherence"], progress=False)
    return dict(report["parts"]["coherence"])


def test_the_part_compares_real_volumes_with_what_is_asked_alike(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, asked = pipeline_of(data, "position", slice_mixing=True), []
    real = {  # of the two held-out brains
        subject: [row["covariates"]["position"] for row in read_manifest(data)["slices"] if row["subject"] == subject]
        for subject in {row["subject"] for row in read_manifest(data)["slices"] if row["split"] != "train"}
    }
    monkeypatch.setattr(
        Pipeline,
        "sample_volume",
        lambda self, *, positions, **how: asked.append((positions, how)) or torch.zeros(len(positions), 1, 128, 128),
    )
    part = run(pipeline, data, tmp_path / "e")
    assert sorted(positions for positions, _ in asked) == sorted(real.values())
    assert sorted(how["seed"] for _, how in asked) == [0, 1]
    figures = part["figures"]
    assert (figures["distance of slices, mm"], figures["volumes"]) == (12, 2)
    assert figures["gradient along z, together"]["mean"] == 0
    assert figures["SSIM of neighbours, together"]["mean"] == pytest.approx(1)
    one = figures["gradient along z, real"]
    assert one["n"] == 2
    assert 0 < one["mean"] < 1
    assert figures["gradient along z, together over real"]["mean"] == 0
    assert {k.rpartition(", ")[2] for k in figures} == {
        "mm",
        "volumes",
        "real",
        "reconstructed",
        "noise alone",
        "together",
        "independent",
        *(f"{name} over real" for name in ("reconstructed", "noise alone", "together", "independent")),
    }
    assert "a slice each 12.00 mm" in part["sentences"][0]
    assert all((tmp_path / "e" / name).is_file() for name in part["pictures"])
    assert "gradient along z, together" in (tmp_path / "e" / "evaluation.md").read_text()


def test_what_has_no_volume_says_so(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    part = run(Pipeline.from_pretrained(fresh_demo), data, tmp_path / "e")
    assert part["skipped"].startswith("the pipeline knows no position")
    shutil.copytree(data, tmp_path / "apart")
    manifest = json.loads((data / "manifest.json").read_text())
    for row in manifest["slices"]:  # pictures, of which nobody knows where they lie
        row["position_mm"] = None
    (tmp_path / "apart" / "manifest.json").write_text(json.dumps(manifest))
    part = run(pipeline_of(data, "position"), tmp_path / "apart", tmp_path / "f")
    assert part["skipped"].startswith("of the unseen slices, volumes: got none of 8 slices or more")
    assert json.loads((tmp_path / "f" / "evaluation.json").read_text())["parts"]["coherence"] == part
