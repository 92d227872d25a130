"""How good is a pipeline? Numbers, the figures of 001 and a page, part by part.

A part is done when its JSON file is there: the same command goes on where it was cut off. All parts look at the same
samples, asked for what the unseen slices are where the pipeline can be asked; the nearest training slices are also
looked for of samples that are asked for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.files import read_json, whole_file, write_json
from sbldm_fast.images import NOTICE
from sbldm_fast.models.weights import digest_weights
from sbldm_fast.sampling.content import fingerprint
from sbldm_fast.sampling.pipeline import Pipeline

from ..errors import MissingExtra, UserError
from .features import find_extractor
from .material import Material, Settings, read_stages
from .parts import PARTS, TITLES

FORMAT = 1
# where less or more is better, by what the name of a number begins with
BETTER = {
    **dict.fromkeys(("kid of", "frechet_distance", "nrmse", "l1"), "↓"),
    **dict.fromkeys(("precision", "recall of", "ssim", "psnr", "ms_ssim", "4-g-r-ssim"), "↑"),
}


def evaluate_pipeline(
    pipeline: Pipeline,
    data: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    only: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Make the missing parts in the folder `out`, each `PART.json` with its figures; then `evaluation.json` of all that
    are there, `evaluation.md` and `evaluation.html`; return the content of the first.

    Raises:
        ValueError: an unknown part; data without unseen slices, or fewer than n; a folder that holds something else, or
            an evaluation of another pipeline, other data or other settings.
        ImportError: a package of the extra eval is missing.
    """
    settings, out = settings or Settings(), Path(out)
    settings = replace(settings, steps=pipeline.default_steps() if settings.steps is None else settings.steps)
    if unknown := [name for name in only if name not in PARTS]:
        raise UserError(f"only: got {unknown[0]!r}, allowed are {', '.join(PARTS)}")
    wanted = [name for name in PARTS if not only or name in only]
    stamp = _stamp(pipeline, data, settings)
    _check_folder(out, stamp)
    material = Material(pipeline, data, out, settings)
    _check_means(pipeline, settings, wanted)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", {"stamp": stamp})
    for name in (bar := tqdm(wanted, "evaluate", unit="part", disable=not progress)):
        path, of = out / f"{name}.json", _stamp_of(name, settings)
        if not path.exists() or read_json(path).get("of") != of:
            bar.set_postfix_str(name)
            write_json(path, {"of": of, **PARTS[name](material)})
    parts = {name: read_json(out / f"{name}.json") for name in PARTS if (out / f"{name}.json").exists()}
    report = {
        "notice": NOTICE,
        "stamp": stamp,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("log", "weights")},
        "training_slices": len(material.train),
        "scheduler": type(pipeline.scheduler).__name__,
        "unseen_slices": len(material.unseen),
        "unseen_subjects": len({row["subject"] for row in material.unseen_rows}),
        "asked": None if material.cond is None else sorted(material.cond),
        "parts": {name: {k: v for k, v in part.items() if k != "of"} for name, part in parts.items()},
    }
    write_json(out / "evaluation.json", report)
    with whole_file(out / "evaluation.md") as aside:
        aside.write_text(render_markdown(report))
    with whole_file(out / "evaluation.html") as aside:
        aside.write_text(_render_page(report, out))
    return report


def _check_means(pipeline: Pipeline, settings: Settings, wanted: Sequence[str]) -> None:
    """Refuse, before anything is made, what would be refused in the middle."""
    _check_extra()
    pipeline.sampler(settings.steps, "eager")
    if "distribution" in wanted:
        find_extractor(settings.extractor, pipeline.vae, settings.weights)
    if settings.log is not None:
        read_stages(settings.log)


def _check_extra() -> None:
    """Refuse a part of the extra that is not there before anything is made."""
    for module, package in (
        ("skimage", "scikit-image"),
        ("torchmetrics", "torchmetrics"),
        ("matplotlib", "matplotlib"),
        ("jinja2", "jinja2"),
    ):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra("evaluate", package, "eval")


def _stamp(pipeline: Pipeline, data: str | Path, settings: Settings) -> str:
    """What an evaluation is of, as 16 letters."""
    read_manifest(data)
    manifest = (Path(data) / "manifest.json").read_bytes()
    of = [FORMAT, digest_weights(pipeline.vae), digest_weights(pipeline.unet), pipeline.unet.config.to_dict()]
    of += [fingerprint(pipeline.scheduler.config), hashlib.sha256(manifest).hexdigest()]
    of += [settings.n, settings.seed, settings.steps]
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp_of(part: str, settings: Settings) -> str:
    """What a part is of beside that: it is made again where this changes."""
    if part == "curves":
        return "" if settings.log is None else hashlib.sha256(Path(settings.log).read_bytes()).hexdigest()[:16]
    return settings.extractor if part == "distribution" else ""


def _check_folder(out: Path, stamp: str) -> None:
    """Nothing there, or an evaluation of the same stamp."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, allowed is a folder")
    if (out / "settings.json").is_file():
        if read_json(out / "settings.json").get("stamp") != stamp:
            raise UserError(
                f"{out} holds an evaluation of another pipeline, other data or other settings; allowed is another"
                " folder"
            )
    elif there := sorted(p.name for p in out.glob("*")):
        raise UserError(f"{out} holds {there[0]}; allowed is a new folder or one that evaluate wrote")


def render_markdown(report: dict[str, Any]) -> str:
    """A table of all single numbers, part by part."""
    lines = [f"{report['settings']['n']} samples, {NOTICE}.", "", "| part | figure | value |", "|---|---|---|"]
    for name, part in report["parts"].items():
        if "skipped" in part:
            lines.append(f"| {name} | not made | {part['skipped']} |")
        lines += [f"| {name} | {key} | {value} |" for key, value in rows_of(part)]
    said = [f"- {text}" for part in report["parts"].values() for text in part.get("sentences", [])]
    return "\n".join([*lines, "", *said]) + "\n"


def rows_of(part: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a part as text, mean ± standard deviation over images or pairs; an arrow says what is better."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{text(value['mean'])} ± {text(value['std'])} (n = {value['n']})"
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4g}"
        return str(value)

    def arrow(key: str) -> str:
        return next((f" {sign}" for start, sign in BETTER.items() if key.startswith(start)), "")

    return [(key + arrow(key), text(value)) for key, value in part.get("figures", {}).items()]


def _render_page(report: dict[str, Any], out: Path) -> str:
    """One HTML page, the pictures inside it."""
    import jinja2

    def inline(name: str) -> str:
        kind = "svg+xml" if name.endswith(".svg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode((out / name).read_bytes()).decode()}"

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.jinja").render(
        report=report, titles=TITLES, inline=inline, rows_of=rows_of
    )
