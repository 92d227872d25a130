"""A table of subjects joined to their scans."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbldm_fast.files import printable, read_json

from ..errors import UserError
from .sources import MODALITY

LONGEST = 2**25  # characters of a table: a million subjects with five columns
MOST_TEXT = {"unit": 40, "definition": 2000}  # characters: as many as a model's configuration takes
_NOTHING = ("", "na", "n/a", "nan")
MEASURED = {
    "modality": {"definition": "the contrast that the file's or series' name tells"},
    "position": {
        "unit": "mm",
        "definition": "height of the slice above z = 0 of the ICBM 152 template (about the anterior commissure), where"
        " the scan's highest slice with enough head is taken to be at 71 mm, as the template's is; no registration",
    },
}
Value = float | str


class Covariates:
    """The rows of a CSV or TSV file, whose first column names the subject. Left out: cells that are empty, NA or NaN,
    and empty lines.

    `definitions` holds what a JSON file of the same name beside it says of the columns, as in BIDS: `{"age": {"Units":
    "years", "Description": "..."}}`.

    Raises:
        ValueError: an unreadable or empty file, a row of another length, a subject with two rows, a column named as
            what `prepare` measures itself, definitions that are no JSON or too long.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as f:
                text = f.read(LONGEST + 1)
            if len(text) > LONGEST or not set(text) <= {*"\n\r\t", *filter(str.isprintable, set(text))}:
                raise csv.Error(f"allowed are {LONGEST} characters that can be printed")
            lines = [
                [cell.strip() for cell in line]
                for line in csv.reader(io.StringIO(text), delimiter="\t" if self.path.suffix == ".tsv" else ",")
                if any(cell.strip() for cell in line)
            ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not readable as CSV: {error}") from None
        if len(lines) < 2 or len(lines[0]) < 2:
            raise UserError(
                f"{path} holds no covariates, allowed is a header, a column of subjects and at least one more"
            )
        (self.key, *columns), rows = lines[0], lines[1:]
        if len(set(columns)) < len(columns):
            raise UserError(f"{path} names a column twice: {next(c for c in columns if columns.count(c) > 1):.100}")
        if taken := sorted(MEASURED.keys() & {*columns}):
            raise UserError(f"{path} has a column {taken[0]}, which is measured; allowed is another name for it")
        self.columns = columns
        self.definitions = _definitions(self.path.with_suffix(".json"))
        self._numbers = all(row[0].isdecimal() for row in rows)
        self._rows: dict[str, dict[str, float | str]] = {}
        for row in rows:
            if len(row) != len(columns) + 1:
                raise UserError(
                    f"{path}: the row of {row[0]:.100} has {len(row)} columns, allowed are {len(columns) + 1}"
                )
            if self._fit(row[0]) in self._rows:
                raise UserError(f"{path} lists {self.key:.100} {row[0]:.100} twice: which row holds cannot be known")
            cells = zip(columns, row[1:], strict=True)
            self._rows[self._fit(row[0])] = {
                column: _value(cell) for column, cell in cells if cell.lower() not in _NOTHING
            }

    def of(self, subjects: Iterable[str]) -> dict[str, dict[str, float | str]]:
        """The covariates of each subject that has a row, numbers as float.

        A row belongs to a subject when it is the end of its name (`sub-01` of `scans/sub-01`), or, where the first
        column holds whole numbers alone, when it is the one number in that end (`1` and `scans/patient01`).

        Raises:
            ValueError: a row that fits two subjects.
        """
        owner: dict[str, str] = {}
        for subject in sorted(set(subjects)):
            fit = self._fit(subject)
            if fit in self._rows and owner.setdefault(fit, subject) != subject:
                raise UserError(
                    f"{self.path}: {self.key:.100} {fit:.100} fits {owner[fit]} and {subject}; give each source its own"
                    " table"
                )
        return {subject: self._rows[fit] for fit, subject in owner.items()}

    def _fit(self, text: str) -> str:
        text = text.rpartition("/")[2].lower()
        found = re.findall(r"\d+", MODALITY.sub("", text.replace("_", " ")))  # the 1 of T1 is no number of a subject
        return (found[0].lstrip("0") or "0") if self._numbers and len(found) == 1 else text


def _value(cell: str) -> float | str:
    try:
        number = float(cell)
    except ValueError:
        return cell
    return number if math.isfinite(number) and "_" not in cell else cell


def _definitions(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    found = {}
    for column, said in read_json(path).items():
        if isinstance(said, dict):
            texts = {"unit": said.get("Units"), "definition": said.get("Description")}
            found[column] = {k: printable(v) for k, v in texts.items() if isinstance(v, str)}
            for what, text in found[column].items():
                if len(text) > MOST_TEXT[what]:
                    raise UserError(
                        f"{path}: the {what} of {column!r:.100} has {len(text)} characters, allowed are"
                        f" {MOST_TEXT[what]}"
                    )
    return found


def describe(
    values: Iterable[Mapping[str, Value]], definitions: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """What is known of each covariate: of how many slices, its range or its values, unit and definition.

    A covariate with any text among its values is a category.
    """
    known: dict[str, list[Value]] = {}
    for one in values:
        for name, value in one.items():
            known.setdefault(name, []).append(value)
    described: dict[str, dict[str, Any]] = {}
    for name, found in sorted(known.items()):
        numbers = [v for v in found if not isinstance(v, str)]
        if len(numbers) == len(found):
            seen: dict[str, Any] = {"low": min(numbers), "high": max(numbers)}
        else:
            seen = {"values": sorted({category(v) for v in found})}
        described[name] = {**definitions.get(name, {}), **seen, "slices": len(found)}
    return described


def category(value: Value) -> str:
    """A value as the name of a category."""
    return value if isinstance(value, str) else f"{value:g}"
