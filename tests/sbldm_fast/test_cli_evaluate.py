"""What a user types and reads of evaluate and ablate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sbldm_fast.data import prepare
from sbldm_fast.evaluation import ablation
from sbldm_fast.evaluation.material import Settings

pytest.importorskip("skimage", reason="the extra eval is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:4"], folder, every=12, progress=False)
    return folder


def test_evaluate_prints_its_table_and_where_the_page_is(
    data: Path, fresh_demo: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "e"
    few = ("-n", "8", "--steps", "2", "--only", "sharpness")
    code, said, _ = run("evaluate", fresh_demo, "--data", data, "-o", out, *few)
    assert code == 0
    assert "| sharpness | laplacian_variance of real |" in said
    assert said.splitlines()[-1] == f"sharpness: see {out / 'evaluation.html'}"
    code, said, _ = run("evaluate", fresh_demo, "--data", data, "-o", out, *few, "--json")
    assert code == 0
    assert json.loads(said) == json.loads((out / "evaluation.json").read_text())


def test_evaluate_finds_the_log_of_the_run(
    data: Path, fresh_demo: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fresh_demo, tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "log.jsonl").write_text('{"stage": "unet", "step": 1, "loss": 1.0}\n')
    few = ("-n", "8", "--only", "curves", "--json")
    code, said, _ = run("evaluate", tmp_path / "run" / "pipeline", "--data", data, "-o", tmp_path / "e", *few)
    assert code == 0
    assert json.loads(said)["parts"]["curves"]["pictures"] == ["curves.svg"]


def test_ablate_prints_its_tables(data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget that was typed; the runs themselves are tested apart."""
    seen: list[Any] = []

    def note(preset: Any, of: Path, out: Path, budget: Any, **how: Any) -> list[Any]:
        seen.append((of, budget, how))
        out.mkdir()
        (out / "tables.md").write_text("| tables |")
        return []

    monkeypatch.setattr(ablation, "ablate", note)
    more = ("--table", "4.5", "--size", "32", "--narrow", "4", "--steps", "9", "--vae-steps", "3", "--batch-size", "5")
    code, said, _ = run("ablate", tmp_path / "a", "--data", data, *more, "-n", "10", "--seeds", "4")
    assert (code, said) == (0, "| tables |\n")
    ((of, budget, how),) = seen
    assert of == data
    assert (budget.side, budget.narrow, budget.steps, budget.vae_steps, budget.batch_size) == (32, 4, 9, 3, 5)
    assert (budget.samples, budget.preset, how["tables"], how["seeds"]) == (10, "demo", ["4.5"], 4)


BAD = [
    (("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "--guidance", "2"), "allowed with --recovery"),
    (
        ("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "--recovery", "9", "--only", "curves"),
        "allowed without --only",
    ),
    (
        ("evaluate", "{p}", "--data", "{d}", "-o", "{d}/manifest.json", "-n", "8"),
        "manifest.json is a file, allowed is a",
    ),
    (("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "-n", "8", "--steps", "0"), "steps: got 0"),
    (
        ("ablate", "{out}", "--data", "{d}", "--narrow", "8", "-n", "8"),
        "narrow: got 8, allowed is what leaves of the widths",
    ),
    (("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "--only", "fid"), "only: got 'fid', allowed are curves"),
    (
        ("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "-n", "7"),
        "for '-n': Input should be greater than or equal to 8",
    ),
    (("evaluate", "{p}", "--data", "{p}", "-o", "{out}"), "manifest.json does not exist"),
    (("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "-n", "8", "--log", "{out}/no"), "is no training log"),
    (("evaluate", "{p}", "--data", "{d}", "-o", "{out}", "-n", "8", "--extractor", "../x"), "extractor: got '../x'"),
    (("ablate", "{out}", "--data", "{out}/nowhere"), "nowhere/manifest.json does not exist"),
    (("ablate", "{out}", "--data", "{d}", "--table", "5"), "tables: got '5', allowed are 4.4.1"),
    (("ablate", "{out}", "--data", "{d}", "--preset", "covariates"), "preset: got a conditional one"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_input_is_one_sentence(
    data: Path, fresh_demo: Path, tmp_path: Path, run: Any, line: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out"
    code, _, err = run(*(word.format(p=fresh_demo, d=data, out=out) for word in line))
    assert code in (1, 2)
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not out.exists(), "nothing is half made"


def test_the_defaults_of_the_command_are_those_of_the_function(
    fresh_demo: Path, data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(pipeline: Any, of: Any, out: Any, settings: Any, **_: Any) -> Any:
        seen.append(settings)
        return {"settings": {"n": 1}, "parts": {}}

    monkeypatch.setattr("sbldm_fast.evaluation.report.evaluate_pipeline", note)
    assert run("evaluate", fresh_demo, "--data", data, "-o", tmp_path / "e")[0] == 0
    assert seen == [Settings()]
