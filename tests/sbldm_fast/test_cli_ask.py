"""The options that a pipeline brings to the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .small import AGE, ASKED, MODALITY, UNET, small_pipeline


@pytest.fixture(autouse=True)
def pipelines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder that commands run in has the pipelines `asked`, of covariates, and `plain`."""
    small_pipeline(ASKED).save(tmp_path / "asked")
    small_pipeline(UNET).save(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)


def test_help_of_a_pipeline_lists_what_it_can_be_asked_for(run: Any) -> None:
    code, out, _ = run("sample", "asked", "--help")
    assert code == 0
    assert "--age" in out
    assert "20 to 80 years; at the scan" in out
    assert "T1 or T2 or FLAIR" in out
    assert "it is unconditional" in run("sample", "plain", "--help")[1]
    assert "asked for" not in run("sample", "--help")[1].split("Options")[1]


def test_a_covariate_that_bears_the_name_of_an_option_is_a_column_alone(run: Any) -> None:
    small_pipeline(replace(ASKED, covariates=(replace(AGE, name="steps"), MODALITY))).save("odd")
    helped = " ".join(run("sample", "odd", "--help")[1].split())
    assert "a column of --table alone, --steps is an option of every pipeline" in helped
    Path("q.csv").write_text("steps\n30\n")
    code, _, err = run("sample", "odd", "--table", "q.csv", "--steps", "2", "-o", "a", "--json")
    assert code == 0, err
    record = json.loads(Path("a/sample.json").read_text())
    assert (record["cond"], record["steps"]) == ({"steps": "30"}, 2)


def test_options_of_the_pipeline_reach_every_image(run: Any) -> None:
    quick = ("--steps", "2", "--scheduler", "unipc", "--json")
    code, out, err = run(
        "sample", "asked", "--age", "30", "--modality=T2", "-n", "2", "-o", "a", "--guidance", "2", *quick
    )
    assert (code, json.loads(out)["made"]) == (0, 2), err
    record = json.loads(Path("a/sample.json").read_text())
    assert (record["cond"], record["guidance"]) == ({"age": 30.0, "modality": "T2"}, 2.0)
    run("sample", "asked", "-n", "2", "-o", "b", *quick)
    assert "cond" not in json.loads(Path("b/sample.json").read_text())
    assert Path("a/000000.png").read_bytes() != Path("b/000000.png").read_bytes()


def test_a_table_says_how_many(run: Any) -> None:
    Path("q.csv").write_text("age\n30\n40\n50\n")
    code, out, err = run(
        "sample", "asked", "--table", "q.csv", "-o", "a", "--steps", "2", "--scheduler", "unipc", "--json"
    )
    assert (code, json.loads(out)["made"]) == (0, 3)
    assert "q.csv has no column modality: unknown for every image" in err
    code, _, err = run("sample", "asked", "--table", "q.csv", "--age", "30", "-o", "b")
    assert (code, "which is named as well" in err) == (1, True)


def test_a_population_is_drawn_or_read_and_is_its_own_table(run: Any) -> None:
    pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    code, _, err = run("population", "asked", "-n", "3", "--modality", "T1", "-o", "a", "--steps", "2")
    assert code == 0, err
    text = Path("a/participants.tsv").read_text()
    assert text.count("\tT1\n") == 3
    code, _, err = run("population", "asked", "--table", "a/participants.tsv", "-o", "b", "--steps", "2")
    assert code == 0, err
    assert Path("b/participants.tsv").read_text() == text
    for image in Path("a").rglob("*.nii.gz"):
        assert (Path("b") / image.relative_to("a")).read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("asked", "--weight", "3"), 2, "got '--weight', asked can be asked for --age, --modality"),
        (("plain", "--age", "3"), 2, "plain can be asked for none: it is unconditional"),
        (("asked", "--age"), 2, "got nothing, allowed is 20 to 80 years"),
        (("asked", "--age", "old"), 2, "got 'old', allowed is 20 to 80 years"),
        (("asked", "--age", "30", "--age", "31"), 2, "given twice"),
        (("asked", "--age", "nan"), 1, "got nan, allowed is 20 to 80 years"),
        (("asked", "--age", "90"), 1, "got 90, the model was trained on 20 to 80 years"),
        (("asked", "--modality", "PD"), 1, "got 'PD', allowed is T1 or T2 or FLAIR"),
        (("asked", "--guidance", "2"), 2, "--guidance: got a value, allowed where the pipeline is asked"),
        (
            ("asked", "--age", "30", "--guidance-interval", "0", "9"),
            2,
            "--guidance-interval: got a value, allowed with",
        ),
        (("nowhere", "--age", "2"), 1, "nowhere is not a pipeline folder"),
        (("--age", "30", "asked"), 2, "got '--age', allowed is a pipeline before what it is asked for"),
    ],
)
def test_what_cannot_be_asked_is_named(run: Any, words: tuple[str, ...], code: int, said: str) -> None:
    found = run("sample", *words, "-o", "out")
    assert found[0] == code
    assert said in " ".join(found[2].split())
    assert not Path("out").exists()


def test_extrapolation_is_asked_for_and_warned_of(run: Any) -> None:
    code, _, err = run("sample", "asked", "--age", "90", "--extrapolate", "-n", "1", "--steps", "2", "-o", "out")
    assert code == 0
    assert "90 lies outside 20 to 80 years" in err
