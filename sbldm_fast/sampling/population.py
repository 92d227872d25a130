"""A made cohort on disk as BIDS has it: a subject per image, and a table of what each was asked to be.

Source: Gorgolewski et al. 2016, doi:10.1038/sdata.2016.44; the specification, version 1.10.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sbldm_fast.files import whole_file, write_json
from sbldm_fast.images import NOTICE, save_picture
from sbldm_fast.models.covariates import Covariate

SUFFIXES = {"T1": "T1w", "T1CE": "ce-gadolinium_T1w", "T2": "T2w", "FLAIR": "FLAIR", "PD": "PDw"}
BINS = 16
PANEL = 260, 120  # pixels of a histogram


def bids_path(out: Path, i: int, asked: Mapping[str, Sequence[Any]]) -> Path:
    """Where the image of subject i lies; `MRI`, which BIDS does not know, is one whose contrast nobody asked for."""
    modality = asked["modality"][i] if "modality" in asked else None
    subject = f"sub-{i:06d}"
    return out / subject / "anat" / f"{subject}_{SUFFIXES.get(str(modality), 'MRI')}.nii.gz"


def write_participants(out: Path, n: int, asked: Mapping[str, Sequence[Any]], covariates: Sequence[Covariate]) -> None:
    """Write `participants.tsv`, what its columns mean (`participants.json`), `dataset_description.json`, the
    histograms of the columns, `marginals.png`, and `.bidsignore` for what BIDS does not know."""
    columns = [c for c in covariates if c.name in asked]
    meanings: dict[str, Any] = {}
    for c in columns:
        said = {"Description": f"asked of the model: {c.definition or c.name}", "Units": c.unit}
        meanings[c.name] = {k: v for k, v in said.items() if v} | ({"Levels": list(c.values)} if c.values else {})
    write_json(out / "participants.json", {"participant_id": {"Description": NOTICE}, **meanings})
    write_json(
        out / "dataset_description.json",
        {
            "Name": f"A made cohort of single slices: {NOTICE}",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [
                {"Name": "sbldm_fast", "Description": "sbldm-fast population; sample.json has its settings"}
            ],
        },
    )
    with whole_file(out / ".bidsignore") as aside:
        aside.write_text("marginals.png\nsample.json\n*_MRI.nii.gz\n")
    if columns:
        draw_marginals([(c, list(asked[c.name])) for c in columns], out / "marginals.png")
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["participant_id", *(c.name for c in columns)])
    for i in range(n):
        cells = [asked[c.name][i] for c in columns]
        table.writerow([f"sub-{i:06d}", *("n/a" if cell is None else cell for cell in cells)])
    with whole_file(out / "participants.tsv") as aside:
        aside.write_text(text.getvalue())


def draw_marginals(columns: Sequence[tuple[Covariate, list[Any]]], path: Path) -> None:
    """A histogram of each column: of a number over its range, of a category by its values; what is unknown is counted
    in the title."""
    width, height = PANEL
    sheet = Image.new("L", (width * len(columns), height + 14))
    draw = ImageDraw.Draw(sheet)
    for k, (covariate, values) in enumerate(columns):
        known = [v for v in values if v is not None]
        if covariate.values:
            counts = [Counter(map(str, known))[name] for name in covariate.values]
            ends = list(covariate.values)
        else:
            numbers = [float(v) for v in known]
            low, high = min([covariate.low, *numbers]), max([covariate.high, *numbers])
            found = Counter(min(int((v - low) / (high - low) * BINS), BINS - 1) for v in numbers)
            counts, ends = [found[b] for b in range(BINS)], [f"{low:g}", f"{high:g}"]
        left, floor, step = k * width + 10, height - 24, (width - 20) / len(counts)
        unit = f", {covariate.unit}" if covariate.unit else ""
        unknown = f", {len(values) - len(known)} not" if len(known) < len(values) else ""
        title = f"{covariate.name}{unit}: {len(known)} known{unknown}"
        draw.text((left, 2), title.encode("ascii", "replace").decode()[: PANEL[0] // 6], fill=255)
        for b, count in enumerate(counts):
            top = floor - round((floor - 20) * count / max(1, *counts))
            draw.rectangle([left + b * step, top, left + (b + 1) * step - 2, floor], fill=160)
        for e, end in enumerate(ends):  # names below their bars, the ends of a range at its ends
            at = left + e * step if covariate.values else (left if e == 0 else left + width - 20 - 6 * len(end))
            draw.text((at, floor + 4), end.encode("ascii", "replace").decode()[:12], fill=200)
    draw.text((10, height + 1), f"marginals of what was asked; {NOTICE}", fill=200)
    save_picture(sheet, path)
