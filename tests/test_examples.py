"""Every example runs, at a small size, as it is typed."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sbldm_fast import AutoencoderKL, Pipeline, SchedulerConfig, UNet2D, UNetConfig, VAEConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
TOLERANCE = 1e-4  # relative: float32 after all steps


Run = Callable[..., str]


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in an empty folder, as `python examples/NAME ARGUMENTS` does; what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def found_error(text: str) -> float:
    """The error that an example prints last."""
    return float(text.split()[-1])


@pytest.fixture
def small_pipeline(tmp_path: Path) -> Path:
    """A pipeline folder of small models."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    vae = VAEConfig(latent_channels=4, **small)
    unet = UNetConfig(in_channels=4, out_channels=4, attention_resolutions=(), time_embed_dim=32, **small)
    Pipeline(AutoencoderKL(vae), UNet2D(unet), SchedulerConfig()).save(tmp_path / "small")
    return tmp_path / "small"


def test_sample(tmp_path: Path) -> None:
    """In a process of its own, as it is typed."""
    command = [sys.executable, str(EXAMPLES / "sample.py"), "--ages", "50", "--positions", "0", "30", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 images in ")
    assert Image.open(tmp_path / "samples.png").size == (2 * 128, 3 * 128 + 14)


def test_drop_in_diffusers(run_example: Run) -> None:
    pytest.importorskip("diffusers")
    assert found_error(run_example("drop_in_diffusers.py", "-n", "2", "--steps", "3")) < TOLERANCE


def test_drop_in_monai(run_example: Run) -> None:
    pytest.importorskip("monai")
    assert found_error(run_example("drop_in_monai.py", "-n", "2", "--steps", "3")) < TOLERANCE


def test_export_and_run(run_example: Run, tmp_path: Path, small_pipeline: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = run_example("export_and_run.py", str(small_pipeline), "-n", "2", "--steps", "3")
    assert len(re.findall(r"^\w+\.onnx: error ", out, re.M)) == 5
    assert found_error(out) < TOLERANCE
    assert (tmp_path / "onnx.png").is_file()


def test_train_on_your_scans_and_again(run_example: Run, tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    arguments = ("synthetic:3", "--steps", "1", "--batch-size", "2", "-n", "1")
    assert "trained on " in run_example("train_on_your_scans.py", *arguments)
    assert (tmp_path / "run" / "samples.png").is_file()
    assert "trained on " in run_example("train_on_your_scans.py", *arguments), "goes on"


def test_every_example_is_short_and_tested() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f'"{path.name}"' in tests, path.name
