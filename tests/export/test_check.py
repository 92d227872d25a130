"""Folders that something is wrong with, and engines that are built, or not, in a process of their own."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from sbldm_fast.export import ORTSampler, check, export, rtx

from sbldm_fast import DDIMScheduler, Pipeline

Exported = Callable[..., Path]
RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="the tensorrt extra is not installed")


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    shutil.copytree(exported(target="ort"), tmp_path / "o")
    return tmp_path / "o"


def rewritten(folder: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The folder with one graph changed, and the manifest vouching for it."""
    model = onnx.load(folder / f"{name}.onnx")
    change(model)
    data = model.SerializeToString()
    (folder / f"{name}.onnx").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_sound_folder(folder: Path, pipeline: Pipeline) -> None:
    report = check(folder, pipeline)
    assert report["failures"] == report["remarks"] == []
    assert sorted(report["graphs"]) == ["sampler", "step", "unet", "vae_decoder", "vae_encoder"]
    for name, found in report["graphs"].items():
        assert 0 < found["error against the pipeline"] <= (1e-4 if name in ("step", "sampler", "vae_decoder") else 1e-3)
    assert report["graphs"]["unet"]["fused_norms"] == report["graphs"]["unet"]["norms"] > 10


def test_a_changed_byte_and_a_missing_graph(folder: Path) -> None:
    data = bytearray((folder / "unet.onnx").read_bytes())
    data[1000] ^= 4
    (folder / "unet.onnx").write_bytes(data)
    (folder / "vae_encoder.onnx").unlink()
    failures = check(folder)["failures"]
    assert len(failures) == 2
    assert "unet.onnx: its sha256 is not the one in manifest.json" in failures[0]
    assert "vae_encoder.onnx: No such file" in failures[1]


def test_a_graph_that_the_manifest_does_not_name(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["graphs"]["step"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert check(folder)["failures"] == ["manifest.json names no step.onnx"]


def test_an_example_that_was_changed(folder: Path) -> None:
    with (folder / "example.npz").open("ab") as file:
        file.write(b" ")
    failures = check(folder)["failures"]
    assert len(failures) == 1
    assert "example.npz: its sha256 is not the one" in failures[0]


def test_other_weights_are_found_by_parity(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))

    failures = check(rewritten(folder, "step", change))["failures"]
    assert len(failures) == 1
    assert failures[0].startswith("step.onnx: ONNX Runtime differs from example.npz by")


def test_another_pipeline_is_told_apart(folder: Path) -> None:
    failures = check(folder, Pipeline.from_pretrained("demo"))["failures"]
    latents, covariates = failures
    assert latents == "the pipeline's latents are [8, 16, 16], those of the folder [4, 8, 8]"
    assert covariates.startswith("the pipeline's covariates are age")


def test_the_pipeline_with_other_weights_is_told_apart(folder: Path, pipeline: Pipeline) -> None:
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        other.unet.conv_out.weight *= 1.01
        other.vae.encoder[0].weight *= 1.01
    failures = check(folder, other)["failures"]
    assert [f.split(":")[0] for f in failures] == ["step.onnx", "sampler.onnx", "unet.onnx", "vae_encoder.onnx"]
    assert all("differs from the pipeline by" in f for f in failures)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "unet",
            lambda m: m.graph.node.append(onnx.helper.make_node("Nonsense", ["x"], ["y"])),
            "unet.onnx: not valid: ",
        ),
        ("unet", lambda m: setattr(m.opset_import[0], "version", 17), "unet.onnx: (not valid|got opsets)"),
        (
            "unet",
            lambda m: m.graph.node.append(onnx.helper.make_node("Det", ["x"], ["det"])),
            "operators Det are not in the list of ort",
        ),
        (
            "step",
            lambda m: m.graph.node.append(onnx.helper.make_node("Shape", ["x"], ["s"])),
            "step.onnx: got Shape, allowed in a graph",
        ),
        (
            "sampler",
            lambda m: m.CopyFrom(
                onnx.helper.make_model(
                    onnx.helper.make_graph(
                        [onnx.helper.make_node("Identity", ["x"], ["y"])],
                        "g",
                        [onnx.helper.make_tensor_value_info("x", 1, [1])],
                        [onnx.helper.make_tensor_value_info("y", 1, [1])],
                    ),
                    opset_imports=[onnx.helper.make_opsetid("", 18)],
                )
            ),
            "sampler.onnx: allowed is exactly one Loop",
        ),
        (
            "vae_decoder",
            lambda m: setattr(m.graph.initializer[0], "data_location", onnx.TensorProto.EXTERNAL),
            "vae_decoder.onnx: it refers to other files",
        ),
    ],
)
def test_graphs_with_a_fault(folder: Path, name: str, change: Any, message: str) -> None:
    failures = check(rewritten(folder, name, change))["failures"]
    assert re.search(message, " | ".join(failures))


def test_step_with_a_free_axis_is_found(folder: Path) -> None:
    def free(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"

    assert "step.onnx: got a free axis, allowed are fixed shapes" in check(rewritten(folder, "step", free))["failures"]


def test_step_with_an_axis_without_a_size_is_found(folder: Path) -> None:
    def nameless(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].Clear()

    assert (
        "step.onnx: got a free axis, allowed are fixed shapes" in check(rewritten(folder, "step", nameless))["failures"]
    )


def test_external_weights_are_found_inside_a_loop_and_never_run(folder: Path) -> None:
    def outside(model: onnx.ModelProto) -> None:
        body = next(a.g for n in model.graph.node if n.op_type == "Loop" for a in n.attribute if a.name == "body")
        body.initializer[0].data_location = onnx.TensorProto.EXTERNAL

    rewritten(folder, "sampler", outside)
    assert any("sampler.onnx: it refers to other files" in f for f in check(folder)["failures"])
    with pytest.raises(ValueError, match="the graph refers to other files, allowed is one in a single file"):
        ORTSampler(folder, mode="sampler")


def test_a_norm_that_does_not_fuse_is_found(folder: Path) -> None:
    def unfused(model: onnx.ModelProto) -> None:
        norm = next(n for n in model.graph.node if n.op_type == "InstanceNormalization")
        twice = next(t for t in model.graph.initializer if t.name == norm.input[1])
        other = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(twice) * 2, twice.name + "_twice")
        model.graph.initializer.append(other)
        norm.input[1] = other.name

    failures = check(rewritten(folder, "unet", unfused))["failures"]
    assert any("unet.onnx: ONNX Runtime fuses" in f for f in failures)


@RTX
def test_engines_for_a_t4_are_built_in_half_precision(exported: Exported) -> None:
    report = check(exported(target="tensorrt", dtype="fp16"))
    assert report["failures"] == report["remarks"] == []
    for found in report["graphs"].values():
        assert found["engine for SM75"]["built"]
        assert found["engine for SM75"]["bytes"] > 10_000


@RTX
def test_the_known_limit_of_single_precision_is_a_remark(exported: Exported) -> None:
    report = check(exported(target="tensorrt", batch=3))
    assert report["failures"] == []
    assert any("unet.onnx: TensorRT-RTX has no float32 matrix product for SM75" in r for r in report["remarks"])
    assert report["graphs"]["unet"]["engine for default"]["built"]
    assert not report["graphs"]["unet"]["engine for SM75"].get("built")
    assert report["graphs"]["vae_encoder"]["engine for SM75"]["built"]
    assert report["graphs"]["vae_decoder"]["engine for SM75"]["built"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the builder ended with code -11"),
        ("import time; time.sleep(60)", "not built in 1 s"),
        ("print('{}')", "no answer"),
        ("import sys; sys.exit('out of memory')", "the builder ended with code 1 out of memory"),
        ('print(\'{"built": false, "why": "parse fail: DFT"}\')', "parse fail: DFT"),
    ],
)
def test_a_builder_that_crashes_hangs_or_refuses(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    (tmp_path / "builder.py").write_text(script)
    monkeypatch.setattr(rtx, "BUILDER", tmp_path / "builder.py")
    monkeypatch.setattr(rtx, "BUILD_SECONDS", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    export(tiny(), tmp_path / "o", target="tensorrt", dtype="fp16", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    failures = check(tmp_path / "o")["failures"]
    assert [
        f"{name}.onnx: TensorRT-RTX cannot build it for SM75: {why}" for name in ("unet", "sampler", "step")
    ] == failures


def test_the_known_limit_excuses_sm75_alone(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builder.py").write_text('print(\'{"why": "FP32 GEMM is not supported"}\')')
    monkeypatch.setattr(rtx, "BUILDER", tmp_path / "builder.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    export(tiny(), tmp_path / "o", target="tensorrt", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    report = check(tmp_path / "o")
    assert len(report["failures"]) == 3
    assert all("cannot build it for default: FP32 GEMM" in f for f in report["failures"])
    assert report["remarks"] == []


def test_without_the_extra_no_engine_is_claimed(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else real(name))
    report = check(exported(target="tensorrt", dtype="fp16"))
    assert report["remarks"] == ["no engine was built: pip install 'sbldm_fast[tensorrt]'"]
    assert not any("engine for SM75" in found for found in report["graphs"].values())
