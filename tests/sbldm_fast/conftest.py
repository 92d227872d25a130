"""The command line, for all tests of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sbldm_fast.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line; exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["sbldm-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        code = stop.value.code
        # sys.exit with a text prints it and exits with 1
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return call
