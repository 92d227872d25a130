"""Training on a small population: it learns, resumes to the bit, and stops where it must."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sbldm_fast import Pipeline, preset
from sbldm_fast.models.presets import Preset
from sbldm_fast.training import TrainConfig, train_pipeline

SMALL = Preset(
    replace(preset("demo").vae, block_out_channels=(8, 8, 8, 8)),
    replace(
        preset("demo").unet,
        block_out_channels=(16, 16),
        attention_head_dim=8,
        layers_per_block=1,
        time_embed_dim=32,
        dropout=0.1,
    ),
    preset("demo").scheduler,
)


def config(steps: int, **values: Any) -> TrainConfig:
    return TrainConfig(**({"steps": steps, "batch_size": 4, "lr": 1e-3, "save_every": 2, "amp": "off"} | values))


def weights(folder: Path) -> dict[str, Tensor]:
    pipe = Pipeline.from_pretrained(folder / "pipeline")
    return {f"{n}.{k}": v for n, m in (("vae", pipe.vae), ("unet", pipe.unet)) for k, v in m.state_dict().items()}


def test_both_stages_end_in_a_pipeline_that_samples(data: Path, tmp_path: Path, device: torch.device) -> None:
    stages: dict[str, Any] = {"vae": config(3), "unet": config(3, ema_decay=0.9)}
    result = train_pipeline(SMALL, data, tmp_path, **stages, views=2, device=device, progress=False)
    assert result["slices"] > 4
    assert result["scaling_factor"] > 0
    assert 0 < result["val_l1"] < 2
    pipe = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vae.config.scaling_factor == result["scaling_factor"]
    assert pipe.sample(1, steps=2).shape == (1, 1, 128, 128)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == [("vae", 3), ("unet", 3)]
    assert [(row["stage"], row["step"]) for row in rows if "val" in row] == [
        (n, i) for n in ("vae", "unet") for i in (2, 3)
    ]
    assert all(math.isfinite(row.get("loss", row.get("val"))) for row in rows)
    for name in ("vae", "unet"):
        best = min((row["val"], row["step"]) for row in rows if row["stage"] == name and "val" in row)
        assert result["kept_steps"][name] == best[1]
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-.*\); allowed is a new folder, or --resume"):
        train_pipeline(SMALL, data, tmp_path, vae=config(3), unet=config(3, ema_decay=0.9), progress=False)


RUN = """
import pathlib, sys
from sbldm_fast.training import Objective, TrainConfig, Stopped, torchrun, train_pipeline
from sbldm_fast.models.presets import *
SMALL = CONFIGURATIONS
def stage(**values):
    return TrainConfig(steps=30, batch_size=4, lr=1e-3, save_every=4, amp="off", **values)
with torchrun() as device:
    try:
        train_pipeline(
            SMALL, sys.argv[1], sys.argv[2], vae=stage(), unet=stage(ema_decay=0.9), device=device, views=2,
            resume=True, progress=False,
            objective=Objective(low_weight=2.0, snr_gamma=5.0, cutmix_prob=float(sys.argv[3])),
        )
    except (Stopped, OSError) as error:
        sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that the tests kill: this file's small models, trained for 30 steps of each stage."""
    folder = tmp_path_factory.mktemp("script")
    # configurations print as what makes them
    (folder / "run.py").write_text(RUN.replace("CONFIGURATIONS", repr(SMALL)))
    return folder / "run.py"


def start(script: Path, data: Path, folder: Path, cutmix: float = 0.25, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(data), str(folder), str(cutmix)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_per_s")} for row in rows]


@pytest.fixture(scope="module")
def whole(script: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(script, data, folder).wait() == 0
    assert len(curve(folder)) == 2 * (8 + 1)
    return folder


def same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    expected, got = weights(a), weights(b)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.001)


def test_killed_at_any_point_it_goes_on_to_the_same_end(script: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    # KILLS=20 for the long form
    rng = random.Random(os.environ.get("KILLS", ""))
    for _ in range(int(os.environ.get("KILLS", "2"))):
        process = start(script, data, tmp_path)
        had = set(tmp_path.iterdir())
        while process.poll() is None and set(tmp_path.iterdir()) == had:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
    (tmp_path / ".best-vae.7.part").mkdir(exist_ok=True)
    if (tmp_path / "best-vae").exists():  # a kill between two renames
        (tmp_path / "best-vae").rename(tmp_path / ".best-vae.7.old")
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".part", ".old"))], "what kills left is cleared"


def test_a_signal_saves_and_ends(script: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    process = start(script, data, tmp_path)
    wait_for(tmp_path, "checkpoint-unet-00000004", process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "unet: stopped by SIGTERM at step" in error
    at = int(error.split("at step ")[1].split(";")[0])
    assert (tmp_path / f"checkpoint-unet-{at:08d}").is_dir()
    assert at < 30
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)


def test_a_full_disk_stops_and_names_the_last_good_checkpoint(
    script: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(script, data, tmp_path)
    wait_for(tmp_path, "checkpoint-unet-00000008", process)
    process.kill()
    process.wait()
    good = sorted(tmp_path.glob("checkpoint-unet-*"))[-1]

    def full() -> None:  # a write beyond 60 kB fails, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = start(script, data, tmp_path, preexec_fn=full)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "File too large" in error
    assert f"last good checkpoint: {good}" in error
    assert sorted(tmp_path.glob("checkpoint-unet-*"))[-1] == good
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)


def test_two_processes_have_the_curve_of_one(script: Path, data: Path, tmp_path: Path) -> None:
    """To rounding: dropout and CutMix, which look at one process's part, are off."""
    without = tmp_path / "run.py"
    without.write_text(script.read_text().replace("dropout=0.1", "dropout=0.0").replace("steps=30", "steps=12"))
    assert start(without, data, tmp_path / "one", 0.0).wait() == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(without),
        str(data),
    ]
    subprocess.run([*command, str(tmp_path / "two"), "0"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in two]
    assert len(one) == 2 * (3 + 1)
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "val"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-4), (a, b)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_trains(kind: str, data: Path, tmp_path: Path) -> None:
    preset = SMALL._replace(scheduler=replace(SMALL.scheduler, prediction_type=kind))
    train_pipeline(preset, data, tmp_path, vae=config(1), unet=config(2), views=1, progress=False)
    assert Pipeline.from_pretrained(tmp_path / "pipeline").scheduler.config.prediction_type == kind


def test_a_run_does_not_go_on_with_other_slices(data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "vae": config(2),
        "unet": config(2),
        "views": 1,
        "progress": False,
        "resume": True,
    }
    shutil.copytree(data, tmp_path / "data")
    train_pipeline(SMALL, tmp_path / "data", tmp_path / "run", **arguments)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for row in manifest["slices"]:
        row["split"] = {"val": "test", "test": "val"}.get(row["split"], row["split"])
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"data: got .*, but .*checkpoint-vae-00000002 was made with"):
        train_pipeline(SMALL, tmp_path / "data", tmp_path / "run", **arguments)
