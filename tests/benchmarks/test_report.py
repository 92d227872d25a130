"""The page: self-contained, every figure its row's, and looked at by a real browser."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sbldm_fast.benchmarks.report import GATE, write_report
from sbldm_fast.benchmarks.rows import append, head
from sbldm_fast.kernels import preflight

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of the committed results."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    return out, write_report([ROOT / "benchmarks" / "results"], out)


def test_it_needs_nothing_else(page: tuple[Path, dict[str, Any]]) -> None:
    text = page[0].read_text()
    text = text.replace("http://www.w3.org/", "")  # names of XML namespaces, which nothing fetches
    assert not re.findall(r"https?://|<script|<link|@import|url\((?!#)|\bsrc=", text)


FIGURES = ("ms_per_step", "ms_per_image", "median_s", "rms", "rms_unasked", "images_per_s")


def test_every_link_leads_to_a_row_that_holds_the_figure(page: tuple[Path, dict[str, Any]]) -> None:
    text, done = page[0].read_text(), page[1]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = re.findall(r'(?:xlink:)?href="#([^"]+)"', text)
    assert len(links) > done["rows"]
    assert set(links) <= set(ids)
    rows = {
        i: json.loads(html.unescape(body))
        for i, body in re.findall(r'<details id="(r\d+)">.*?<pre>(.*?)</pre>', text, re.DOTALL)
    }
    assert len(rows) == done["rows"]
    # what the T4's section has is a model's error, which no row holds
    cells = re.findall(r'<a href="#(r\d+)">([\d.]+)[*†]?</a>', text[: text.index('<section id="t4">')])
    assert len(cells) > 50
    for i, figure in cells:
        r, digits = rows[i], len(figure.partition(".")[2])
        held = [r.get(k) for k in FIGURES] + [
            1e6 * r.get("median_s", 0),
            (r.get("peak_bytes") or 0) / 2**20,
        ]
        held += [c["ms_per_image"] for c in r.get("cost", [])]
        assert any(v is not None and f"{v:.{digits}f}" == figure for v in held), (figure, r["at"])


def test_it_has_what_was_measured_and_says_what_was_not(page: tuple[Path, dict[str, Any]]) -> None:
    text, done = page[0].read_text(), page[1]
    for name in done["machines"]:
        assert f"<h2>{html.escape(name)}</h2>" in text
    assert "Nothing: no row of a T4 exists yet" in text
    assert "Compiled, not run" in text
    assert "What each stage is worth" in text
    assert text.count("<svg") >= 5
    assert not done["faults"]


def test_machines_of_one_name_are_told_apart(page: tuple[Path, dict[str, Any]]) -> None:
    """By when they were measured, and with which torch and commit."""
    links = re.findall(r'<li><a href="#m\d+">(.*?)</a> <span>(.*?)</span>', page[0].read_text())
    assert [html.unescape(name) for name, _ in links] == page[1]["machines"]
    assert len({about for _, about in links}) == len(links)
    for _, about in links:
        assert re.fullmatch(r"[-0-9]{10}( to [-0-9]{10})?; torch \S+; commit [0-9a-f+, ]+; \d+ rows", about)


def test_the_gate_is_of_these_kernels() -> None:
    """`make gate` renders benchmarks/gate.jsonl: every kernel, as it is now, on every architecture, without a fault."""
    gate = [json.loads(line) for line in GATE.read_text().splitlines()]
    assert {r["kernel"]: r["digest"] for r in gate} == preflight.digests()
    assert len(gate) == len(preflight.digests()) * len(preflight.ARCHITECTURES)
    assert {r["sm"] for r in gate} == set(preflight.ARCHITECTURES)
    assert not any(r["fault"] for r in gate)


def test_a_browser_shows_it_on_a_screen_and_on_a_phone(
    page: tuple[Path, dict[str, Any]], browse: Callable[..., str], tmp_path: Path
) -> None:
    shots = {}
    for name, width, flags in (
        ("light", 1280, ()),
        ("dark", 1280, ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")),
        ("phone", 500, ()),
    ):
        file = tmp_path / f"{name}.png"
        browse(page[0].as_uri(), f"--screenshot={file}", f"--window-size={width},1600", *flags)
        with Image.open(file) as image:
            assert image.size == (width, 1600)
            shots[name] = np.asarray(image.convert("L"), np.float32)
    assert shots["light"].mean() > 200 > 80 > shots["dark"].mean()
    assert all(shot.std() > 10 for shot in shots.values()), "something is drawn"
    # a page that is wider than its frame would have to be moved sideways
    frame = tmp_path / "frame.html"
    document = "document.querySelector('iframe').contentDocument.documentElement"
    script = (
        f"onload=()=>{{let d={document}, svgs=[...d.querySelectorAll('svg')];"
        " let text=d.querySelector('svg text').getBoundingClientRect();"
        " let wide=svgs.filter(s=>s.getBoundingClientRect().width>s.parentNode.clientWidth).length;"
        " document.title=[d.scrollWidth,d.clientWidth,svgs.length,wide,Math.round(text.height)]}"
    )
    frame.write_text(
        '<iframe width="390" height="800"'
        f' srcdoc="{html.escape(page[0].read_text())}"></iframe><script>{script}</script>'
    )
    title = re.search(r"<title>(\d+(?:,\d+){4})</title>", browse(frame.as_uri(), "--dump-dom"))
    assert title is not None
    scroll, client, pictures, wide, letters = map(int, title[1].split(","))
    assert scroll <= client <= 390
    assert pictures >= 5
    assert wide == pictures, "a picture scrolls in its box, so that its letters are not shrunk with it"
    assert letters >= 12


def test_damage_and_failures_are_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "m" / "sampling.jsonl"
    common = head("sampling", preset="demo", steps=1, batch=1)
    append(path, [common | {"provider": "diffusers <b>", "dtype": "float32", "failed": "OutOfMemoryError: <script>"}])
    with path.open("a") as f:
        f.write('{"target": "samp')
    done = write_report([path], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert [f.split("/")[-1] for f in done["faults"]] == [
        "sampling.jsonl, line 2 is not a row: cut off or damaged, left out",
        "diffusers <b>: OutOfMemoryError: <script>",
    ]
    assert "diffusers &lt;b&gt;: OutOfMemoryError: &lt;script&gt;" in text
    assert "<script>" not in text
    assert "line 2 is not a row" in text


def test_no_rows_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows in"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
