"""Graphs of a model that can be asked: its names, the images of PyTorch, the second pass where it is wanted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sbldm_fast.export import ORTSampler, check, export

from sbldm_fast import DDIMScheduler, Pipeline

from ..sbldm_fast.small import ASKED, small_pipeline

COND: dict[str, Any] = {"age": [30.0, None, 50.0], "modality": ["T2", "T1", None]}
MAPS = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path]:
    """Rows beside those of time, for ONNX Runtime, one pass; an example in which something is unknown."""
    pipeline, out = small_pipeline(ASKED), tmp_path_factory.mktemp("plain") / "onnx"
    export(pipeline, out, steps=3, cond={"age": [30.0, None, 50.0, 61.0], "modality": ["T2", "T1", None, "T1"]})
    return pipeline, out


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path]:
    """Cross-attention and maps, for TensorRT, in batches of 2, guided."""
    config = replace(ASKED, conditioning=("cross_attention",), concat_channels=2)
    pipeline, out = small_pipeline(config), tmp_path_factory.mktemp("guided") / "onnx"
    export(pipeline, out, steps=3, target="tensorrt", batch=2, guidance=True)
    return pipeline, out


@pytest.mark.parametrize("mode", ["step", "sampler"])
def test_what_is_asked_is_what_pytorch_makes(plain: Any, guided: Any, mode: str) -> None:
    pipeline, out = plain
    ort = ORTSampler(out, mode=mode)
    for cond in (COND, {"age": 30.0}, {}, None):
        made = torch.from_numpy(ort(3, seed=1, cond=cond))
        torch.testing.assert_close(made, pipeline.sample(3, seed=1, steps=3, cond=cond), rtol=0, atol=1e-4)
    pipeline, out = guided
    ort, cond = ORTSampler(out, mode=mode), COND | {"maps": MAPS}
    made = torch.from_numpy(ort(3, seed=1))  # nothing is known, maps are 0
    torch.testing.assert_close(made, pipeline.sample(3, seed=1, steps=3), rtol=0, atol=1e-4)
    for scale in (None, 2.5):
        made = torch.from_numpy(ort(3, seed=1, cond=cond, guidance_scale=scale))
        expected = pipeline.sample(3, seed=1, steps=3, cond=cond, guidance_scale=scale)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_coarser_arithmetic_follows_what_is_asked(dtype: str, tmp_path: Path) -> None:
    """Its error is less than half of what the condition changes; an age that fp16 cannot tell from its neighbour is
    told, since numbers enter in float32."""
    config = replace(ASKED, block_out_channels=(16, 128)) if dtype == "int8" else ASKED
    pipeline, out = small_pipeline(config), tmp_path / "onnx"
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    export(pipeline, out, steps=3, batch=3, dtype=dtype)
    ort = ORTSampler(out, mode="step")
    expected, unasked = (pipeline.sample(3, seed=1, steps=3, cond=cond, mode="eager") for cond in (COND, None))
    error = torch.from_numpy(ort(3, seed=1, cond=COND)) - expected
    assert 1e-6 < error.square().mean() ** 0.5 < 0.5 * (expected - unasked).square().mean() ** 0.5
    assert ort(1, seed=1, cond={"age": 70.0}).tobytes() != ort(1, seed=1, cond={"age": 70.01}).tobytes()


def test_a_student_is_exported_with_the_steps_that_it_knows(tmp_path: Path) -> None:
    student = small_pipeline(replace(ASKED, distilled_steps=4))
    export(student, tmp_path / "o")
    solver = json.loads((tmp_path / "o" / "manifest.json").read_text())["solver"]
    assert solver["timesteps"] == [999, 749, 499, 249]
    got = torch.from_numpy(ORTSampler(tmp_path / "o")(3, seed=1, cond=COND))
    assert float((got - student.sample(3, seed=1, cond=COND)).abs().max()) <= 1e-4
    with pytest.raises(ValueError, match="steps: got 5 model calls, allowed for this network is 4"):
        export(student, tmp_path / "p", steps=5)


def test_the_manifest_says_what_can_be_asked(plain: Any, guided: Any) -> None:
    manifest = json.loads((plain[1] / "manifest.json").read_text())
    age, modality = manifest["covariates"]
    assert (age["name"], age["low"], age["high"], age["unit"], age["definition"]) == (
        "age",
        20,
        80,
        "years",
        "at the scan",
    )
    assert modality["values"] == ["T1", "T2", "FLAIR"]
    for name in ("unet", "step", "sampler"):
        inputs = manifest["graphs"][name]["inputs"]
        assert inputs["cond_age"] | {"shape": []} == {
            "dtype": "float32",
            "shape": [],
            "range": "20 to 80 years; NaN: unknown",
        }
        assert not any(key.startswith(("uncond", "guidance")) for key in inputs)
    assert inputs["cond_modality"]["range"] == "0: T1, 1: T2, 2: FLAIR; NaN: unknown"
    inputs = json.loads((guided[1] / "manifest.json").read_text())["graphs"]["step"]["inputs"]
    assert {"cond_age", "uncond_modality", "cond_maps", "uncond_maps", "guidance_scale"} <= inputs.keys()


def test_both_folders_pass_their_check(plain: Any, guided: Any) -> None:
    """Alone and with the pipeline, which is asked as the example was; another pipeline is told apart."""
    assert check(plain[1], build=False)["failures"] == []
    for pipeline, out in (plain, guided):
        report = check(out, pipeline, build=False)
        assert report["failures"] == []
        assert report["not_compared"] == []
    other = replace(ASKED, covariates=ASKED.covariates[:1])
    for pipeline, said in (
        (small_pipeline(), "the pipeline's covariates are none and 0 maps, those of the folder age"),
        (small_pipeline(other), r"the pipeline's covariates are age \(20 to 80 years\) and 0 maps, those of"),
        (guided[0], "and 2 maps, those of the folder age"),
    ):
        (failure,) = check(plain[1], pipeline, build=False)["failures"]
        assert re.search(said, failure)


def test_beyond_what_it_was_trained_on_only_where_that_is_asked_for(plain: Any) -> None:
    pipeline, out = plain
    with pytest.warns(UserWarning, match="90 lies outside 20 to 80 years"):
        made = torch.from_numpy(ORTSampler(out)(1, seed=1, cond={"age": 90}, extrapolate=True))
    with pytest.warns(UserWarning, match="90 lies outside 20 to 80 years"):
        expected = pipeline.sample(1, seed=1, steps=3, cond={"age": 90}, extrapolate=True)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_the_condition_is_worked_out_before_the_loop(plain: Any) -> None:
    """In the loop of `sampler` the rows are added, and nothing is looked up or embedded: no IsNaN inside."""
    import onnx

    graph = onnx.load(plain[1] / "sampler.onnx").graph
    outside = [node.op_type for node in graph.node]
    loop = next(node for node in graph.node if node.op_type == "Loop")
    inside = [node.op_type for node in loop.attribute[0].g.node]
    assert outside.count("IsNaN") >= 2
    assert "IsNaN" not in inside
    assert "Conv" in inside


def test_what_cannot_be_asked_is_named(plain: Any, guided: Any, tmp_path: Path) -> None:
    ort = ORTSampler(plain[1])
    for arguments, said in (
        ({"cond": {"weight": 3}}, "cond: got 'weight', allowed are age, modality"),
        ({"cond": {"age": 90}}, r"cond\['age'\]: got 90, the model was trained on 20 to 80 years"),
        ({"cond": np.zeros((2, 2), np.float32)}, "cond: got ndarray, allowed is a mapping of age, modality"),
        (
            {"cond": {"age": 30}, "guidance_scale": 2.0},
            "guidance_scale: got 2.0, allowed is None: it was exported without",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            ort(2, **arguments)
    with pytest.raises(ValueError, match=r"cond: got .* allowed is one row each of"):
        ORTSampler(guided[1])(2, cond={"age": 30})  # no maps
    unasked = torch.from_numpy(ORTSampler(guided[1])(2, seed=1))
    torch.testing.assert_close(unasked, guided[0].sample(2, seed=1, steps=3), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="guidance: got True, allowed without conditioning is False"):
        export(small_pipeline(), tmp_path / "o", guidance=True)
    assert not (tmp_path / "o").exists()


def test_a_manifest_whose_covariates_are_no_covariates_is_named(plain: Any, tmp_path: Path) -> None:
    content = json.loads((plain[1] / "manifest.json").read_text())
    for value, said in (
        ([{"name": "age", "low": 3.0, "high": 1.0}], "covariates: Covariate: age is from"),
        ([{"name": "age"}], "cond: got"),
        ("age", "covariates: got 'age', allowed is a list of mappings"),
    ):
        folder = tmp_path / "f"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(content | {"covariates": value}))
        with pytest.raises(ValueError, match=said):
            ORTSampler(folder)
