"""Volumes on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbldm_fast import Pipeline
from sbldm_fast.images import NOTICE
from sbldm_fast.models.covariates import Covariate

from .small import AGE, ASKED, MODALITY, UNET, small_pipeline

nib = pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
POSITION = Covariate("position", low=-10.0, high=10.0, unit="mm")
QUICK = ("--steps", "2", "--json")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines `brain`, which knows position, and `plain`."""
    folder = tmp_path_factory.mktemp("pipelines")
    small_pipeline(replace(ASKED, covariates=(AGE, MODALITY, POSITION))).save(folder / "brain")
    small_pipeline(UNET).save(folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipelines: Path) -> list[dict[str, Any]]:
    """The folder that commands run in has the two pipelines; what volumes were asked for."""
    for name in ("brain", "plain"):
        (tmp_path / name).symlink_to(pipelines / name)
    monkeypatch.chdir(tmp_path)
    made: list[dict[str, Any]] = []

    def sample_volume(self: Any, **how: Any) -> Tensor:
        made.append(how)
        generator = torch.Generator().manual_seed(how["seed"])
        return torch.rand(len(how["positions"]), 1, 16, 16, generator=generator)

    monkeypatch.setattr(Pipeline, "sample_volume", sample_volume)
    return made


def test_a_volume_is_a_file_with_its_request_in_it_and_a_picture(run: Any, calls: list[dict[str, Any]]) -> None:
    words = (
        "--age",
        "70",
        "--modality",
        "T2",
        "--seed",
        "3",
        "--guidance",
        "2",
        "--positions",
        "-8:8.5:4",
        "--batch-size",
        "3",
    )
    code, out, err = run("sample", "brain", "--volume", "-o", "b.nii.gz", *words, "--scheduler", "unipc", *QUICK)
    assert code == 0, err
    done = json.loads(out)
    assert (done["n"], done["made"], done["kept"], done["slices"], done["notice"]) == (1, 1, 0, 5, NOTICE)
    assert (done["mode"], f"mode eager: {done['reason']}" in err) == ("eager", True)
    (asked,) = calls
    assert asked["positions"] == [-8, -4, 0, 4, 8]
    assert (asked["seed"], asked["steps"], asked["scheduler"], asked["guidance_scale"]) == (3, 2, "unipc", 2.0)
    assert (asked["cond"], asked["window"]) == ({"age": 70.0, "modality": "T2"}, 3)
    found = nib.load("b.nii.gz")
    spacing = 220 / 16
    np.testing.assert_allclose(found.header.get_zooms(), (spacing, spacing, 4))
    assert done["spacing_mm"] == [spacing, spacing, 4]
    assert found.affine[2, 3] == -8
    assert bytes(found.header["descrip"]).startswith(
        f"{NOTICE}; seed 3; age 70, modality T2; 2 steps of unipc".encode()
    )
    said = found.header.extensions[0].get_content().decode()
    assert "; guidance 2; float32; pipeline " in said
    with Image.open("b.png") as image:
        assert NOTICE in image.info["Description"]
    assert sorted(p.name for p in Path().iterdir()) == ["b.nii.gz", "b.png", "brain", "plain"]


def test_without_positions_it_is_what_the_model_knows(run: Any, calls: list[dict[str, Any]]) -> None:
    code, out, err = run("sample", "brain", "--volume", "-o", "b.nii", "--steps", "2")
    assert code == 0, err
    assert calls[0]["positions"] == [-10 + 2 * k for k in range(11)]
    assert (calls[0]["cond"], calls[0]["window"]) == ({}, None)
    assert "1 volume of 11 slices in " in out
    assert f"b.nii, views b.png; {NOTICE}" in out


def test_several_are_a_folder_that_is_completed(run: Any, calls: list[dict[str, Any]]) -> None:
    several = ("sample", "brain", "--volume", "-n", "3", "-o", "v", "--age", "30", *QUICK)
    assert run(*several)[0] == 0
    assert [call["seed"] for call in calls] == [0, 1, 2]
    names = [f"00000{k}{end}" for k in range(3) for end in (".nii.gz", ".png")]
    assert sorted(p.name for p in Path("v").iterdir()) == [*names, "sample.json"]
    assert json.loads(Path("v/sample.json").read_text())["cond"] == {"age": 30.0}
    Path("v/000001.nii.gz").unlink()
    code, out, _ = run(*several)
    assert (code, json.loads(out)["made"], json.loads(out)["kept"]) == (0, 1, 2)
    assert [call["seed"] for call in calls] == [0, 1, 2, 1]
    code, _, err = run(*several, "--positions", "0:4:2")
    assert (code, "v holds volumes of positions " in err) == (1, True)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    code, _, err = run("sample", "brain", "--volume", "-n", "2", "-o", "mine")
    assert (code, "mine holds notes.txt, which no run of this command made" in err) == (1, True)
    assert len(calls) == 4


def test_a_row_of_a_table_is_a_volume(run: Any, calls: list[dict[str, Any]]) -> None:
    Path("q.csv").write_text("age,modality\n30,T1\nn/a,T2\n")
    assert run("sample", "brain", "--volume", "--table", "q.csv", "-o", "v", *QUICK)[0] == 0
    assert [call["cond"] for call in calls] == [{"age": "30", "modality": "T1"}, {"age": None, "modality": "T2"}]


def test_a_dicom_series(run: Any) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom writes DICOM")
    words = ("--format", "dicom", "--positions", "0:4:2", "--steps", "2")
    code, out, err = run("sample", "brain", "--volume", "--age", "70", "-o", "series", *words)
    assert code == 0, err
    assert "series, views series.png" in out
    slices = [pydicom.dcmread(file) for file in sorted(Path("series").iterdir())]
    assert [float(one.ImagePositionPatient[2]) for one in slices] == [0, 2, 4]
    assert slices[0].ImageComments.startswith(f"{NOTICE}; seed 0; age 70; 2 steps of ")
    assert Path("series.png").is_file()
    code, _, err = run("sample", "brain", "--volume", "--age", "70", "-n", "2", "-o", "two", *words)
    assert code == 0, err
    assert sorted(p.name for p in Path("two").iterdir()) == [
        "000000",
        "000000.png",
        "000001",
        "000001.png",
        "sample.json",
    ]


def test_the_student_makes_volumes(run: Any, calls: list[dict[str, Any]]) -> None:
    small_pipeline(replace(ASKED, covariates=(POSITION,))).save("own/student")
    assert run("sample", "own", "--student", "--volume", "-o", "b.nii.gz", *QUICK)[0] == 0
    assert len(calls) == 1


def test_what_is_there_is_not_written_over(run: Any, calls: list[dict[str, Any]]) -> None:
    Path("b.png").write_text("mine")
    code, _, err = run("sample", "brain", "--volume", "-o", "b.nii.gz")
    assert (code, "b.png is there already; allowed is a new name" in err) == (1, True)
    assert (Path("b.png").read_text(), calls) == ("mine", [])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("brain", "--volume", "-o", "x.txt"), 2, "got x.txt, allowed is a name that ends in .nii.gz or .nii; with -n"),
        (("brain", "--volume", "-o", "x"), 2, "--out: got x, allowed is a name that ends in .nii.gz"),
        (("brain", "--volume", "-o", "x.nii", "-n", "2"), 2, "got x.nii, allowed is a folder for 2 volumes"),
        (("brain", "--volume", "-o", "x.nii.gz", "--format", "dicom"), 2, "allowed is a folder for a series"),
        (("brain", "--volume", "-o", "x.png", "--format", "dicom"), 2, "allowed is a folder for a series"),
        (
            ("brain", "--volume", "-o", "x.nii", "--batch-size", "1"),
            2,
            "--batch-size: got 1, allowed with --volume is 2",
        ),
        (("brain", "--volume", "-o", "brain/model_index.json/x.nii"), 1, "model_index.json is no folder that"),
        (("brain", "--volume", "-o", "x.nii", "--format", "png"), 2, "got png, allowed with --volume are nifti and"),
        (("brain", "--volume", "-o", "x.nii", "--eta", "1"), 2, "--eta: got a value, allowed without --volume"),
        (("brain", "--volume", "-o", "x.nii", "--position", "3"), 2, "--position: got a value, allowed with --volume"),
        (("brain", "--volume", "-o", "x.nii", "--guidance-interval", "0", "9"), 2, "allowed with --guidance"),
        (("brain", "-o", "x", "--positions", "0:4:2"), 2, "--positions: got a value, allowed with --volume"),
        (("brain", "-o", "x", "--format", "dicom"), 2, "got dicom, allowed with --volume"),
        (
            ("plain", "--volume", "-o", "x.nii"),
            2,
            "--positions: got none, allowed for a pipeline that knows no position",
        ),
        *(
            (("brain", "--volume", "-o", "x.nii", "--positions", text), 2, f"got {text}, allowed is LOW:HIGH:STEP in")
            for text in ("1", "0:4", "4:0:2", "0:4:0", "4:0:-2", "0:1:2", "0:nan:1", "a:b:c", "0:inf:1", "0:4097:1")
        ),
    ],
)
def test_what_cannot_be_made_is_named(
    run: Any, calls: list[dict[str, Any]], words: tuple[str, ...], code: int, said: str
) -> None:
    found = run("sample", *words)
    assert found[0] == code, found[2]
    assert said in " ".join(found[2].split())
    assert not calls
    assert sorted(p.name for p in Path().iterdir()) == ["brain", "plain"]


def test_an_interrupt_leaves_nothing_of_a_single_volume(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sbldm_fast.volume_files.save_nifti", cut)
        code, _, err = run("sample", "brain", "--volume", "-o", "b.nii.gz")
    assert (code, "interrupted; nothing was written" in err) == (130, True)
    assert sorted(p.name for p in Path().iterdir()) == ["brain", "plain"]
    assert run("sample", "brain", "--volume", "-o", "b.nii.gz")[0] == 0


def test_several_processes_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("sample", "brain", "--volume", "-o", "b.nii.gz")
    assert (code, "WORLD_SIZE: got 2, allowed with --volume is one process" in err) == (1, True)
