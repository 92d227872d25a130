"""Sampling as a job: run again, split over processes, interrupted, in every format."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbldm_fast import Pipeline
from sbldm_fast.images import NOTICE
from sbldm_fast.sampling.job import Settings, sample_to_folder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def pipeline(fresh_demo: Path) -> Path:
    return fresh_demo


def make(pipeline: Path, out: Path, n: int = 5, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "seed": 1,
        "steps": 2,
        "mode": "auto",
        "eta": 0.0,
        "dtype": None,
        "batch_size": 2,
        "format": "png",
    } | changes
    return sample_to_folder(str(pipeline), out, n, Settings(**settings), progress=False)


def images(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("0*.png")}


def command(pipeline: Path, out: Path, n: int, *more: str, processes: int = 1) -> list[str]:
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    settings = ["-n", str(n), "--steps", "2", "--batch-size", "2", "--seed", "1", "-o", str(out)]
    return [sys.executable, "-m", *several, "sbldm_fast", "sample", str(pipeline), *settings, *more]


def test_two_processes_make_the_bytes_of_one(pipeline: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        started = command(pipeline, out, 7, "--json", processes=processes)
        done = subprocess.run(started, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said["made"], said["kept"]) == (7, 0)
        assert {p.name for p in out.iterdir()} == {*(f"{i:06d}.png" for i in range(7)), "grid.png", "sample.json"}
    assert images(tmp_path / "1") == images(tmp_path / "2")


def test_no_process_is_left_without_work(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "barrier", "destroy_process_group", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # rank 0 puts together what both have made
        monkeypatch.setenv("RANK", rank)
        make(pipeline, tmp_path, 4, batch_size=16)
        assert len(images(tmp_path)) == (2 if rank == "1" else 4)


def test_what_is_missing_is_made_and_nothing_else(pipeline: Path, tmp_path: Path) -> None:
    make(pipeline, tmp_path, 6)
    whole = images(tmp_path)
    for lost in (1, 2, 5):
        (tmp_path / f"{lost:06d}.png").unlink()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("0*.png")}
    again = make(pipeline, tmp_path, 6)
    assert (again["made"], again["kept"]) == (3, 3)
    assert images(tmp_path) == whole, "an image in another place of a batch of the same size is the same to the byte"
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert make(pipeline, tmp_path, 6)["made"] == 0
    assert make(pipeline, tmp_path, 9)["made"] == 3, "more of the same"


def test_a_folder_without_images_takes_new_settings(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed: got"):
        make(pipeline, tmp_path, 2, seed=2**63)
    assert make(pipeline, tmp_path, 2, seed=3)["made"] == 2

    assert {p.name for p in tmp_path.iterdir()} == {"000000.png", "000001.png", "grid.png", "sample.json"}
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="seed: got"):
        make(pipeline, other, 2, seed=2**63)
    assert not other.exists(), "what is refused leaves nothing"


@pytest.mark.parametrize("name", ["grid.png", "images.npy", "images.nii.gz", "000003.png", "parts/000000.npy"])
@pytest.mark.parametrize("form", ["png", "npy"])
def test_files_that_no_run_made_are_never_written_over(name: str, form: str, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which no run of this command made; allowed is another folder"):
        make(pipeline, tmp_path, 1, format=form)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "sample.json").exists()


def test_a_finished_array_is_not_replaced_by_one_of_other_settings(pipeline: Path, tmp_path: Path) -> None:
    make(pipeline, tmp_path, 2, format="npy")
    before = (tmp_path / "images.npy").read_bytes()
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(ValueError, match="holds images of seed 1, this run's is 2"):
        make(pipeline, tmp_path, 2, format="npy", seed=2)
    assert (tmp_path / "images.npy").read_bytes() == before
    assert make(pipeline, tmp_path, 2, format="npy")["made"] == 2
    assert (tmp_path / "images.npy").read_bytes() == before
    (tmp_path / "grid.png").write_text("mine")
    with pytest.raises(ValueError, match=r"holds grid\.png, which no run of format npy makes"):
        make(pipeline, tmp_path, 2, format="npy")


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "3"), ("RANK", "-1"), ("RANK", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "1")]
)
def test_what_torchrun_would_never_set_is_named(
    name: str, value: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: got '{value}' in the environment"):
        make(pipeline, tmp_path / "o", 1)
    assert not (tmp_path / "o").exists()


def test_two_runs_of_other_settings_at_once_do_not_mix(pipeline: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(pipeline, tmp_path / "o", 400), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "o" / "sample.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        with pytest.raises(ValueError, match=r"(is where images of|holds images of) seed 1"):
            make(pipeline, tmp_path / "o", 1, seed=2)
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / "o" / "sample.json").read_text())["seed"] == 1


def test_few_open_files_are_enough(pipeline: Path, tmp_path: Path) -> None:
    make(pipeline, tmp_path, 40, steps=1, batch_size=40)
    (tmp_path / "grid.png").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        assert make(pipeline, tmp_path, 40, steps=1, batch_size=40)["made"] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_damaged_part_is_named(content: bytes | None, pipeline: Path, tmp_path: Path) -> None:
    make(pipeline, tmp_path, 2, format="npy")
    part = tmp_path / "parts" / "000001.npy"
    part.write_bytes(part.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"parts/000001\.npy is damaged; without it the same command makes it again"):
        make(pipeline, tmp_path, 2, format="npy")
    part.unlink()
    assert make(pipeline, tmp_path, 2, format="npy")["made"] == 1


@pytest.mark.parametrize("form", ["png", "npy"])
def test_a_full_disk_is_called_so(form: str, pipeline: Path, tmp_path: Path) -> None:
    arguments = [*command(pipeline, tmp_path / "o", 1), "--format", form]

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sbldm-fast: File too large")
    assert not [p for p in (tmp_path / "o").rglob("*") if p.is_file() and p.name != "sample.json"]


def test_another_schedule_is_another_pipeline(pipeline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("cosine_ramp", "linear"))
    make(pipeline, tmp_path / "o", 1)
    with pytest.raises(ValueError, match="holds images of pipeline"):
        make(other, tmp_path / "o", 1)


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_is_finished_survives(pipeline: Path, tmp_path: Path, sent: int) -> None:
    arguments = command(pipeline, tmp_path, 4000, "--mode", "eager")
    # who runs the tests in the background has SIGINT ignored, and every process that is started inherits it
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("0*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    there = images(tmp_path)
    assert 4 <= len(there) < 4000
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; what is finished stays in" in err
    reference = tmp_path / "reference"
    make(pipeline, reference, len(there), mode="eager")
    assert there == images(reference)


def test_arrays_and_stacks(pipeline: Path, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel reads the stack that this test writes")
    expected = Pipeline.from_pretrained(pipeline).sample(3, seed=1, steps=2, batch_size=2)[:, 0].numpy()
    for form, name in (("npy", "images.npy"), ("nifti", "images.nii.gz")):
        make(pipeline, tmp_path / form, 3, format=form)
        assert (tmp_path / form / name).is_file()
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "images.npy"), expected)
    stack = nibabel.load(tmp_path / "nifti" / "images.nii.gz")
    assert stack.shape == (128, 128, 3)
    assert nibabel.aff2axcodes(stack.affine) == ("R", "A", "S")
    assert bytes(stack.header["descrip"]).decode().startswith(NOTICE)
    # the first row of a picture is the front of the head, the last along the second axis
    np.testing.assert_allclose(stack.get_fdata()[:, -1, 1], expected[1, 0], rtol=1e-6)


def test_bad_input_is_named(pipeline: Path, tmp_path: Path) -> None:
    make(pipeline, tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000000.png").write_bytes(b"")
    for call, message in (
        (lambda: make(pipeline, tmp_path / "a", 2, seed=2), "holds images of seed 1, this run's is 2"),
        (lambda: make(pipeline, tmp_path / "a", 2, steps=3), "holds images of steps 2, this run's is 3"),
        (lambda: make(Path("demo"), tmp_path / "a", 2), "holds images of pipeline"),
        (lambda: make(pipeline, tmp_path / "b", 2), "holds 000000.png, which no run of this command made"),
        (lambda: make(pipeline, tmp_path / "c", 2, format="gif"), "format: got 'gif', allowed are png, npy, nifti"),
        (
            lambda: make(pipeline, tmp_path / "c", 2, scheduler="fast"),
            "scheduler: got 'fast', allowed are ddim, ddpm, dpm, unipc",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "c").exists(), "nothing is written before the settings are known to be good"
