"""What is asked of many images: tables, and values that are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sbldm_fast.sampling.requests import draw_requests, join_requests, read_requests

from ..small import AGE, MODALITY

BOTH = (AGE, MODALITY)


def test_a_table_is_a_row_an_image(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("﻿age, modality \n30,T1\n\n n/a , T2\n,\n")
    assert read_requests(path, BOTH) == {"age": ["30", None, None], "modality": ["T1", "T2", None]}
    tabs = tmp_path / "participants.tsv"
    tabs.write_text("participant_id\tage\nsub-000000\t30.5\n")
    assert read_requests(tabs, BOTH) == {"age": ["30.5"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "asks for nothing"),
        ("age\n", "asks for nothing"),
        ("participant_id\nsub-1\n", "asks for nothing"),
        ("age,age\n30,40\n", "names the column 'age' twice"),
        ("age,weight\n30,70\n", "has a column 'weight', allowed are age, modality, with a comma between columns"),
        ("age;modality\n30;T1\n", "has a column 'age;modality', allowed are age, modality, with a comma"),
        ("age\n20\n\n40\n", "has an empty line; allowed for a value that is unknown is n/a"),
        ("age\n20\nold\n", r"row 2 of .*: cond\['age'\]: got 'old', allowed is 20 to 80 years"),
        ("age\n90\n", r"row 1 of .*: cond\['age'\]: got '?90"),
        ("age,modality\n30,T1\n40\n", "row 2 of .* has 1 columns, allowed are 2"),
        ("age\n3\0\n", "not readable as a table"),
    ],
)
def test_a_bad_table_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_requests(path, BOTH)


def test_lines_at_the_end_of_a_table_are_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("\nage\n20\nn/a\n\n\n")
    assert read_requests(path, BOTH) == {"age": ["20", None]}
    path.write_text("age\n90\n")
    assert read_requests(path, BOTH, extrapolate=True) == {"age": ["90"]}
    named = (replace(AGE, name="participant_id"),)
    path.write_text("participant_id\n30\n")
    assert read_requests(path, named) == {"participant_id": ["30"]}


def test_a_table_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.csv").write_bytes(b"\xff\xd8\xff")
    for name in ("none.csv", "picture.csv", "."):
        with pytest.raises(ValueError, match="not readable as a table"):
            read_requests(tmp_path / name, BOTH)


def test_drawn_values_are_of_their_image_alone_and_even() -> None:
    many = draw_requests(BOTH, 3000, 1)
    assert draw_requests(BOTH, 5, 1) == {name: values[:5] for name, values in many.items()}
    assert draw_requests(BOTH, 5, 2) != draw_requests(BOTH, 5, 1)
    assert draw_requests(BOTH, 5, 2**63 - 1) != draw_requests(BOTH, 5, 2**63 - 2)
    ages = many["age"]
    assert 20 <= min(ages) < 21
    assert 79 < max(ages) <= 80
    assert abs(sum(ages) / 3000 - 50) < 1.5  # of a uniform one the mean's deviation is 0.32
    for value in MODALITY.values:
        assert abs(many["modality"].count(value) - 1000) < 110  # four deviations


def test_what_is_named_joins_a_table() -> None:
    assert join_requests({"age": [1, 2]}, {"modality": "T1"}, 2) == {"age": [1, 2], "modality": ["T1", "T1"]}
    with pytest.raises(ValueError, match="it has a column age, which is named as well"):
        join_requests({"age": [1, 2]}, {"age": 3}, 2)
    with pytest.raises(ValueError, match="n: got 3, allowed with this table is 2"):
        join_requests({"age": [1, 2]}, {}, 3)
