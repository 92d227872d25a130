"""A table of subjects joined to their scans."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

Covariates = dict[str, float | str]
_NOTHING = ("", "na", "n/a", "nan")


def read_covariates(path: str | Path, subjects: Iterable[str]) -> dict[str, Covariates]:
    """The columns of a CSV file for each subject that it lists, numbers as float.

    The first column names the subject. It belongs to a subject when it is the end of its name (`sub-01` of `scans/sub-01`), or when
    both end in the same number (`1` and `scans/patient01`) and the column holds whole numbers alone. Left out: cells that are empty, NA
    or NaN.

    Raises:
        ValueError: an unreadable or empty file, a row of another length, or a subject with two rows or a row with two subjects.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            lines = [[cell.strip() for cell in line] for line in csv.reader(f) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not readable as CSV: {error}") from None
    if len(lines) < 2 or len(lines[0]) < 2:
        raise ValueError(f"{path} holds no covariates, allowed is a header, a column of subjects and at least one more")
    names, rows = lines[0], lines[1:]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names a column twice: {', '.join(names)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(f"{path} line {number} has {len(row)} columns, allowed are {len(names)}")
    numbers = all(row[0].isdecimal() for row in rows)

    def key(text: str) -> str:
        text = text.rpartition("/")[2].lower()
        digits = re.search(r"\d+$", text)
        return str(int(digits.group())) if numbers and digits else text

    table: dict[str, Covariates] = {}
    for row in rows:
        if key(row[0]) in table:
            raise ValueError(f"{path} lists {names[0]} {row[0]} twice: which row holds cannot be known")
        table[key(row[0])] = {name: _value(cell) for name, cell in zip(names[1:], row[1:], strict=True) if cell.lower() not in _NOTHING}
    joined: dict[str, Covariates] = {}
    owner: dict[str, str] = {}
    for subject in sorted(set(subjects)):
        if key(subject) in table:
            other = owner.setdefault(key(subject), subject)
            if other != subject:
                raise ValueError(f"{path}: {names[0]} {key(subject)} fits {other} and {subject}; give each source its own table")
            joined[subject] = table[key(subject)]
    return joined


def _value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
