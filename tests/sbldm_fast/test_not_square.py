"""Slices that are not square: through prepare, training, sampling, evaluation and export, and what fits nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sbldm_fast import FastSampler, Pipeline, UNet2D, preset
from sbldm_fast.cli import app
from sbldm_fast.data import Slices
from sbldm_fast.evaluation.material import Material, Settings
from sbldm_fast.evaluation.measure import frame_of
from sbldm_fast.evaluation.parts import PARTS
from sbldm_fast.models.presets import Preset
from sbldm_fast.training import TrainConfig, distill_pipeline, train_pipeline

from .data.test_volumes import head, save
from .small import UNET, VAE, scheduler, trained

SIZE, LATENT = (24, 16), (4, 12, 8)
SMALL = Preset(
    replace(VAE, sample_size=SIZE),
    replace(UNET, sample_size=LATENT[1:], attention_resolutions=(6,)),
    preset("demo").scheduler,
)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six heads as volumes of 16 x 24 pixels of 10 mm."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        save(head(person=i), folder / "in" / f"sub-{i}_T1w.nii")
    run("prepare", folder / "in", "-o", folder / "out", "--size", "16x24", "--spacing", 10, "--volumes", "--workers", 1)
    return folder / "out"


@pytest.fixture(scope="module")
def pipeline(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(2, 4, 1e-3, save_every=2, amp="off")
    train_pipeline(SMALL, data, folder, vae=config, unet=config, views=2, progress=False)
    return folder / "pipeline"


def test_from_scans_to_samples(data: Path, pipeline: Path, tmp_path: Path) -> None:
    assert json.loads((data / "manifest.json").read_text())["size"] == list(SIZE)
    assert [len(v) for v in Slices(data).volumes] == [12] * 4
    made = Pipeline.from_pretrained(pipeline)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    assert (config["sample_size"], config["spacing"]) == ([24, 16], 10.0)
    assert made.latent_shape == LATENT
    images = made.sample(2, steps=2)
    assert images.shape == (2, 1, *SIZE)
    assert images.isfinite().all()
    run("sample", pipeline, "-n", 2, "--steps", 2, "-o", tmp_path / "o", "--format", "npy")
    found = np.concatenate([np.load(path).reshape(-1, *SIZE) for path in sorted((tmp_path / "o").glob("*.npy"))])
    np.testing.assert_allclose(found, images[:, 0], atol=1e-5)


def test_a_student_and_what_does_not_fit_it(data: Path, pipeline: Path, tmp_path: Path) -> None:
    teacher = Pipeline.from_pretrained(pipeline)
    distill_pipeline(teacher, data, tmp_path, 2, TrainConfig(1, 4, 1e-3, amp="off"), views=1, progress=False)
    assert Pipeline.from_pretrained(tmp_path / "pipeline").sample(1).shape == (1, 1, *SIZE)
    other = Pipeline(teacher.vae, trained(UNET), teacher.scheduler)
    with pytest.raises(ValueError, match=r"its autoencoder makes latents \(4, 12, 8\), allowed are \(4, 8, 8\)"):
        distill_pipeline(other, data, tmp_path / "b", 2, TrainConfig(1, 4, 1e-3), progress=False)


def test_pictures_and_figures_of_an_evaluation(data: Path, pipeline: Path, tmp_path: Path) -> None:
    m = Material(Pipeline.from_pretrained(pipeline), data, tmp_path, Settings(n=8, steps=2))
    for name in ("trajectory", "latents", "spectra", "diversity", "findings"):
        assert "skipped" not in PARTS[name](m)
    assert "12 x 8 times" in " ".join(map(str, PARTS["findings"](m).values()))


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_exported_it_is_the_pipeline(pipeline: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from sbldm_fast.export import export
    from sbldm_fast.export.ort import ORTSampler

    made = Pipeline.from_pretrained(pipeline)
    export(made, tmp_path / "o", steps=2, target=target)
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["latent_shape"] == list(LATENT)
    if target == "ort":
        got = ORTSampler(tmp_path / "o")(2, seed=3)
        assert got.shape == (2, 1, *SIZE)
        assert np.abs(got - made.sample(2, seed=3, steps=2, mode="eager").numpy()).max() <= 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            preset("brain"),
            r"data: got slices of 16 x 24 pixels of 10 mm, allowed with this autoencoder are 160 x 224 pixels of 1 mm:"
            r" prepare --size 160x224 --spacing 1$",
        ),
        (preset("demo"), r"got slices of 16 x 24 pixels, allowed .* are 128 x 128 pixels: prepare --size 128x128$"),
        (
            SMALL._replace(vae=replace(SMALL.vae, spacing=9.5)),
            r"got slices of 16 x 24 pixels of 10 mm, allowed .* are 16 x 24 pixels of 9.5 mm:"
            r" prepare --size 16x24 --spacing 9.5$",
        ),
    ],
)
def test_slices_of_another_size_are_refused_before_anything_is_trained(
    data: Path, tmp_path: Path, changed: Preset, message: str
) -> None:
    config: Any = TrainConfig(1, 4, 1e-3)
    with pytest.raises(ValueError, match=message):
        train_pipeline(changed, data, tmp_path, vae=config, unet=config, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_other_slices_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got slices of 16 x 24 pixels of 10 mm, allowed .* are 128 x 128"):
        Material(Pipeline.from_pretrained("demo"), data, tmp_path, Settings(n=8))


def test_a_network_takes_any_size_that_its_stride_divides() -> None:
    model = trained(UNET)
    for size in ((8, 12), (6, 8), (2, 2)):
        made = FastSampler(model, scheduler(), shape=(4, *size), steps=2, mode="eager")(2, seed=0)
        assert made.shape == (2, 4, *size)
    message = "its size is {}, allowed are multiples of 2, the stride: 8 or 10 for 9"
    with pytest.raises(ValueError, match="x: " + message.format(r"\(9, 8\)")):
        model(torch.zeros(1, 4, 9, 8), 0)
    with pytest.raises(ValueError, match="shape: " + message.format(r"\(8, 9\)")):
        FastSampler(model, scheduler(), shape=(4, 8, 9))
    hooked = trained(UNET)
    hooked.register_forward_hook(lambda *_: None)  # called as a whole
    with pytest.raises(ValueError, match="x: " + message.format(9)):
        FastSampler(hooked, scheduler(), shape=(4, 9, 9), steps=1, mode="eager")(1)


def test_levels_attend_by_their_height() -> None:
    wide = UNet2D(replace(UNET, sample_size=(8, 16), attention_resolutions=(4,)))
    same = UNet2D(replace(UNET, sample_size=8, attention_resolutions=(4,)))
    assert wide.state_dict().keys() == same.state_dict().keys()
    none = UNet2D(replace(UNET, sample_size=(16, 8), attention_resolutions=(4,)))
    assert none.state_dict().keys() < same.state_dict().keys()


def test_what_measures_brains_sees_the_slices_of_the_pipeline() -> None:
    assert frame_of(preset("brain").vae).field == (224.0, 160.0)
    assert frame_of(preset("demo").vae).spacing == 1.71875, "of weights that do not say it"
    assert frame_of(Pipeline.from_pretrained("demo").vae.config).spacing == 1.71875
    with pytest.raises(ValueError, match="pipeline: its spacing is not known"):
        frame_of(SMALL.vae)
    with pytest.raises(ValueError, match="pipeline: its size is 28, allowed are multiples of 8, the stride: 24 or 32"):
        frame_of(replace(SMALL.vae, sample_size=28, spacing=8.0))
