"""A manifest that is damaged, or lies, is one sentence with its file and key, before anything is run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sbldm_fast.export import ORTSampler, check, export
from sbldm_fast.export.manifest import read_manifest

from .conftest import SDE

GONE = object()
WRONG = (GONE, None, "x", [], -1, 10**30, 1e308, float("nan"))


@pytest.fixture(scope="module")
def sound(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a solver with history and noise and of a model with conditioning: a manifest with everything in
    it."""
    out = tmp_path_factory.mktemp("sound") / "o"
    export(tiny(), out, scheduler=SDE(), steps=3, shape=(3, 8, 8), cond=torch.randn(2, 5), batch=2)
    return out


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "o"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, and of every mapping and list, in a manifest; of a list's values the first stands for
    all."""
    if path:
        yield path
    for key, each in (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    ):
        yield from leaves(each, (*path, key))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    out = copy.deepcopy(manifest)
    where: Any = out
    for key in path[:-1]:
        where = where[key]
    if value is GONE:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return out


def test_every_value_may_be_anything(folder: Path) -> None:
    """Whatever stands in a manifest, it is refused by a ValueError that names the file, or sampling and checking
    work."""
    file, ran, refused = folder / "manifest.json", 0, list[str]()
    manifest = json.loads(file.read_text())
    for path in leaves(manifest):
        unread = (
            path[0] in ("notice", "license", "versions", "model")
            or path[-1] in ("range", "bytes")
            or path[:1] == ("example",)
        )
        for value in WRONG[:1] if unread else WRONG:
            file.write_text(json.dumps(changed(manifest, path, value)))
            try:
                read_manifest(folder)
            except ValueError as error:
                refused.append(str(error))
                continue
            ran += 1
            assert isinstance(check(folder)["failures"], list)  # it samples in both modes
    assert len(refused) > 400
    assert all(str(file) in text for text in refused)
    assert ran > 50


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format",), 1, "format: got 1, allowed is 2"),
        (("graphs", "../../etc/passwd"), {}, "graphs: got .*allowed is a mapping with names of unet, step, sampler"),
        (("target",), "coreml", "target: got 'coreml', allowed is one of ort, tensorrt"),
        (("opset",), "18", "opset: got '18', allowed is a whole number"),
        (("latent_shape", 0), -3, r"latent_shape: got \[-3, 8, 8\], allowed is \[C, H, W\] or \[C, D, H, W\]"),
        (
            ("graphs", "step", "inputs", "x", "dtype"),
            GONE,
            r"graphs\.step\.inputs: got .*allowed is dtype and shape by name",
        ),
        (
            ("graphs", "step", "inputs", "x"),
            GONE,
            r"graphs\.step\.inputs: got .*allowed is .*x, as solver and cond say",
        ),
        (
            ("graphs", "step", "parity", "allowed"),
            float("nan"),
            r"graphs\.step\.parity: got .*allowed is error and allowed",
        ),
        (
            ("graphs", "sampler", "inputs", "x", "dtype"),
            "float64",
            r"graphs\.sampler\.inputs\.x\.dtype: got 'float64', allowed is float32",
        ),
        (("cond", ""), [6], r"graphs\.unet\.inputs\.cond\.shape: got \['batch', 5\], allowed is \['batch', 6\]"),
        (
            ("solver", "timesteps"),
            [900.5, 500.0, 1.0],
            r"graphs\.unet\.inputs\.t\.dtype: got 'int64', allowed is float32, as solver says",
        ),
    ],
)
def test_the_file_and_the_key_are_named(folder: Path, path: tuple[Any, ...], value: object, says: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(changed(manifest, path, value)))
    for use in (ORTSampler, check):
        with pytest.raises(ValueError, match=rf"manifest\.json: {says}"):
            use(folder)


def test_the_old_spelling_of_license_is_read(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["licence"] = manifest.pop("license")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    content = read_manifest(folder).content
    assert content["license"] == "not stated"
    assert "licence" not in content
    assert ORTSampler(folder).manifest == content


def test_a_table_of_fewer_rows_than_step_has_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("timesteps", "rows", "input_scale", "alpha", "sigma"):
        manifest["solver"][key] = manifest["solver"][key][:2]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"graphs\.step\.inputs\.timesteps\.shape: got \[3\], allowed is \[2\]"):
        ORTSampler(folder, mode="sampler")


def test_a_graph_that_is_none_is_named(folder: Path) -> None:
    """Bytes that the manifest vouches for and that are no graph, or a graph with other inputs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    other = (folder / "unet.onnx").read_bytes()
    for data, says in ((b"\xff" * 90, r"step\.onnx: not an ONNX graph"), (other, r"its inputs, outputs are not")):
        (folder / "step.onnx").write_bytes(data)
        manifest["graphs"]["step"]["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=says):
            ORTSampler(folder)
        assert any(f.startswith("step.onnx: ") for f in check(folder)["failures"])


def test_examples_of_other_arrays_are_a_failure(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    zero = np.zeros((4, 3, 8, 8), np.float32)
    whole = {"noise": zero, "latents": zero, "cond": zero[:, 0, 0, :5]}
    for arrays in ({"noise": zero}, whole | {"noise": zero[:, :2]}, whole | {"latents": zero[:3]}, None):
        if arrays is None:
            (folder / "example.npz").write_bytes(b"PK\x03\x04 no archive")
        else:
            np.savez(folder / "example.npz", **arrays)
        manifest["example"]["sha256"] = hashlib.sha256((folder / "example.npz").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        failures = check(folder)["failures"]
        assert len(failures) == 1
        assert "example.npz: " in failures[0]


def test_a_pipe_for_a_graph_is_refused(folder: Path) -> None:
    (folder / "step.onnx").unlink()
    os.mkfifo(folder / "step.onnx")
    with pytest.raises(ValueError, match=r"step\.onnx: not a file; the manifest names it"):
        ORTSampler(folder)
