"""A CSV file joined by subject, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sbldm_fast.data import prepare
from sbldm_fast.data.covariates import Covariates, category, describe

from .test_volumes import head, save


def table(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def test_numbers_fit_subjects_by_their_end(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "patient_id,sex,age,type\n1,F,20,\n12,M,29.5,RR\n,,,\n7,F,NaN,NA\n", "utf-8-sig")
    # two numbers in a name: which is meant cannot be known
    subjects = [
        "ms/patient01",
        "ms/patient12",
        "ms/patient07",
        "ms/patient03",
        "other",
        "a/IXI185-Guys-0012",
        "a/case7-1",
        "dicom_t1_axial",
    ]
    assert Covariates(path).of(subjects) == {
        "ms/patient01": {"sex": "F", "age": 20.0},
        "ms/patient12": {"sex": "M", "age": 29.5, "type": "RR"},
        "ms/patient07": {"sex": "F"},
    }


def test_names_fit_by_the_whole(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "id,age\nsub-01,20\nSub-011,30\n")
    assert Covariates(path).of(["a/sub-01", "a/sub-011", "a/sub-1"]) == {
        "a/sub-01": {"age": 20.0},
        "a/sub-011": {"age": 30.0},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,age\n1,20\n01,21\n", "lists id 01 twice"),
        ("id,age\n1,20\n2\n", "the row of 2 has 1 columns, allowed are 2"),
        ("id,age,age\n1,20,3\n", "names a column twice"),
        ("id\n1\n", "holds no covariates"),
        ("id,age,position\n1,20,3\n", "has a column position, which is measured; allowed is another name for it"),
        ("id,modality\n1,T1\n", "has a column modality, which is measured"),
        ("", "holds no covariates"),
        ("id,age\n1,20\n", r"id 1 fits a/patient1 and b/patient01; give each source its own table"),
    ],
)
def test_ambiguous_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Covariates(table(tmp_path / "t.csv", text)).of(["a/patient1", "b/patient01", "c/x"])


def test_a_tsv_with_its_definitions_as_in_bids(tmp_path: Path) -> None:
    path = table(
        tmp_path / "participants.tsv", "participant_id\tage\tsex\tnote\nsub-01\t20\tF\ta, b\nsub-02\tn/a\tM\t\n"
    )
    assert Covariates(path).definitions == {}
    said = {
        "age": {"Units": "years", "Description": "at the scan,\nrounded", "Levels": {}},
        "sex": {"Description": ["F", "M"], "Units": None},
        "note": "no mapping",
        "nobody": {"Description": "of no column"},
    }
    (tmp_path / "participants.json").write_text(json.dumps(said))
    covariates = Covariates(path)
    assert covariates.of(["a/sub-01", "a/sub-02"]) == {
        "a/sub-01": {"age": 20.0, "sex": "F", "note": "a, b"},
        "a/sub-02": {"sex": "M"},
    }
    assert covariates.definitions["age"] == {"unit": "years", "definition": "at the scan,\\nrounded"}
    assert covariates.definitions["sex"] == {}
    assert "note" not in covariates.definitions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"t.json"),
        ("{", r"t.json"),
        (json.dumps({"age": {"Units": "y" * 41}}), r"t.json: the unit of 'age' has 41 characters, allowed are 40"),
        (
            json.dumps({"age": {"Description": "\n" * 1001}}),
            r"the definition of 'age' has 2002 characters, allowed are 2",
        ),
    ],
)
def test_definitions_that_cannot_be_kept_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "id,age\n1,20\n")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Covariates(path)


def test_what_is_described() -> None:
    values: list[dict[str, float | str]] = [
        {"age": 30.5, "grade": 2.0},
        {"age": 20.0, "grade": "x"},
        {"grade": 1.5},
        {},
    ]
    assert describe(values, {"age": {"unit": "years"}, "other": {"unit": "m"}}) == {
        "age": {"unit": "years", "low": 20.0, "high": 30.5, "slices": 2},
        "grade": {"values": ["1.5", "2", "x"], "slices": 3},
    }
    assert describe([], {"age": {"unit": "years"}}) == {}
    assert [category(v) for v in (1.0, 1e6, "1.0")] == ["1", "1e+06", "1.0"]


def test_the_manifest_says_what_is_meant(tmp_path: Path) -> None:
    for i in (1, 2):
        save(head(person=i), tmp_path / "in" / f"patient{i}_{'T1' if i == 1 else 'scan'}.nii.gz")
    path = table(tmp_path / "t.csv", "id,age,dose\n1,20,1\n2,30,\n")
    (tmp_path / "t.json").write_text(json.dumps({"age": {"Units": "a", "Description": "at the scan"}, "dose": {}}))
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", covariates=path, progress=False)
    described = manifest["covariates"]
    assert list(described) == ["age", "dose", "modality", "position"]
    assert described["age"] == {"unit": "a", "definition": "at the scan", "low": 20.0, "high": 30.0, "slices": 24}
    assert described["dose"] == {"low": 1.0, "high": 1.0, "slices": 12}, "unknown is left out, and never 0"
    assert (described["modality"]["values"], described["modality"]["slices"]) == (["T1"], 12)
    assert described["position"].items() >= {"unit": "mm", "low": 16.0, "high": 71.0, "slices": 24}.items()
    assert "no registration" in described["position"]["definition"]
    both = prepare(["synthetic:2", str(tmp_path / "in")], tmp_path / "b", covariates=path, every=20, progress=False)
    age = both["covariates"]["age"]["definition"]
    assert age.startswith("of a made brain")
    assert age.endswith("; at the scan"), "both are said where both are meant"
    assert both["covariates"]["ventricle_volume"]["unit"] == "ml"


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"id,age\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match=r"t.csv is not readable as CSV"):
        Covariates(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"none.csv is not readable as CSV"):
        Covariates(tmp_path / "none.csv")


def test_a_subject_without_a_row_is_named_or_strictly_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        save(head(person=i), tmp_path / "in" / f"patient{i}_T1.nii.gz")
    path = table(tmp_path / "t.csv", "id,age\n1,20\n")
    manifest = prepare(
        [str(tmp_path / "in"), "synthetic:2"], tmp_path / "out", covariates=path, every=20, progress=False
    )
    assert (manifest["skipped"], manifest["without_covariates"]) == ([], ["in/patient2"])
    found = {row["subject"]: row["covariates"] for row in manifest["slices"]}
    assert found["in/patient1"] == {"age": 20.0, "position": 16.0}
    assert found["in/patient2"] == {"position": 16.0}
    assert set(found["synthetic/00001"]) == {"age", "sex", "ventricle_volume", "position"}, "a made brain keeps its own"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds notes.txt, which would be lost"):
        prepare([str(tmp_path / "in")], tmp_path / "mine", progress=False)
    with pytest.raises(ValueError, match=r"t.csv has no row for in/patient2"):
        prepare([str(tmp_path / "in")], tmp_path / "strict", covariates=path, strict=True, progress=False)
    assert not (tmp_path / "strict").exists()


def test_a_number_of_thousands_of_digits_is_a_number(tmp_path: Path) -> None:
    digits = "1" * 5000
    assert Covariates(table(tmp_path / "t.csv", f"id,age\n{digits},{digits}\n0012,20\n")).of(["a/p12"]) == {
        "a/p12": {"age": 20.0}
    }


def test_the_shared_table(ms_scans: Path) -> None:
    got = Covariates(ms_scans / "patient_info.csv").of([f"ms/patient{i:02d}" for i in (1, 3, 4, 12)])
    assert [got[f"ms/patient{i:02d}"]["sex"] for i in (1, 3, 4, 12)] == ["F", "M", "F", got["ms/patient12"]["sex"]]
    assert np.isfinite([float(c["age"]) for c in got.values()]).all()
