"""ONNX graphs, run by the real ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sbldm_fast.export import export

from sbldm_fast import FastSampler, Pipeline
from sbldm_fast.data import prepare

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("demo")


@pytest.fixture(scope="module")
def latents(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Latents of brain slices, scaled: what the graphs meet in use."""
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["mni152"], folder, every=30, progress=False)
    images = torch.from_numpy(np.load(folder / "slices.npy")).float()[:3, None]
    with torch.no_grad():
        return pipeline.vae.encode(images).mean * pipeline.vae.config.scaling_factor


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, latents: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "o"
    export(pipeline, out, latents=latents)
    return out


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_manifest_is_the_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "unet.onnx", "vae_decoder.onnx"]
    assert manifest["opset"] == 18
    for graph in manifest["graphs"].values():
        assert graph["sha256"] == hashlib.sha256((folder / graph["file"]).read_bytes()).hexdigest()
        assert graph["parity_max_abs_error"] <= manifest["tolerance"] == 1e-4


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_graph_is_what_the_manifest_says(name: str, folder: Path) -> None:
    model = onnx.load(folder / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] == [18]
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert not [n for n in model.graph.node if n.op_type == "GroupNormalization"]
    assert all(v.type.tensor_type.shape.dim[0].dim_param for v in (*model.graph.input, *model.graph.output))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_unet_and_decoder_equal_torch_on_real_latents(batch: int, folder: Path, pipeline: Pipeline, latents: torch.Tensor) -> None:
    z = latents.repeat(2, 1, 1, 1)[:batch]
    t = torch.linspace(0, 999, batch).long()
    with torch.no_grad():
        expected = pipeline.unet(z, t), pipeline.decode(z)
    got = (
        session(folder / "unet.onnx").run(None, {"x": z.numpy(), "t": t.numpy()})[0],
        session(folder / "vae_decoder.onnx").run(None, {"z": z.numpy()})[0],
    )
    for ours, theirs in zip(expected, got, strict=True):
        assert np.abs(ours.numpy() - theirs).max() <= 1e-4


def test_a_loop_around_the_graphs_makes_the_pipelines_image(folder: Path, pipeline: Pipeline) -> None:
    unet, decoder = session(folder / "unet.onnx"), session(folder / "vae_decoder.onnx")

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(unet.run(None, {"x": x.numpy(), "t": t.expand(len(x)).numpy()})[0])

    z = FastSampler(model, pipeline.scheduler, shape=pipeline.latent_shape, steps=10)(1, seed=3)
    image = decoder.run(None, {"z": z.numpy()})[0]
    assert np.abs(image - pipeline.sample(1, seed=3, steps=10).numpy()).max() <= 1e-3


def test_bad_input_is_named_and_leaves_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target: got 'coreml', allowed are ort"):
        export(pipeline, tmp_path / "o", target="coreml")
    with pytest.raises(ValueError, match="latents: got 1, allowed is 2 or more"):
        export(pipeline, tmp_path / "o", latents=torch.zeros(1, 8, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_is_refused(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sbldm_fast.export.graphs as module

    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match=r"unet.onnx: ONNX Runtime differs from PyTorch by"):
        export(pipeline, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
