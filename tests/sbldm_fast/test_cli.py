"""The command line as a user meets it: results, exit codes, one sentence for each error."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sbldm_fast.benchmarks.providers import Ours
from sbldm_fast.benchmarks.suite_kernels import OPS

from sbldm_fast.cli_train import train
from sbldm_fast.images import NOTICE
from sbldm_fast.sampling.modes import choose
from sbldm_fast.training import Objective, TrainConfig, train_pipeline


@pytest.fixture
def folder(fresh_demo: Path) -> Path:
    return fresh_demo


def test_prepare_train_sample_end_to_end(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbldm_fast.training.distill.JUDGED", 4)  # the student is judged by fewer images
    code, out, _ = run("prepare", "synthetic:3", "-o", tmp_path / "d", "--every", "10", "--json")
    assert code == 0
    assert json.loads(out)["subjects"] == 3
    whole = (
        "train",
        tmp_path / "r",
        "--data",
        tmp_path / "d",
        "--preset",
        "demo",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--vae-batch-size",
        "2",
        "--views",
        "1",
        "--amp",
        "off",
        "--json",
    )
    code, out, err = run(*whole)
    assert code == 0
    assert re.search(r"warning: the UNet met 4 of \d+ latents, less than one pass: its samples will be noise", err)
    done = json.loads(out)
    pipeline = done["pipeline"]
    code, out, _ = run(*whole, "--resume")
    assert code == 0
    assert json.loads(out)["training_seconds"] == done["training_seconds"] > 0, "what came before is told, too"
    again = ("train", tmp_path / "r", "--data", tmp_path / "d", "--preset", "demo", "--steps", "2")
    code, _, err = run(*again)
    assert code == 1
    assert "holds a run (checkpoint-vae-00000002); allowed is a new folder, or --resume to go on with it" in err
    code, _, err = run(*again, "--resume")
    assert code == 1
    assert "batch_size: got 32, but" in err
    code, out, err = run(
        "sample", pipeline, "-n", "3", "--steps", "2", "--batch-size", "2", "-o", tmp_path / "s", "--json"
    )
    assert code == 0
    assert json.loads(out)["notice"] == NOTICE
    assert "mode eager: " in err
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "grid.png",
        "sample.json",
    ]
    with Image.open(tmp_path / "s" / "000002.png") as image:
        assert image.size == (128, 128)
    small = ("--train-steps", "2", "--batch-size", "2", "--views", "1", "--amp", "off")
    of_two = ("distill", pipeline, "--data", tmp_path / "d", "-o", tmp_path / "two", "--steps", "2", *small)
    code, out, err = run(*of_two, "--json")
    assert code == 0
    done = json.loads(out)
    assert done["steps"] == 2
    assert ("warning: UniPC by 2 calls of the teacher is nearer" in err) == (done["rms"] >= done["unipc_rms"])
    code, _, err = run(*of_two)
    assert code == 1
    assert "holds a run (checkpoint-student2-00000002); allowed is a new folder, or --resume" in err
    code, _, err = run("sample", done["pipeline"], "-n", "1", "--steps", "3", "-o", tmp_path / "three")
    assert code == 1
    assert "steps: got 3 model calls, allowed for this network is 2, which it was distilled for" in err
    code, out, _ = run("sample", done["pipeline"], "-n", "1", "-o", tmp_path / "one", "--json")
    assert code == 0
    assert json.loads((tmp_path / "one" / "sample.json").read_text())["steps"] == 2
    shutil.copytree(done["pipeline"], Path(pipeline) / "student")
    shutil.rmtree(Path(pipeline) / "student" / "vae")
    code, _, _ = run("sample", pipeline, "--student", "-n", "1", "-o", tmp_path / "student")
    assert code == 0
    assert (tmp_path / "student" / "000000.png").read_bytes() == (tmp_path / "one" / "000000.png").read_bytes()
    code, _, err = run("sample", done["pipeline"], "--student", "-n", "1", "-o", tmp_path / "none")
    assert code == 1
    assert "student: got none in" in err


def test_doctor(run: Any) -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"]
    assert set(report["parity"]) == set(OPS)
    assert [(a["mode"], a["reason"]) for a in report["auto"]] == [
        choose(torch.device("cpu"), a["images"], a["steps"]) for a in report["auto"]
    ]
    for auto in report["auto"]:
        assert (
            f"{auto['images']} images of {auto['steps']} steps: {auto['mode']} ({auto['reason']})" in run("doctor")[1]
        )


def test_the_command_line_says_what_it_does_and_its_version(run: Any) -> None:
    assert run("--version") == (0, f"sbldm_fast {importlib.metadata.version('sbldm_fast')}\n", "")
    assert "Make training slices of brain MRI, train latent diffusion" in " ".join(run("--help")[1].split())


def test_verdicts_are_named_in_the_help(run: Any) -> None:
    words = run("bench", "--help")[1]
    assert all(verdict in words for verdict in ("FAST", "SLOW", "SAME", "AMBIGUOUS", "WRONG", "GONE", "NEW"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "demo"],
        ["evaluate", "demo", "--data", "d"],
        ["report", "r"],
        ["bench", "sampling", "--quick"],
        ["demo"],
        ["prepare", "synthetic:1"],
        ["sample", "demo"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_place_without_a_name_is_refused(
    arguments: list[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-o "$UNSET"` would be the current folder."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments, "-o", "")
    assert code == 2
    assert "'--out': got nothing or the current folder" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", ["9" * 30, "9" * 5000, "٣", "0", "-1", "1.5", "", "65537"])
def test_a_batch_that_no_graph_can_have_is_refused(batch: str, run: Any, tmp_path: Path) -> None:
    code, _, err = run("export", "demo", "-o", tmp_path / "o", "--batch", batch)
    assert code == 2
    assert "--batch: got" in err
    assert "allowed is 1 to 65536, or dynamic" in err
    if not batch.isascii():
        assert run("bench", "sampling", "--batch", batch)[0] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        ("--steps", "1001"),
        ("--steps", "9" * 30),
        ("--eta", "nan"),
        ("--eta", "inf"),
        ("--eta", "-1"),
        ("--eta", "1e400"),
    ],
    ids=" ".join,
)
def test_steps_and_eta_are_refused_before_a_graph_is_made(
    wrong: tuple[str, str], run: Any, folder: Path, tmp_path: Path
) -> None:
    code, out, err = run("export", folder, "-o", tmp_path / "o", *wrong)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"sbldm-fast: {wrong[0][2:]}: got ")
    assert "allowed is " in err
    assert not out
    assert not list(tmp_path.iterdir())


def _scaled(out: Any) -> Any:
    return 1.01 * out if isinstance(out, torch.Tensor) else tuple(1.01 * t for t in out)


def test_doctor_fails_when_an_op_is_wrong(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sbldm_fast.doctor as module

    for name in OPS:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, right=right, **k: _scaled(right(*a, **k)))
        code, out, _ = run("doctor")
        assert code == 1
        assert "WRONG" in out
        monkeypatch.setattr(module, name, right)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["doctor"],
        ["prepare"],
        ["train"],
        ["sample"],
        ["export"],
        ["bench"],
        ["report"],
        ["demo"],
    ],
)
def test_every_command_has_help_with_an_example(command: list[str], run: Any) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    if command:
        assert f"Example: sbldm-fast {' '.join(command)}" in " ".join(out.split())


def test_errors_are_one_sentence_and_exit_1(run: Any, folder: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    out = ("-o", tmp_path / "o")
    for arguments, message in (
        (("prepare", tmp_path / "nothing", *out), "nothing does not exist"),
        (("prepare", tmp_path / "empty", *out), "holds no NIfTI"),
        (("prepare", tmp_path / "bad.nii.gz", *out), "not a readable NIfTI file"),
        (("prepare", "synthetic:1", "--seed", 2**32, *out), "seed: got 4294967296, allowed is 0 to 4294967295"),
        (("prepare", "synthetic:1", "--subject", "(", *out), "subject: got '(', which is no regular expression"),
        (("train", tmp_path / "r", "--data", tmp_path / "empty", "--steps", "1"), "manifest.json does not exist"),
        (("train", tmp_path / "r", "--data", tmp_path, "--preset", "big"), "preset: got 'big'"),
        (("sample", tmp_path / "w.pt", *out), "no pickle is ever read"),
        (("sample", tmp_path / "empty", *out), "is not a pipeline folder"),
        (("sample", folder, "--steps", "0", *out), "steps: got 0, allowed is 1 to num_train_timesteps = 1000"),
        (("sample", folder, "--mode", "loop-graph", *out), "needs CUDA"),
        (("sample", folder, "--mode", "warp", *out), "mode: got 'warp', allowed are eager"),
        (("export", tmp_path / "empty", *out), "is not a pipeline folder"),
        (("export", folder, "--steps", "0", *out), "steps: got 0, allowed is 1 to num_train_timesteps = 1000"),
        (("export", folder, "-o", tmp_path / "w.pt"), "is a file, allowed is a folder"),
        (("export", folder, "-o", tmp_path), "which no export wrote; allowed is a new folder, or --force"),
        (("export", "--check", tmp_path / "empty"), "manifest.json does not exist"),
        (("bench", "sampling", "--steps", "0"), "steps, batch, rounds: got [0]"),
        (("bench", "--compare", tmp_path / "a", tmp_path / "b"), "a cannot be read: No such file"),
        (("report", tmp_path / "none"), "none cannot be read: No such file"),
        (("sample", folder, "-n", "1", "--steps", "1", "-o", tmp_path / "w.pt" / "x"), "Not a directory"),
    ):
        code, _, err = run(*arguments)
        last = err.strip().splitlines()[-1]
        assert code == 1, arguments
        assert last.startswith("sbldm-fast: "), err
        assert message in last
        assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["sample"],
        ["sample", "p", "-o", "x", "--format", "gif"],
        ["bench", "sampling", "--batch", "a"],
        ["bench"],
        ["bench", "gpus"],
        ["bench", "training", "--batch", "1,8"],
        ["bench", "solvers", "--op", "ddim_step"],
        ["export", "demo"],
        ["export"],
        ["export", "demo", "-o", "x", "--target", "coreml"],
        ["export", "demo", "-o", "x", "--batch", "two"],
    ],
)
def test_bad_usage_exits_2(arguments: list[str], run: Any) -> None:
    assert run(*arguments)[0] == 2


def test_options_of_train_are_named_as_the_fields_they_set() -> None:
    fields = {field.name for kind in (TrainConfig, Objective) for field in dataclasses.fields(kind)}
    options = {name.removeprefix("vae_") for name in inspect.signature(train).parameters} | {"compile"}
    arguments = set(inspect.signature(train_pipeline).parameters)
    assert fields - options == {"weight_decay", "clip_norm"}, "these have no option"
    assert options - fields - arguments == {"out", "prediction_type", "compiled", "as_json"}


def test_prepare_says_what_it_replaces_and_that_few_subjects_cannot_be_split(run: Any, tmp_path: Path) -> None:
    line = ("prepare", "synthetic:1", "--every", "20", "-o", tmp_path / "d")
    code, _, err = run(*line)
    assert code == 0
    assert "warning: 1 subject cannot be split, all slices are for training" in err
    assert "earlier prepare" not in err
    code, _, err = run(*line)
    assert code == 0
    assert f"{tmp_path / 'd'} holds the slices of an earlier prepare; they are replaced when this one ends" in err


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", "-1"), ("--every", "0"), ("--workers", "0"), ("--volume", "-1")]
)
def test_bounds_of_prepare_name_the_option(option: str, value: str, run: Any, tmp_path: Path) -> None:
    code, _, err = run("prepare", "synthetic:1", option, value, "-o", tmp_path / "o")
    assert code == 2
    assert option in err


def test_prepare_says_who_has_no_covariates(run: Any, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("id,age\nb,20\n")
    code, out, err = run("prepare", tmp_path / "a.png", "--covariates", tmp_path / "t.csv", "-o", tmp_path / "o")
    assert code == 0
    assert f"without covariates a: {tmp_path / 't.csv'} has no row for it; its slices are kept" in err
    assert "skipped" not in err
    assert out.splitlines()[-1].startswith("1 slice of 1 subject, 0 skipped, 1 without covariates; look at ")


def test_slice_split_warns(run: Any, tmp_path: Path) -> None:
    code, _, err = run("prepare", "synthetic:1", "-o", tmp_path / "d", "--split", "slice", "--every", "10")
    assert code == 0
    assert "warning: --split slice puts slices of one subject into train and test" in err


def test_bench_writes_rows_and_compare_judges_them(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("bench", "sampling", "--quick", "--preset", "demo", "--steps", "2", "--rounds", "6")
    assert run(*quick, "-o", "a.jsonl")[0] == 0
    real = Ours.sampler

    def slowed(*arguments: Any) -> Any:
        sample = real(*arguments)

        def slow() -> torch.Tensor:
            time.sleep(0.3)
            return sample()  # type: ignore[no-any-return]  # an Output says Any

        return slow

    monkeypatch.setattr(Ours, "sampler", slowed)
    code, out, err = run(*quick)
    assert code == 0
    assert "| FastSampler eager float32 |" in out
    (found,) = Path("results").rglob("*.jsonl")
    assert f"rows appended to {found}" in err
    code, out, _ = run("bench", "--compare", "a.jsonl", found, "--json")
    assert code == 1
    verdicts = {v["provider"]: v["verdict"] for v in json.loads(out)}
    assert verdicts["FastSampler eager float32"] == verdicts["diffusers under FastSampler eager"] == "SLOW"
    code, out, _ = run("bench", "--compare", "a.jsonl", "a.jsonl")
    assert "| SAME | sampling demo 1 2 | reference | 1.000 | the same samples |" in out
    assert code == 0
    Path("a.jsonl").write_bytes(Path("a.jsonl").read_bytes()[:-20])
    code, _, err = run("bench", "--compare", "a.jsonl", found)
    assert code == 1
    assert "is not a row: cut off or damaged, left out" in err


def test_a_provider_that_fails_is_in_the_exit_code(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Ours, "sampler", fails)
    code, out, err = run(
        "bench", "sampling", "--quick", "--preset", "demo", "--steps", "1", "--rounds", "1", "-o", tmp_path / "r.jsonl"
    )
    assert code == 1
    assert "| reference |" in out
    assert "FAILED FastSampler eager float32: OutOfMemoryError: CUDA out of memory" in err


def test_streams_that_are_closed_or_cannot_show_a_name_are_no_reason_to_end(tmp_path: Path) -> None:
    from .data.test_volumes import head, save

    scan, out = tmp_path / "\u00e9.nii.gz", tmp_path / "\u8133\u00e9"
    save(head(), scan)
    line = [sys.executable, "-m", "sbldm_fast", "prepare", str(scan), "-o", str(out)]
    for how in ("2>&-", ">&- 2>&-", ""):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(["sh", "-c", f'"$@" {how}', "sh", *line], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (out / "manifest.json").is_file()
