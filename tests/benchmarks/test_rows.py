"""Rows: only ever added, whole or named as damaged, and the last run of each problem."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks.providers import providers
from sbldm_fast.benchmarks.report import write_report
from sbldm_fast.benchmarks.rows import (
    append,
    distribute,
    head,
    latest,
    machine,
    machine_id,
    machine_name,
    main,
    read_rows,
    row_key,
    source,
)
from sbldm_fast.benchmarks.schema import FAMILIES, RowSchema, described
from sbldm_fast.benchmarks.table import gpu_summary, gpus_table, sampling_table
from sbldm_fast.benchmarks.verdicts import compare

ENV = {
    "gpu": None,
    "cpu": "AMD EPYC",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "packages": {},
    "commit": "",
    "source": "",
}
RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.jsonl"))


def row(run: str = "1", **what: Any) -> dict[str, Any]:
    common = {"target": "sampling", "run": run, "preset": "p", "batch": 1, "steps": 2, "provider": "a", "env": ENV}
    return common | {"absent": "not timed"} | what


def test_results_are_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "m" / "r.jsonl"
    append(path, [row(provider=p, x=1) for p in "ab"])
    append(path, [row("2", x=2)])
    rows, faults = read_rows(path)
    assert [r["x"] for r in rows] == [1, 1, 2]
    assert [r["at"] for r in rows] == ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]
    assert [r["x"] for r in latest(rows)] == [2]
    assert not faults


def test_a_line_that_was_cut_off_is_named_and_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [row(x=1), row(x=2)])
    whole = path.read_bytes()
    for cut in (1, 10, len(whole) // 2 - 5):
        path.write_bytes(whole[:-cut])
        append(path, [row(x=3)])
        rows, faults = read_rows(path)
        assert [r["x"] for r in rows] == ([1, 2, 3] if cut == 1 else [1, 3])
        assert faults == ([] if cut == 1 else [f"{path}, line 2 is not a row: cut off or damaged, left out"])


@pytest.mark.parametrize("text", ["[1]\n", "3\n", '"target"\n', "\x00\x01\n", "{\n"])
def test_what_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    assert read_rows(path)[0] == []
    assert len(read_rows(path)[1]) == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_a_log_of_training_beside_rows_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "demo-training.jsonl"
    path.write_text('{"stage": "vae", "step": 50}\n')
    assert read_rows(path) == ([], [])


def test_problems_are_told_apart() -> None:
    rows = [row(batch=1), row("2", batch=8), row("3", batch=8), row("4", batch=8, steps=9), row("5", target="export")]
    assert [r["run"] for r in latest(rows)] == ["1", "3", "4", "5"]
    kernels = [row(target="kernels", op="x", shape="1", layout="nchw", dtype=d) for d in ("float32", "float16")]
    assert len({row_key(r) for r in kernels}) == 2


def test_a_row_says_where_it_is_from() -> None:
    env = head("sampling", steps=3)["env"]
    assert env["packages"]["torch"]
    assert env["source"] == source()
    assert len(source()) == 12
    assert env["gpu"] or env["no_gpu"]


def test_machine_names_are_folder_names() -> None:
    info = machine()
    assert machine_name(info).replace("-", "").isalnum()
    assert machine_name({"gpu": "NVIDIA H200", "cpu": "", "cores": 1}) == "nvidia-h200"
    assert (
        machine_name({"gpu": None, "cpu": "Intel(R) Xeon(R) Processor", "cores": 2}) == "intel-xeon-processor-2-cores"
    )


def test_machines_of_one_name_are_told_apart() -> None:
    env = {"gpu": None, "cpu": "AMD EPYC", "cores": 2, "threads": 2, "cpu_capability": "AVX2"}
    assert machine_id(env) == "AMD EPYC, 2 cores, 2 threads, AVX2"
    assert machine_id(env | {"cpu_model": "26/2/1"}) != machine_id(env)
    assert machine_id(env | {"gpu": "NVIDIA H200"}).startswith("NVIDIA H200, AMD")


def test_rows_of_any_machine_find_their_place_once(tmp_path: Path) -> None:
    """From one file of several machines and suites into benchmarks/results; again, nothing."""
    card = ENV | {"gpu": "Tesla T4"}
    asked = enumerate([("sampling", card), ("checks", card), ("sampling", card), ("sampling", ENV)], 1)
    rows = [row("2026-01-01", target=target, env=env, n=n, check="a") for n, (target, env) in asked]
    append(tmp_path / "rows.jsonl", rows)
    results = tmp_path / "results"
    counts = {"tesla-t4/sampling.jsonl": 2, "tesla-t4/checks.jsonl": 1, "amd-epyc-2-cores/sampling.jsonl": 1}
    assert distribute(tmp_path / "rows.jsonl", results) == (counts, [])
    assert [r["n"] for r in read_rows(results / "tesla-t4/sampling.jsonl")[0]] == [1, 3]
    before = (results / "tesla-t4/sampling.jsonl").read_bytes()
    assert b'"at"' not in before
    with (tmp_path / "rows.jsonl").open("a") as f:
        f.write('{"target": "sampling", "run"')
    added, faults = distribute(tmp_path / "rows.jsonl", results)
    assert added == dict.fromkeys(counts, 0)
    assert faults[0].endswith("line 5 is not a row: cut off or damaged, left out")
    assert (results / "tesla-t4/sampling.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(row(target="../../x")), r"target '\.\./\.\./x', allowed is a word"),
        ('{"target": "sampling", "run"', "has no rows; .*line 1 is not a row"),
        (json.dumps(row(env=ENV | {"gpu": "漢字"})), "got a machine '漢字'"),
        (json.dumps(row(env={"gpu": None})), "has no rows; .*line 1: env: got "),
        ("", "has no rows"),
    ],
)
def test_a_file_that_is_not_of_rows_changes_nothing(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says):
        distribute(tmp_path / "rows.jsonl", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == source()
    append(tmp_path / "rows.jsonl", [row(env=ENV | {"gpu": "Tesla T4"})])
    assert main([str(tmp_path / "rows.jsonl"), str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out == "1 new rows in tesla-t4/sampling.jsonl\n"
    with (tmp_path / "rows.jsonl").open("a") as f:
        f.write('{"target"')  # of a run that was killed: what is whole is taken
    assert main([str(tmp_path / "rows.jsonl"), str(tmp_path / "results")]) == 0
    assert "line 2 is not a row: cut off or damaged, left out" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.jsonl"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"rows: {tmp_path / 'absent.jsonl'} cannot be read")
    assert main(["one"]) == 2
    assert "usage: " in capsys.readouterr().err


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a row, of a list's the first."""
    if path:
        yield path
    for key, each in (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    ):
        yield from leaves(each, (*path, key))


def changed(row: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    out = copy.deepcopy(row)
    where: Any = out
    for key in path[:-1]:
        where = where[key]
    if value is ...:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return out


def test_every_committed_row_is_one() -> None:
    for path in RESULTS:
        assert not read_rows(path)[1], path


def test_a_row_with_anything_in_it_costs_no_more_than_itself(tmp_path: Path) -> None:
    """Whatever a value of a row is, the row is left out by a sentence, or page, tables, verdicts and folders take
    it."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in RESULTS:
        for found in read_rows(path)[0]:
            kinds.setdefault((found["target"], found.get("op") == "ceilings", "cost" in found, "work" in found), found)
    rows = [
        changed(kind, path, value)
        for i, kind in enumerate(kinds.values())
        for path in leaves(kind)
        if path[0] != "env" or i == 0  # the same in all, and each other machine has pictures of its own
        for value in (..., None, "x", [], 0, -1, 1e308, float("nan"), 10**30)
    ]
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*kinds.values(), *rows]))
    taken, faults = read_rows(file)
    assert len(taken) > 500
    assert len(faults) > 2000
    assert all(fault.startswith(f"{file}, line ") and ", allowed is " in fault for fault in faults)
    assert write_report([tmp_path / "m"], tmp_path / "r.html")["rows"] > len(kinds) / 2
    assert compare(taken, taken)
    assert sampling_table([r for r in taken if r["target"] in ("sampling", "export")]).markdown()
    assert gpu_summary(taken)
    file.write_text("".join(json.dumps(r) + "\n" for r in taken if r["target"].isalpha()))
    assert gpus_table(tmp_path).body
    assert distribute(file, tmp_path / "results")[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000, "line 1 is not a row: cut off or damaged"),
        (
            '{"target": "sampling", "run": "1", "env": {}, "n": ' + "9" * 5000 + "}",
            "line 1 is not a row: cut off or damaged",
        ),
        (json.dumps({"target": "sampling", "run": "1", "env": ENV}), r"line 1: \w+: got none, allowed is "),
        (json.dumps(row(provider="\ud800")), "line 1: 'provider': got half a character"),
        (json.dumps(row(provider=None)), "line 1: provider: got None, allowed is a text"),
        (json.dumps(row(run=3)), "line 1: run: got 3, allowed is a text"),
        (json.dumps(row(env="x")), "line 1: env: got 'x', allowed is a mapping with gpu"),
        (json.dumps(row(target=["sampling"])), r"line 1: target: got \['sampling'\], allowed is a text"),
        (json.dumps(row(extra=float("nan"))), "line 1: extra: got nan, allowed is a number"),
        ('{"target": "sampling", "run": "1", "env": ' + "[" * 50 + "]" * 50 + "}", "line 1: "),
    ],
    ids=["deep", "digits", "bare", "surrogate", "provider", "run", "env", "target", "nan", "levels"],
)
def test_a_malformed_row_is_named_by_file_line_and_key(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{line}\n{json.dumps(row(x=1))}\n")
    rows, faults = read_rows(path)
    assert [r["x"] for r in rows] == [1]
    assert len(faults) == 1
    assert re.search(says, faults[0])
    assert str(path) in faults[0]


def test_a_pipe_or_a_folder_for_a_file_of_rows_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, why in (("pipe", "not a file"), ("folder", "Is a directory")):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl cannot be read: {why}"):
            read_rows(tmp_path / f"{name}.jsonl")
    append(tmp_path / "r.jsonl", [row()])
    assert write_report([tmp_path], tmp_path / "r.html")["rows"] == 1


def test_the_schema_names_every_key_of_every_committed_row() -> None:
    known = {f.name for f in fields(RowSchema)}
    for path in RESULTS:
        for found in read_rows(path)[0]:
            assert not found.keys() - known - {"at"}, path


def test_the_family_of_a_provider_is_a_field() -> None:
    for path in RESULTS:
        for found in read_rows(path)[0]:
            if "provider" in found and found["target"] != "solvers":
                assert found["family"] in FAMILIES, path
    who = list(providers(torch.device("cpu"), [torch.float32, torch.bfloat16]))
    assert {p.family for p in who} == {"ours", "reference", "peer", "drop-in"}


def test_the_schema_can_be_read() -> None:
    for name, kind, _, meaning in described():
        assert name
        assert kind
        assert meaning
