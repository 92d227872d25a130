"""The pages keep what they say: links, paths, commands, code, environment variables, names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer

from sbldm_fast.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/GPU.md")),
    )
)
SOURCES = ("kernels", "sbldm_fast", "export", "benchmarks")


def text_of(page: Path) -> str:
    return (ROOT / page).read_text()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parts(page: Path) -> Iterator[tuple[str | None, str]]:
    """The fenced blocks of a page with what stands behind the opening fence, and None with the text between them."""
    for i, part in enumerate(re.split(r"^```", text_of(page), flags=re.M)):
        if i % 2:
            language, _, code = part.partition("\n")
            yield language, code
        else:
            yield None, part


def code_blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page in one of these languages."""
    return [code for language, code in parts(page) if language in languages]


def commands() -> Iterator[tuple[str, str]]:
    """Every line of a page that is typed into a shell, and every piece of code in a sentence."""
    for page in PAGES:
        for language, text in parts(page):
            lines = re.findall(r"`([^`\n]+)`", text) if language is None else text.splitlines() if not language else []
            for line in lines:
                yield from ((str(page), part.strip()) for part in line.partition(" #")[0].split("&&"))


OURS = sorted(
    {
        (page, line.partition(start)[2])
        for page, line in commands()
        for start in ("sbldm-fast ", "-m sbldm_fast ")
        if line.startswith((start, f"python {start}", f"torchrun --nproc-per-node=2 {start}"))
    }
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path with a folder is one of the repository; a bare name of a module is that of one at least."""
    for name in re.findall(r"`([\w./*-]+\.(?:py|toml|ipynb|html\.jinja))`", text_of(page)):
        found = any(ROOT.glob(name)) if "/" in name else any(next((ROOT / s).rglob(name), None) for s in SOURCES)
        assert found or (ROOT / name).exists(), f"{page}: {name}"


def test_there_are_commands() -> None:
    assert len(OURS) > 20
    assert {line.split()[0] for _, line in OURS} >= {c.name for c in app.registered_commands if c.name}


@pytest.mark.parametrize(("page", "line"), OURS)
def test_commands_of_ours_are_understood(page: str, line: str) -> None:
    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="sbldm-fast")
    name, command, arguments = group.resolve_command(context, shlex.split(line))
    if arguments and "--help" not in arguments:  # in a sentence a command may stand for itself
        command.make_context(name, arguments, parent=context)


def test_other_commands_exist() -> None:
    targets = set(re.findall(r"^([\w/.]+):", (ROOT / "Makefile").read_text(), re.M))
    for page, line in commands():
        if match := re.match(r"make (\w+)", line):
            assert match[1] in targets, f"{page}: {line}"
        if match := re.search(r"python -m (sbldm_fast[\w.]*)", line):
            assert importlib.util.find_spec(match[1]) is not None, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_compiles(page: Path) -> None:
    for code in code_blocks(page, "python", "python run"):
        ast.parse(code)


@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p, "python run")], ids=str)
def test_python_that_is_marked_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for code in code_blocks(page, "python run"):
        exec(compile(code, str(page), "exec"), {})


def test_the_first_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At two steps."""
    (code,) = code_blocks(Path("README.md"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    small = code.replace("sample(8, seed=0,", "sample(8, seed=0, steps=2,")
    assert small != code
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "samples.png").is_file()


def test_every_environment_variable_has_its_line() -> None:
    read = set()
    for path in (p for folder in (*SOURCES, "tests") for p in (ROOT / folder).rglob("*.py")):
        if path.is_relative_to(ROOT / "tests") and "conftest" not in path.name:
            continue
        read |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"(\w+)\"", path.read_text()))
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", text_of(Path("docs/environment.md"))))
    assert read <= listed, "an environment variable that is read and not listed"
    used = [
        p.read_text()
        for folder in (*SOURCES, "tests")
        for p in (ROOT / folder).rglob("*.*py*")
        if p.suffix in (".py", ".ipynb")
    ]
    assert {name for name in listed if not any(name in text for text in used)} <= {"CXX"}, "one that nothing reads"


def test_messages_that_are_explained_exist() -> None:
    """The pieces of a message between dots, of the first column of the page, are in the sources."""
    sources = [p.read_text() for folder in SOURCES for p in (ROOT / folder).rglob("*.py")]
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", text_of(Path("docs/troubleshooting.md")), re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]*\.\.\.[^`]*)`", row)]
    assert len(messages) >= 9
    for message in messages:
        for piece in filter(None, (piece.strip() for piece in message.split("..."))):
            assert any(piece in text for text in sources), f"{message}: {piece}"


def test_names_of_the_walks_are_those_of_the_code() -> None:
    sources = [p.read_text() for folder in SOURCES for p in (ROOT / folder).rglob("*.py")]
    walks = text_of(Path("docs/architecture.md")).partition("## Six walks")[2].partition("## Decisions")[0]
    for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", walks):
        last = name.rpartition(".")[2]
        assert (ROOT / name).exists() or any(re.search(rf"\b{last}\b", text) for text in sources), name


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.findall(r"^\| `([\w-]+)` \| .+ \|$", text_of(Path("docs/troubleshooting.md")), re.M)
    assert set(listed) == set(extras)


def test_every_op_stands_in_its_places() -> None:
    """Those of the recipe in CONTRIBUTING.md."""
    ops = [path.stem for path in (ROOT / "kernels").glob("*.py") if "@torch.library" in path.read_text()]
    ops = [op for op in ops if not op.endswith("_backward")]
    assert len(ops) >= 7
    named = ("kernels/__init__.py", "benchmarks/suite_kernels.py", "sbldm_fast/doctor.py", "docs/kernels.md")
    for op in [*ops, "<op>"]:
        for place in (f"kernels/{op}.py", f"tests/kernels/test_{op}.py", f"benchmarks/bench_{op}.py"):
            assert (ROOT / place).exists() if op in ops else f"`{place}`" in text_of(Path("CONTRIBUTING.md")), place
    for op, place in product(ops, (*named, "tests/kernels/test_fuzz.py", "kernels/launches.json")):
        assert op in (ROOT / place).read_text(), f"{op} is not in {place}"


def public_modules() -> list[str]:
    """Those that `make docs` describes."""
    line = re.search(r"^PUBLIC := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert line is not None
    return line[1].split()


@pytest.mark.parametrize("name", public_modules())
def test_the_reference_has_every_public_name(name: str) -> None:
    pdoc = pytest.importorskip("pdoc")
    module = importlib.import_module(name)
    described = pdoc.doc.Module(module)
    public = getattr(module, "__all__", None) or [
        key for key, value in vars(module).items() if getattr(value, "__module__", "") == name and key[0] != "_"
    ]
    assert public
    pdoc.render.configure(docformat="google", template_directory=ROOT / "docs" / "reference")
    page = pdoc.render.html_module(described, all_modules={name: described})
    for key in public:
        assert f'id="{key}"' in page, f"{name}.{key} is not in the reference"
        value = getattr(module, key)
        if callable(value) and not inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name}.{key} has no docstring"
