"""What a reader relies on: how large the house is, how long its files and functions are, and who laid them out.

python tests/test_house.py     the lines of each folder, against their budgets
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("kernels", "sbldm_fast", "export", "benchmarks", "examples")
# the most lines of the files of some folders, tests apart
BUDGETS = {
    "library": (9_700, ("kernels", "sbldm_fast/models", "sbldm_fast/diffusion", "sbldm_fast/sampling")),
    "export": (2_360, ("export",)),
    "workshop": (
        15_600,
        ("sbldm_fast", "sbldm_fast/data", "sbldm_fast/training", "sbldm_fast/evaluation", "benchmarks"),
    ),
}
FILE, FUNCTION, ARGUMENTS = 400, 60, 8
LONG_FILES = {
    "kernels/group_norm_silu.py": "one op in one file: its eleven arguments are written out by the reference, the"
    " operator, three overloads, the function and the module",
    "tests/kernels/test_fuzz.py": "a property of each op, in one place",
}
LONG_FUNCTIONS = {
    "kernels/solver_step.py:_solver_step_kernel": "a kernel is one function",
    "sbldm_fast/data/prepare.py:prepare": "what a user calls: half of it is its docstring",
    "sbldm_fast/training/stages.py:train_pipeline": "what a user calls: half of it is its docstring",
    "export/exporter.py:export": "what a user calls: half of it is its docstring",
}
MANY_ARGUMENTS = {
    "sbldm_fast/cli.py:sample": "a command: an argument is an option",
    "sbldm_fast/cli.py:population": "a command: an argument is an option",
    "sbldm_fast/cli_bench.py:bench": "a command: an argument is an option",
    "sbldm_fast/cli_evaluate.py:ablate": "a command: an argument is an option",
    "sbldm_fast/cli_evaluate.py:evaluate": "a command: an argument is an option",
    "sbldm_fast/cli_export.py:export": "a command: an argument is an option",
    "sbldm_fast/cli_train.py:distill": "a command: an argument is an option",
    "sbldm_fast/cli_train.py:prepare": "a command: an argument is an option",
    "sbldm_fast/cli_train.py:train": "a command: an argument is an option",
    "sbldm_fast/cli_train.py:train_volume": "a command: an argument is an option",
    "sbldm_fast/data/prepare.py:prepare": "what a user calls",
    "sbldm_fast/sampling/pipeline.py:sample": "what a user calls",
    "sbldm_fast/sampling/pipeline.py:sample_volume": "what a user calls",
    "sbldm_fast/sampling/request.py:__init__": "the arguments of FastSampler's call",
    "sbldm_fast/sampling/sampler.py:__init__": "what a user calls",
    "sbldm_fast/sampling/sampler.py:__call__": "what a user calls",
    "sbldm_fast/training/distill.py:distill_pipeline": "what a user calls",
    "sbldm_fast/training/stages.py:train_pipeline": "what a user calls",
    "export/exporter.py:export": "what a user calls",
    "export/ort.py:stream": "what a user calls: as FastSampler's",
    "benchmarks/suite_sampling.py:bench_sampling": "a suite: an argument is an option of bench",
}


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def count(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in (ROOT / folder).glob("*.py"))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, text in sources(*SOURCES):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node


def test_every_folder_is_in_a_budget() -> None:
    folders = {name.rpartition("/")[0] for name, _ in sources("kernels", "sbldm_fast", "export", "benchmarks")}
    assert folders == {folder for _, of in BUDGETS.values() for folder in of}


@pytest.mark.parametrize("part", BUDGETS)
def test_a_part_of_the_house_keeps_its_budget(part: str) -> None:
    most, folders = BUDGETS[part]
    lines = {folder: count(folder) for folder in folders}
    assert min(lines.values()) > 0
    print(f"{part}: {sum(lines.values())} of {most} lines, {lines}")
    assert sum(lines.values()) <= most, lines


def test_long_files_are_those_with_a_reason() -> None:
    long = {name for name, text in sources(*SOURCES, "tests") if len(text.splitlines()) > FILE}
    assert long == set(LONG_FILES)


def test_long_functions_are_those_with_a_reason() -> None:
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION}
    assert long == set(LONG_FUNCTIONS)


def test_functions_of_many_arguments_are_those_with_a_reason() -> None:
    """Kernels and the functions around one take what it takes."""
    many = set()
    for name, node in functions():
        a = node.args
        given = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
        if len(given) > ARGUMENTS and not name.startswith("kernels/"):
            many.add(name)
    assert many == set(MANY_ARGUMENTS)


def test_files_that_a_module_reads_beside_itself_are_installed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    read = [
        (name.split("/")[0], file)
        for name, text in sources("kernels", "export", "benchmarks")
        for file in re.findall(r'__file__\)\.with_name\("([\w.]+)"\)', text)
        if not file.endswith(".py")
    ]
    assert len(read) >= 4
    assert [(folder, file) for folder, file in read if file not in data[f"sbldm_fast.{folder}"]] == []


def test_no_line_is_kept_from_the_formatter() -> None:
    for name, text in sources(*SOURCES, "tests"):
        assert not re.search(r"# *fmt: *(skip|off)", text), name


def test_the_width_is_that_of_the_field() -> None:
    assert "line-length = 120" in (ROOT / "pyproject.toml").read_text()


if __name__ == "__main__":
    for part, (most, folders) in BUDGETS.items():
        lines = {folder: count(folder) for folder in folders}
        print(f"{part:9} {sum(lines.values()):6} of {most:6}  {', '.join(f'{k} {v}' for k, v in lines.items())}")
