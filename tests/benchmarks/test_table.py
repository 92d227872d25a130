"""Pages are their rows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sbldm_fast.benchmarks.charts import standalone, waterfall
from sbldm_fast.benchmarks.pages import headline, latency_table, render
from sbldm_fast.benchmarks.rows import append, latest, read_rows
from sbldm_fast.benchmarks.table import Table, fastest, gpu_summary, groups, sampling_table

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/benchmarks.md",
    "docs/sampling.md",
    "docs/rows.md",
    "docs/ablations.md",
    "benchmarks/GPU.md",
]


def test_the_pages_are_their_rows() -> None:
    for page in PAGES:
        assert render(ROOT / page) == (ROOT / page).read_text(), f"make results renders {page} anew"
    readme = (ROOT / "README.md").read_text()
    first_screen = readme[: readme.index("\n## What runs where")]
    assert "<!-- latency: benchmarks/results/" in first_screen, "the first screen has figures"
    benchmarks = (ROOT / "docs/benchmarks.md").read_text()
    for block in (
        "headline: ../benchmarks/results/",
        "sampling: ../benchmarks/results/",
        "gpus: ../benchmarks/results",
    ):
        assert f"<!-- {block}" in benchmarks
    assert "<!-- gpu: results -->" in (ROOT / "benchmarks/GPU.md").read_text()


def test_make_results_renders_every_page_with_figures() -> None:
    rendered = re.search(r"benchmarks\.pages (.+)", (ROOT / "Makefile").read_text())
    assert rendered is not None
    assert rendered[1].split() == PAGES
    pages = [page for folder in (".", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if "<!-- end " in page.read_text()} == set(PAGES)


def test_the_table_of_the_first_screen_is_short_and_says_its_basis() -> None:
    block = re.search(r"<!-- latency: .*?-->\n(.*?)<!-- end latency -->", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.startswith("|")]
    assert len(lines) - 2 <= 8
    assert lines[0].startswith("| machine | precision | fastest of ours | fastest peer | batch |")
    assert block[1].count("Preset `") == len({line.split("|")[1] for line in lines[2:]}), "a note for each machine"


@pytest.mark.parametrize(
    ("page", "kind", "picture", "word"),
    [
        ("docs/benchmarks.md", "headline", "waterfall.svg", "×"),
        ("docs/sampling.md", "few", "pareto.svg", "student"),
    ],
)
def test_the_pictures_are_of_the_rows_of_their_pages(page: str, kind: str, picture: str, word: str) -> None:
    """Words and figures; where matplotlib puts a line is its own affair."""
    rows = re.search(rf"<!-- {kind}: \.\./(\S+) -->", (ROOT / page).read_text())
    assert rows is not None
    drawn, kept = (
        re.findall(r"<text[^>]*>([^<]+)</text>", text)
        for text in (standalone(ROOT / rows[1]), (ROOT / "benchmarks" / picture).read_text())
    )
    assert drawn == kept
    assert any(text.endswith(word) for text in kept)


@pytest.mark.parametrize(
    ("page", "figure"),
    [
        ("README.md", "| float32 | "),
        ("docs/benchmarks.md", "| reference |"),
        ("docs/benchmarks.md", " ms a latent**"),
        ("docs/rows.md", "| `raw_s` |"),
    ],
)
def test_a_changed_figure_is_found(tmp_path: Path, page: str, figure: str) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    text = (ROOT / page).read_text()
    changed = text.replace(figure, f"{figure} 0.01 |", 1)
    assert changed != text
    (tmp_path / page).parent.mkdir(exist_ok=True)
    (tmp_path / page).write_text(changed)
    assert render(tmp_path / page) == text


def test_a_damaged_row_file_is_not_rendered(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"target": "samp')
    (tmp_path / "README.md").write_text("<!-- sampling: r.jsonl -->\n<!-- end sampling -->")
    with pytest.raises(ValueError, match="line 1 is not a row"):
        render(tmp_path / "README.md")


def test_markdown_by_hand() -> None:
    table = Table(["a"], ["b"], [["x", ("1", {})], ["y", "2"]], ["below"])
    assert table.markdown() == "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2 |\n\nbelow"


def test_presets_and_steps_are_not_mixed() -> None:
    rows = [
        {"target": "sampling", "preset": p, "steps": s}
        for p, s in (("demo", 50), ("paper", 10), ("paper", 50), ("paper", 10))
    ]
    assert [[(r["preset"], r["steps"]) for r in g] for g in groups(rows)] == [
        [("paper", 50)],
        [("paper", 10)] * 2,
        [("demo", 50)],
    ]


def test_figures_with_a_remark_are_marked() -> None:
    env = {"gpu": "x", "packages": {}, "commit": "c"}
    row = {
        "target": "sampling",
        "preset": "p",
        "steps": 1,
        "batch": 1,
        "run": "2026",
        "env": env,
        "n": 2,
        "median_s": 1.0,
        "ms_per_step": 1.0,
    }
    rows = [
        row | {"provider": "a", "remarks": ["spread 20%"]},
        row | {"provider": "b", "remarks": []},
        row | {"provider": "c", "absent": "gone"},
    ]
    text = sampling_table(rows).markdown()
    assert "| a | 1.00† |" in text
    assert "| b | 1.00 |" in text
    assert "†: an interquartile range of more than a tenth." in text
    assert "Without a figure: c (gone)." in text


def test_the_headline_by_hand() -> None:
    def row(provider: str, seconds: float, family: str = "ours", **what: Any) -> dict[str, Any]:
        base = {
            "batch": 1,
            "family": family,
            "steps": 50,
            "dtype": "float32",
            "parity": {"ok": True},
            "env": {"gpu": "NVIDIA T4"},
            "provider": provider,
        }
        return (
            base
            | {"median_s": seconds, "ms_per_image": 1e3 * seconds, "raw_s": [0.98 * seconds, seconds, 1.02 * seconds]}
            | what
        )

    rows = [
        row("FastSampler compile float32", 0.5),
        row("FastSampler wrong", 0.1, parity={"ok": False}),
        row("FastSampler half", 0.2, dtype="float16"),
        row("diffusers", 2.0, "peer"),
        row("diffusers torch.compile", 0.75, "peer"),
        row("diffusers under FastSampler compile", 0.4, "drop-in"),
    ]
    assert (
        headline(rows)
        == "**500 ms a latent** with `FastSampler compile float32`: 4.00 times as fast as diffusers' eager loop (2000"
        " ms), and 1.50 times as fast as the fastest peer timed (diffusers torch.compile, 750 ms); 50 DDIM steps,"
        " batch 1, float32, NVIDIA T4."
    )
    assert "and within the noise as fast as the fastest peer timed (MONAI, 510 ms)" in headline(
        [*rows, row("MONAI", 0.51, "peer")]
    )


def test_the_latency_table_by_hand(tmp_path: Path) -> None:
    """The smallest and the largest batch, each precision that has both; a figure of another run is left out."""
    env = {"gpu": "Tesla T4", "cpu": "x", "cores": 2, "threads": 2, "cpu_capability": "AVX2", "source": "b"}
    common = {"target": "sampling", "preset": "paper", "steps": 50, "env": env | {"packages": {}, "commit": "c"}}

    def row(provider: str, family: str, batch: int, seconds: float, run: str = "2026-12-02", **what: Any) -> Any:
        raw = [seconds * (1 + i / 100) for i in range(-3, 4)]
        timed = {"median_s": seconds, "p10_s": raw[0], "p90_s": raw[-1], "n": 7, "raw_s": raw, "remarks": []}
        per = {"ms_per_step": 20 * seconds, "ms_per_image": 1e3 * seconds / batch, "dtype": "float32"}
        held = {"parity": {"ok": True, "error": 0.0, "allowed": 1e-4, "against": "reference"}, "run": run}
        return common | timed | per | held | {"provider": provider, "family": family, "batch": batch} | what

    append(
        tmp_path / "r.jsonl",
        [
            row("MONAI", "peer", 1, 0.1, run="2026-12-01"),  # faster, but not timed in turns with ours
            row("FastSampler eager float32", "ours", 1, 0.5),
            row("diffusers", "peer", 1, 1.0),
            row("FastSampler eager float32", "ours", 4, 1.0),
            row("diffusers", "peer", 4, 1.0),
            row("FastSampler eager float32", "ours", 8, 2.0),
            row("diffusers", "peer", 8, 2.02),
            row("FastSampler eager float32 to images", "ours", 8, 1.0, decodes=True),
            row("FastSampler eager float16", "ours", 1, 0.2, dtype="float16"),
        ],
    )
    lines = [line for line in latency_table([tmp_path / "r.jsonl"]).markdown().splitlines() if line[:1] == "|"]
    ours = "| Tesla T4 | float32 | FastSampler eager float32 | diffusers |"
    assert lines[2:] == [f"{ours} 1 | 500 | 1000 | 2.00 |", f"{ours} 8 | 250 | 252 | 1.01 ~ |"]


def test_a_gpu_by_hand(tmp_path: Path) -> None:
    """A folder of rows from a card that nobody here has: its line in the README and its section, with every failure."""
    env = {
        "gpu": "Tesla T4",
        "cpu": "x",
        "cores": 2,
        "source": "b",
        "commit": "c",
        "packages": {"torch": "2.9.0", "triton": "3.5.0"},
    }
    env |= {"threads": 2, "cpu_capability": "AVX2"}
    common = {"run": "2026-12-01T00:00:00", "env": env}
    stale = common | {"env": env | {"source": "a"}}
    rows: list[dict[str, Any]] = [
        stale | {"target": "checks", "check": "of older sources", "ok": False, "error": 1.0, "allowed": 0.5},
        common | {"target": "checks", "check": "philox_normal", "ok": True, "error": 0.0, "allowed": 1e-5},
        common | {"target": "checks", "check": "diffuse", "failed": "RuntimeError: boom"},
        common | {"target": "checks", "check": "solver_step", "ok": False, "error": 2e-3, "allowed": 1e-5},
        common | {"target": "checks", "check": "loops", "absent": "no graphs"},
        common
        | {
            "target": "parity",
            "part": "parity: ops",
            "passed": 7,
            "skipped": 2,
            "failures": ["a::b: assert 1 == 2"],
            "seconds": 3.0,
        },
        common
        | {
            "target": "launches",
            "preset": "paper",
            "batch": 1,
            "dtype": "float16",
            "launches": 144.0,
            "us": 523.4,
            "modelled": {"launches": 137},
        },
    ]
    for batch, provider, dtype, seconds in (
        (1, "diffusers", "float32", 1.0),
        (1, "FastSampler loop-graph float16", "float16", 0.1),
        (64, "FastSampler loop-graph float16", "float16", 0.5),
    ):
        timed = dict.fromkeys(("median_s", "p10_s", "p90_s"), seconds) | {
            "n": 3,
            "raw_s": [seconds] * 3,
            "peak_bytes": 2**20,
            "remarks": [],
        }
        per = {"ms_per_step": 20 * seconds, "ms_per_image": 1e3 * seconds / batch, "images_per_s": batch / seconds}
        held = {
            "parity": {"ok": True, "error": 2e-4, "against": "reference"},
            "speedup": {"over": "diffusers", "factor": 1.0 / seconds} if batch == 1 else None,
        }
        what = {
            "target": "sampling",
            "preset": "paper",
            "steps": 50,
            "batch": batch,
            "provider": provider,
            "dtype": dtype,
        }
        rows.append(common | what | timed | per | held)
    for row in rows:
        path = tmp_path / "results" / "tesla-t4" / f"{row['target']}.jsonl"
        append(path, [row])
    (tmp_path / "README.md").write_text(
        "<!-- gpus: results -->\n<!-- end gpus -->\n<!-- gpu: results -->\n<!-- end gpu -->\n"
    )
    text = render(tmp_path / "README.md")
    assert "| Tesla T4 | 1 of 3 | 7 of 8 | -, 100 (10.00×) | -, 128 | torch 2.9.0, triton 3.5.0, 2026-12-01 |" in text
    assert "## Tesla T4\n\nChecks: 1 passed, 1 skipped, 2 failed.\n\n- FAIL diffuse: RuntimeError: boom\n\n" in text
    assert "\n- FAIL solver_step: error 2.0e-03, allowed 1.0e-05\n" in text
    assert "parity: ops: 7 passed, 2 skipped, 1 failed in 3 s.\n\n- FAIL a::b: assert 1 == 2" in text
    assert "| 1 | FastSampler loop-graph float16 | 2.000 | 10.0 | 1 | 2e-04 | 10.00 |" in text
    assert "A step, batch 1, float16: 144 launches (137 modelled), 523 µs of kernels." in text
    assert "of older sources" not in text
    assert gpu_summary([], left=["all"]) == "Nothing was measured.\n\nNot done, the same command goes on: all.\n"
    ended = gpu_summary(rows, {"energy": 1}, ["training"])
    assert ended.endswith("Parts that failed: energy (exit 1).\n\nNot done, the same command goes on: training.\n")
    cut = gpu_summary([*rows, rows[5] | {"code": None}])
    assert "parity: ops: cut off, until then 7 passed" in cut


def test_the_picture_has_the_bars_of_the_headline() -> None:
    """Our fastest way and the fastest peer, of which the sentence speaks, are in the chart with the same figures."""
    rows = groups(latest(read_rows(ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "sampling.jsonl")[0]))[0]
    linked: list[str] = []
    picture = waterfall(rows, "float32", lambda row: linked.append(row["at"]) or "")
    assert picture is not None
    for row in fastest(rows, "float32"):
        assert row is not None
        assert row["at"] in linked
        assert f"{row['ms_per_image']:.0f} ms" in headline(rows)
        assert f">{row['ms_per_image']:.0f} ms  " in picture


@pytest.mark.parametrize("kind", ["latency", "sampling", "headline"])
def test_a_file_without_rows_is_one_sentence(kind: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("")
    (tmp_path / "README.md").write_text(f"<!-- {kind}: r.jsonl -->\n<!-- end {kind} -->")
    with pytest.raises(ValueError, match="got no rows"):
        render(tmp_path / "README.md")


def test_a_machine_without_a_peer_has_no_line_in_the_latency_table(tmp_path: Path) -> None:
    rows = read_rows(ROOT / "benchmarks/results/amd-epyc-2-cores/sampling.jsonl")[0][:1]
    append(tmp_path / "r.jsonl", rows)
    (tmp_path / "README.md").write_text("<!-- latency: r.jsonl -->\n<!-- end latency -->")
    assert "| AMD" not in render(tmp_path / "README.md")


def test_a_page_that_cannot_be_rendered_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"target": "samp')
    (tmp_path / "README.md").write_text("<!-- sampling: r.jsonl -->\n<!-- end sampling -->")
    command = [sys.executable, "-m", "sbldm_fast.benchmarks.pages", str(tmp_path / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("pages: ")
    assert "line 1 is not a row" in done.stderr
    assert len(done.stderr.splitlines()) == 1
