"""What a reader relies on: the formatter laid out every file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_line_is_kept_from_the_formatter() -> None:
    for folder in ("kernels", "sbldm_fast", "export", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"# *fmt: *(skip|off)", path.read_text()), path.relative_to(ROOT)


def test_the_width_is_that_of_the_field() -> None:
    assert "line-length = 120" in (ROOT / "pyproject.toml").read_text()
