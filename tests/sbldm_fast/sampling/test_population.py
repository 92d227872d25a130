"""A cohort on disk: BIDS names, tables, histograms; run again, split and completed like any job."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sbldm_fast import Pipeline
from sbldm_fast.images import NOTICE
from sbldm_fast.sampling.job import Settings, sample_to_folder
from sbldm_fast.sampling.population import bids_path, draw_marginals

from ..small import AGE, ASKED, MODALITY, small_pipeline

ASKS: dict[str, list[Any]] = {"age": [20.0, 33.5, None], "modality": ["T1", "FLAIR", None]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_pipeline(ASKED).save(tmp_path / "pipeline")
    return tmp_path


def make(folder: Path, n: int = 3, **changes: Any) -> dict[str, Any]:
    settings = Settings(**({"steps": 2, "scheduler": "unipc", "format": "bids", "asked": ASKS} | changes))
    return sample_to_folder(str(folder / "pipeline"), folder / "cohort", n, settings, progress=False)


def test_a_cohort_is_a_subject_an_image_and_what_was_asked(folder: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    assert make(folder)["made"] == 3
    out = folder / "cohort"
    with (out / "participants.tsv").open() as f:
        rows = list(csv.reader(f, delimiter="\t"))
    assert rows == [
        ["participant_id", "age", "modality"],
        ["sub-000000", "20.0", "T1"],
        ["sub-000001", "33.5", "FLAIR"],
        ["sub-000002", "n/a", "n/a"],
    ]
    meaning = json.loads((out / "participants.json").read_text())
    assert meaning["age"] == {"Description": "asked of the model: at the scan", "Units": "years"}
    assert meaning["modality"]["Levels"] == ["T1", "T2", "FLAIR"]
    found = json.loads((out / "dataset_description.json").read_text())
    assert found["BIDSVersion"]
    assert "*_MRI.nii.gz" in (out / ".bidsignore").read_text().split()
    assert NOTICE in found["Name"]
    images = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.nii.gz"))
    assert images == [f"sub-{i:06d}/anat/sub-{i:06d}_{s}.nii.gz" for i, s in enumerate(("T1w", "FLAIR", "MRI"))]
    stored = nibabel.load(out / images[1])
    expected = Pipeline.from_pretrained(folder / "pipeline").sample(
        3, steps=2, scheduler="unipc", cond={k: list(v) for k, v in ASKS.items()}, batch_size=16
    )
    np.testing.assert_allclose(stored.get_fdata()[:, ::-1, 0].T, expected[1, 0], atol=1e-5)
    assert NOTICE in str(stored.header["descrip"])


def test_a_cohort_is_completed_and_not_mixed(folder: Path) -> None:
    pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    make(folder)
    whole = {p: p.read_bytes() for p in (folder / "cohort").rglob("*") if p.is_file()}
    bids_path(folder / "cohort", 1, ASKS).unlink()
    (folder / "cohort" / "participants.tsv").unlink()
    done = make(folder)
    assert (done["made"], done["kept"]) == (1, 2)
    after = {p: p.read_bytes() for p in (folder / "cohort").rglob("*") if p.is_file()}
    assert after.keys() == whole.keys()
    assert all(after[p] == whole[p] for p in whole if not p.name.endswith(".nii.gz"))
    for changes in ({"asked": ASKS | {"age": [21.0, 33.5, None]}}, {"guidance_scale": 2.0}, {"seed": 3}):
        with pytest.raises(ValueError, match="holds images of"):
            make(folder, **changes)
    with pytest.raises(ValueError, match="holds images of another age, or another number of them"):
        make(folder, asked=ASKS | {"age": [21.0, 33.5, None]})


def test_a_run_that_asks_for_less_is_another_run(folder: Path) -> None:
    """What the folder's record says and the run does not is a difference, too."""
    asked: dict[str, list[Any]] = {"age": [30.0] * 2, "modality": ["T1"] * 2}
    runs: list[dict[str, Any]] = [
        {"asked": asked, "guidance_scale": 2.0, "guidance_interval": (0.0, 600.0)},
        {"asked": asked, "guidance_scale": 2.0},
        {"asked": asked},
        {"asked": {"age": [30.0] * 2}},
        {"asked": {}},
    ]
    make(folder, 2, format="png", **runs[0])
    record = (folder / "cohort" / "sample.json").read_bytes()
    said = ("guidance_interval", "guidance 2.0", "another modality", "cond ")
    for changes, text in zip(runs[1:], said, strict=True):
        with pytest.raises(ValueError, match="holds images of .*" if "another" not in text else text):
            make(folder, 2, format="png", **changes)
    assert (folder / "cohort" / "sample.json").read_bytes() == record


def test_a_cohort_is_not_cut(folder: Path) -> None:
    pytest.importorskip("nibabel", reason="nibabel writes NIfTI")
    same: dict[str, list[Any]] = {"age": [30.0] * 3, "modality": ["T1"] * 3}
    make(folder, asked=same)
    with pytest.raises(ValueError, match=r"n: got 2, but .* holds sub-000002; allowed is 3 or more"):
        make(folder, 2, asked={k: v[:2] for k, v in same.items()})
    assert (folder / "cohort" / "participants.tsv").read_text().count("sub-") == 3
    assert make(folder, 4, asked={k: [v[0]] * 4 for k, v in same.items()})["made"] == 1


def test_what_is_refused_leaves_no_folder(folder: Path) -> None:
    for changes, said in (
        ({"asked": ASKS | {"age": [19.0, 30.0, 40.0]}}, r"cond\['age'\]: got 19"),
        ({"asked": {}, "guidance_scale": 2.0}, "guidance_scale: got a value without cond"),
        ({"asked": {"weight": [1, 2, 3]}}, "cond: got 'weight'"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}, "guidance_interval: got 0.2 to 0.8, allowed is one"),
    ):
        with pytest.raises(ValueError, match=said):
            make(folder, format="png", **changes)
        assert not (folder / "cohort").exists()


def test_a_histogram_has_a_bar_where_values_are(tmp_path: Path) -> None:
    draw_marginals([(AGE, [20.0, 20.0, 80.0, None]), (MODALITY, ["T1", "T2", "T2"])], tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        pixels = np.asarray(image)
        assert NOTICE in image.info["Description"]
    bars = pixels[25:95]
    heights = (bars == 160).sum(axis=0)
    assert heights[12] > heights[248] > 0, "two are 20, one is 80"
    assert heights[120] == 0, "nobody is 50"
    assert heights[260 + 120] > heights[260 + 40] > 0, "of T2 there are more than of T1"
    assert heights[260 + 210] == 0, "and of FLAIR none"
