"""The notebook, top to bottom, in a process of its own that has the host's packages, at the sizes of a machine without
a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = (
        pytest.importorskip(name, reason="the notebook is run through nbclient") for name in ("nbclient", "nbformat")
    )
    from jupyter_client.manager import AsyncKernelManager

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # the host: its own Python, which finds the packages of this one but no sbldm_fast
    venv.create(tmp_path / "host", with_pip=False)
    python = tmp_path / "host" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(site.stdout.strip()) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = subprocess.run(
        [python, "-c", "import torch, sbldm_fast"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "No module named 'sbldm_fast'" in missing.stderr
    # what is not committed yet is in the copy too
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("SBLDM_FAST_SOURCE", str(source))
    notebook = nbformat.read(ROOT / "benchmarks" / "kaggle_t4.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[0] = str(python)
    client = nbclient.NotebookClient(
        notebook, km=kernel, timeout=420, resources={"metadata": {"path": str(tmp_path / "work")}}
    )
    client.execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "installed; PyTorch is still" in printed
    assert "mode auto    16 images of 12 steps: " in printed
    assert re.search(r"\| 2 \| FastSampler eager float32 \| [\d.]+†? \| [\d.]+ \|", printed)
    shown = [
        o["data"]["text/html"]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    assert any("iframe" in s and "How fast is it here" in s for s in shown)
    with tarfile.open(tmp_path / "work" / "sbldm_fast-checkout" / "gpu" / "gpu.tar.gz") as archive:
        assert "rows.jsonl" in archive.getnames()


def test_it_is_for_those_who_say_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "benchmarks" / "kaggle_t4.ipynb").read_text()
    assert "github.com" not in text, "no address is published yet"
    assert sys.executable not in text
