"""`sbldm-fast export` as a user meets it, and the lines of docs/export.md that need ONNX Runtime and NumPy alone."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from sbldm_fast import Pipeline
from sbldm_fast.cli import main

ROOT = Path(__file__).parents[2]
Exported = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    def call(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["sbldm-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return call


def test_check_says_what_it_found(run: Any, exported: Exported) -> None:
    folder = exported(target="ort")
    code, out, err = run("export", "--check", folder)
    assert (code, err) == (0, "")
    assert re.search(r"unet.onnx: bytes \d+, operators \d+, norms (\d+), fused_norms \1\n", out)
    assert "error against example.npz" in out
    assert out.splitlines()[-2:] == [
        "not compared with PyTorch: unet, vae_encoder, vae_decoder; to compare them: "
        f"sbldm-fast export PIPELINE --check {folder}",
        f"PASSED: {folder}",
    ]
    code, out, _ = run("export", "--check", folder, "--json")
    assert code == 0
    assert json.loads(out)["failures"] == []


def test_check_fails_with_a_line_for_each_fault(run: Any, exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    folder.mkdir()
    for file in exported(target="ort").iterdir():
        (folder / file.name).write_bytes(file.read_bytes() + (b"\0" if file.suffix == ".onnx" else b""))
    code, out, err = run("export", "--check", folder)
    assert code == 1
    assert out.splitlines()[-1] == f"FAILED: {folder}, 5 faults"
    assert len(err.splitlines()) == 5
    assert all(line.startswith("FAILED ") and "sha256" in line for line in err.splitlines())


def test_with_the_pipeline_every_graph_is_compared(
    run: Any, exported: Exported, pipeline: Pipeline, tmp_path: Path
) -> None:
    pipeline.save(tmp_path / "p")
    folder = exported(target="ort")
    code, out, _ = run("export", tmp_path / "p", "--check", folder)
    assert code == 0
    assert out.splitlines()[-1] == f"PASSED: {folder}"


def test_an_export_that_is_ended_leaves_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "p")
    command = [sys.executable, "-m", "sbldm_fast", "export", "p", "-o", "o", "--steps", "3"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".o.*.part")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_diffusers_folder_is_exported(run: Any, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "p")
    code, out, _ = run("export", tmp_path / "p", "-o", tmp_path / "o", "--steps", "3", "--license", "CC0-1.0", "--json")
    assert code == 0
    assert json.loads(out)["license"] == "CC0-1.0"
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "example.npz",
        "manifest.json",
        "sampler.onnx",
        "step.onnx",
        "unet.onnx",
    ]
    assert run("export", "--check", tmp_path / "o")[0] == 0


def test_the_lines_of_the_page_run_without_torch(exported: Exported, pipeline: Pipeline, tmp_path: Path) -> None:
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
        if "onnxruntime" in block
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # what pip would put there, already downloaded
    for package in ("onnxruntime", "numpy", "flatbuffers", "protobuf", "packaging"):
        for file in importlib.metadata.files(package) or []:
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(Path(str(importlib.metadata.distribution(package).locate_file(top))))
    (tmp_path / "onnx").symlink_to(exported(target="ort"))
    python = tmp_path / "venv" / "bin" / "python"
    assert (
        subprocess.run([python, "-c", "import torch"], capture_output=True, check=False, cwd=tmp_path).returncode == 1
    )
    program = code + "\nnp.save('images.npy', images)\n"
    done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-4
    images = np.load(tmp_path / "images.npy")
    assert np.abs(images - pipeline.sample(4, seed=0, steps=4).numpy()).max() <= 1e-4
