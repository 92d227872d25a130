"""What is asked of many images: a table with a row for each, or values drawn for them."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.models.covariates import Covariate

from ..errors import UserError

LONGEST = 2**25  # characters of a table
UNKNOWN = ("", "n/a", "na", "nan")
IGNORED = ("participant_id",)  # BIDS names its rows; here they are numbered
Asked = dict[str, list[Any]]


def read_requests(path: Path, covariates: Sequence[Covariate], extrapolate: bool = False) -> Asked:
    """The covariates of a CSV or TSV table (by its name), a row an image: each column `[n]`, None where a cell is
    empty or n/a.

    Raises:
        ValueError: an unreadable or empty table, a column that is no covariate or that is there twice, none that is
            one, a row of another length, an empty line among those of one column, or a value that is not allowed.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            text = f.read(LONGEST + 1)
        if len(text) > LONGEST or "\0" in text:
            raise csv.Error(f"allowed are {LONGEST} characters of text")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        read = [
            [cell.strip() for cell in line] for line in csv.reader(io.StringIO(text.strip("\r\n")), delimiter=delimiter)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table: {path} is not readable as a table: {error}") from None
    lines = [line for line in read if line]
    known = {c.name: c for c in covariates}
    names = list(known)
    header = lines[0] if lines else []
    if len(header) == 1 and [] in read:
        raise UserError(f"table: {path} has an empty line; allowed for a value that is unknown is n/a")
    if twice := [c for c in header if header.count(c) > 1]:
        raise UserError(f"table: {path} names the column {twice[0]!r:.100} twice")
    if unlike := [c for c in header if c not in names and c not in IGNORED]:
        raise UserError(
            f"table: {path} has a column {unlike[0]!r:.100}, allowed are {', '.join(names) or 'none'},"
            f" with {'a tab' if delimiter != ',' else 'a comma'} between columns"
        )
    if len(lines) < 2 or not set(header) & set(names):
        raise UserError(
            f"table: {path} asks for nothing, allowed are a header with some of {', '.join(names)}, and rows"
        )
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise UserError(f"table: row {number} of {path} has {len(line)} columns, allowed are {len(header)}")
    columns = zip(header, zip(*lines[1:], strict=True), strict=True)
    asked: Asked = {
        name: [None if cell.lower() in UNKNOWN else cell for cell in column]
        for name, column in columns
        if name in known
    }
    for name, column in asked.items():
        for number, value in enumerate(column, 1):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what is outside the range is said when the images are made
                    known[name].number(value, extrapolate)
            except UserError as error:
                raise UserError(f"table: row {number} of {path}: {error}") from None
    return asked


def draw_requests(covariates: Sequence[Covariate], n: int, seed: int) -> Asked:
    """Values for n images, each covariate for itself and evenly: over its range, or among its values.

    Image i's depend on `seed` and i alone.
    """
    asked: Asked = {c.name: [] for c in covariates}
    for i in range(n):
        u = torch.rand(
            len(covariates),
            generator=torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63),
            dtype=torch.float64,
        )
        for c, p in zip(covariates, u.tolist(), strict=True):
            drawn: Any = c.values[int(p * len(c.values))] if c.values else round(c.low + p * (c.high - c.low), 3)
            asked[c.name].append(drawn if c.values else min(max(drawn, c.low), c.high))
    return asked


def join_requests(table: Mapping[str, Sequence[Any]], named: Mapping[str, Any], n: int) -> Asked:
    """What a table asks, and what is named for all n images alike.

    Raises:
        ValueError: a covariate that both ask for, or a table of other than n rows.
    """
    if both := sorted(table.keys() & named.keys()):
        raise UserError(f"table: it has a column {both[0]}, which is named as well; allowed is one of them")
    if wrong := [len(column) for column in table.values() if len(column) != n]:
        raise UserError(f"n: got {n}, allowed with this table is {wrong[0]}, a row for each image")
    return {name: list(column) for name, column in table.items()} | {name: [value] * n for name, value in named.items()}
