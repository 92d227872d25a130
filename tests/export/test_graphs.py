"""Folders of ONNX graphs, run by the real ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from sbldm_fast.export import ORTSampler, check, export
from sbldm_fast.export.fusion import nodes
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, FastSampler, Pipeline
from sbldm_fast.data import prepare

FILES = [
    "example.npz",
    "manifest.json",
    "sampler.onnx",
    "step.onnx",
    "unet.onnx",
    "vae_decoder.onnx",
    "vae_encoder.onnx",
]
Exported = Callable[..., Path]


def run(path: Path, **given: Any) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in given.items()}
    return session.run(None, arrays)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("target", "opset"), [("ort", 18), ("tensorrt", 21)])
def test_the_manifest_is_the_folder(exported: Exported, pipeline: Pipeline, target: str, opset: int) -> None:
    folder = exported(target=target, **({"batch": 3} if target == "tensorrt" else {}))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert manifest["opset"] == opset
    assert manifest["model"]["unet"] == json.loads(json.dumps(pipeline.unet.config.to_dict()))
    for name, entry in manifest["graphs"].items():
        data = (folder / f"{name}.onnx").read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["bytes"] == len(data)
        assert entry["parity"]["error"] <= entry["parity"]["allowed"]
        model = onnx.load_model_from_string(data)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert not list(folder.glob("*.data"))
        assert b"site-packages" not in data
        assert b"/export/" not in data
        kinds = {node.op_type for node in nodes(model.graph)}
        assert ("GroupNormalization" in kinds) == (target == "tensorrt")
        assert entry.get("norms") == entry.get("fused_norms")
    assert manifest["graphs"]["vae_decoder"]["parity"]["allowed"] == 1e-4
    assert check(folder, build=False)["failures"] == []


def test_free_axes_have_names_and_step_has_none(exported: Exported) -> None:
    shapes = {
        name: {k: v["shape"] for k, v in entry["inputs"].items()}
        for name, entry in json.loads((exported(target="ort") / "manifest.json").read_text())["graphs"].items()
    }
    assert shapes["unet"] == {"x": ["batch", 4, 8, 8], "t": ["batch"]}
    assert shapes["vae_encoder"] == {"image": ["batch", 1, 16, 16]}
    assert shapes["vae_decoder"] == {"z": ["batch", 4, 8, 8]}
    assert shapes["sampler"] == {"x": ["batch", 4, 8, 8], "timesteps": ["steps"], "table": ["steps", 6]}
    assert shapes["step"] == {"x": [1, 4, 8, 8], "timesteps": [4], "table": [4, 6], "index": [1]}


def test_a_fixed_batch_is_fixed_everywhere_for_tensorrt(exported: Exported) -> None:
    folder = exported(target="tensorrt", batch=3)
    for name, entry in json.loads((folder / "manifest.json").read_text())["graphs"].items():
        first = next(iter(entry["inputs"].values()))
        assert first["shape"][0] == 3, name
        assert not any(isinstance(n, str) for v in entry["inputs"].values() for n in v["shape"] if n != "steps")


@pytest.mark.parametrize("N", [1, 2, 5])
def test_unet_and_autoencoder_at_any_batch(exported: Exported, pipeline: Pipeline, N: int) -> None:
    folder = exported(target="ort")
    x, t, image = torch.randn(N, 4, 8, 8), torch.linspace(0, 999, N).long(), torch.rand(N, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(image)
        expected = [pipeline.unet(x, t), pipeline.decode(x), posterior.mean * 2]
    got = [
        run(folder / "unet.onnx", x=x, t=t)[0],
        run(folder / "vae_decoder.onnx", z=x)[0],
        run(folder / "vae_encoder.onnx", image=image)[0],
    ]
    for ours, theirs in zip(got, expected, strict=True):
        assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * max(1.0, float(theirs.abs().max()))


def test_the_sampler_takes_another_number_of_steps(exported: Exported, pipeline: Pipeline) -> None:
    from sbldm_fast.export.modules import table_inputs

    sampler = pipeline.sampler(9, "eager")
    noise = torch.randn(2, *pipeline.latent_shape)
    got = run(exported(target="ort") / "sampler.onnx", x=noise, **table_inputs(sampler.table))[0]
    assert np.abs(got - sampler(noise=noise).numpy()).max() <= 1e-4


def test_real_scans_through_the_bundled_encoder_and_decoder(ms_scans: Path, tmp_path: Path) -> None:
    from sbldm_fast.export.graphs import Networks, Run, build_graphs
    from sbldm_fast.export.ort import open_session
    from sbldm_fast.export.trace import onnx_bytes

    pipeline = Pipeline.from_pretrained("demo")
    prepare([str(ms_scans)], tmp_path / "d", every=60, progress=False)
    images = torch.from_numpy(np.load(tmp_path / "d" / "slices.npy")).float()[:3, None]
    with torch.no_grad():
        latents = pipeline.vae.encode(images).mean * pipeline.vae.config.scaling_factor
        table = pipeline.sampler(2, "eager").table
        networks = Networks.of(pipeline, torch.float32)
        graphs = build_graphs(networks, table, Run(latents, images, {}, latents, []), None, "ort")
        expected = pipeline.decode(latents)
    encoded = open_session(onnx_bytes("vae_encoder", graphs["vae_encoder"], 18)).run(None, {"image": images.numpy()})[0]
    decoded = open_session(onnx_bytes("vae_decoder", graphs["vae_decoder"], 18)).run(None, {"z": encoded})[0]
    assert np.abs(encoded - latents.numpy()).max() <= 1e-4
    assert np.abs(decoded - expected.numpy()).max() <= 1e-4


def test_half_precision_lives_in_the_graph(exported: Exported) -> None:
    folder = exported(target="tensorrt", dtype="fp16")
    model = onnx.load(folder / "unet.onnx")
    weights = {t.name: t.data_type for t in model.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {weights[n.input[1]] for n in model.graph.node if n.op_type == "Conv"} == {half}
    assert {weights[n.input[1]] for n in model.graph.node if n.op_type == "GroupNormalization"} == {single}
    made = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type == "Softmax":
            before = made[node.input[0]]
            assert before.op_type == "Cast"
            assert before.attribute[0].i == single
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type in (single, onnx.TensorProto.INT64)
    body = next(
        a.g
        for n in onnx.load(folder / "sampler.onnx").graph.node
        if n.op_type == "Loop"
        for a in n.attribute
        if a.name == "body"
    )
    types = {t.name: t.data_type for t in body.initializer}
    assert {types[n.input[1]] for n in body.node if n.op_type == "GroupNormalization"} == {single}
    parity = json.loads((folder / "manifest.json").read_text())["graphs"]["unet"]["parity"]
    assert parity["error"] > 1e-6  # it is half precision


def foreign(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if kind == "diffusers":
        return (
            diffusers.UNet2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=3,
                layers_per_block=1,
                block_out_channels=(16,),
                norm_num_groups=4,
                attention_head_dim=8,
                down_block_types=("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",),
            ),
            diffusers.DDIMScheduler(),
        )
    conditioned = (
        {"with_conditioning": True, "cross_attention_dim": 8, "transformer_num_layers": 1}
        if "conditioned" in kind
        else {}
    )
    model = DiffusionModelUNet(
        spatial_dims=3 if "volumes" in kind else 2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=1,
        channels=(16,),
        attention_levels=(True,),
        norm_num_groups=4,
        num_head_channels=8,
        **conditioned,
    )
    for parameter in model.parameters():
        if not parameter.any():  # MONAI's last convolutions start at zero
            nn.init.normal_(parameter, std=0.05)
    return model, diffusers.DPMSolverMultistepScheduler() if conditioned else DDIMScheduler(clip_sample=True)


@pytest.mark.parametrize("kind", ["diffusers", "monai", "monai conditioned", "monai conditioned volumes"])
def test_foreign_models(kind: str, tmp_path: Path) -> None:
    model, scheduler = foreign(kind)
    cond = torch.randn(4, 2, 8) if "conditioned" in kind else None
    target, dtype = ("tensorrt", "fp16") if kind == "monai" else ("ort", "fp32")
    shape = (3, 4, 6, 2) if "volumes" in kind else (3, 8, 8)
    export(model, tmp_path / "o", target=target, dtype=dtype, scheduler=scheduler, steps=3, shape=shape, cond=cond)
    assert check(tmp_path / "o", build=False)["failures"] == []
    if dtype == "fp16":
        return
    asked = {} if cond is None else {"cond": cond[:3], "guidance_scale": torch.tensor([1.0, 2.0, 3.0])}
    expected = FastSampler(model, scheduler, shape=shape, steps=3, mode="eager")(3, seed=2, **asked)
    for mode in ("step", "sampler"):
        got = ORTSampler(tmp_path / "o", mode=mode)(3, seed=2, **asked)
        assert np.abs(got - expected.numpy()).max() <= 2e-4 * max(1.0, float(expected.abs().max()))


def test_a_graph_that_overflows_in_half_precision_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny()
    nn.init.constant_(model.conv_out.weight, 3e4)
    export(model, tmp_path / "fp32", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    with pytest.raises(
        ValueError, match=r"unet.onnx: NaN or infinity in fp16, first out of module model.conv_out; allowed .* is fp32"
    ):
        export(model, tmp_path / "fp16", dtype="fp16", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["fp32"]


def test_a_graph_that_differs_is_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbldm_fast.export import verify

    monkeypatch.setitem(verify.TOLERANCE, "fp32", 0.0)
    with pytest.raises(ValueError, match=r"unet.onnx: ONNX Runtime differs from PyTorch by"):
        export(tiny(), tmp_path / "o", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "coreml"}, "target: got 'coreml', allowed are ort, tensorrt"),
        ({"dtype": "bf16"}, "dtype: got 'bf16', allowed are fp32, fp16, int8"),
        ({"dtype": "int8", "target": "tensorrt"}, "dtype: got int8 for tensorrt, allowed is ort"),
        ({"batch": 0}, "batch: got 0, allowed is 1 to 65536, or 'dynamic'"),
        ({"batch": "two"}, "batch: got 'two', allowed is 1 to 65536, or 'dynamic'"),
        ({"steps": 0}, "steps: got 0, allowed is 1 to num_train_timesteps = 1000"),
        ({"scheduler": "euler"}, "scheduler: got 'euler', allowed are ddim"),
        ({"shape": (4, 8, 8)}, "shape: got .* allowed with a pipeline is None"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(
    pipeline: Pipeline, tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(pipeline, tmp_path / "o", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_are_named(tiny: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"source: got str, allowed is a Pipeline or a torch\.nn\.Module"):
        export("demo", tmp_path / "o")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape, scheduler: got None, None, allowed with a model alone are"):
        export(tiny(), tmp_path / "o")
    with pytest.raises(ValueError, match=r"shape, cond: got \(4, 8, 8\), .* which the model does not take"):
        export(tiny(), tmp_path / "o", scheduler=DDIMScheduler(), shape=(4, 8, 8))
    with pytest.raises(ValueError, match="got UnCLIPScheduler, allowed is one that a SolverTable describes"):
        export(pipeline, tmp_path / "o", scheduler=diffusers.UnCLIPScheduler())
    vae = replace(pipeline.vae.config, norm_num_groups=1)
    with pytest.raises(ValueError, match="target: got 'tensorrt' for a norm of one group"):
        export(Pipeline(AutoencoderKL(vae), pipeline.unet, pipeline.scheduler), tmp_path / "o", target="tensorrt")
    with pytest.raises(
        ValueError, match="target: got 'tensorrt' for a norm of one group, which TensorRT takes for an instance norm"
    ):
        export(tiny(num_groups=1), tmp_path / "o", target="tensorrt", scheduler=DDIMScheduler(), shape=(3, 8, 8))
    with pytest.raises(ValueError, match="dtype: got int8 for a model without convolutions of 128 channels or more"):
        export(tiny(), tmp_path / "o", dtype="int8", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_ours_is_kept(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app"}')
    arguments = {"scheduler": DDIMScheduler(), "steps": 2, "shape": (3, 8, 8)}
    with pytest.raises(ValueError, match=r"file is a file, allowed is a folder"):
        export(tiny(), tmp_path / "file", force=True, **arguments)
    with pytest.raises(ValueError, match=r"folder holds thesis.txt, which no export wrote; .* --force"):
        export(tiny(), tmp_path / "folder", **arguments)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"app holds manifest.json, which no export wrote"):
        export(tiny(), tmp_path / "app", **arguments)
    monkeypatch.chdir(tmp_path / "folder")
    for here in (".", ".."):
        with pytest.raises(ValueError, match="is the current folder or holds it, allowed is another"):
            export(tiny(), here, force=True, **arguments)
    monkeypatch.chdir(tmp_path)
    export(tiny(), tmp_path / "folder", force=True, **arguments)
    assert not (tmp_path / "folder" / "thesis.txt").exists()
    before = (tmp_path / "folder" / "manifest.json").stat().st_ino
    export(tiny(), tmp_path / "folder", **arguments)  # what an export wrote may be written again
    assert (tmp_path / "folder" / "manifest.json").stat().st_ino != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["app", "file", "folder"]


def test_the_callers_pipeline_stays_as_it_is(tiny: Any, tmp_path: Path) -> None:
    model = tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, tmp_path / "o", dtype="fp16", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert model.training
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_but_the_folder_is_left(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the working directory, nor beside the folder, nor among the temporary files."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    export(tiny(), tmp_path / "out" / "o", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "out", "temporary"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["o"]
    assert not [*(tmp_path / "here").iterdir(), *(tmp_path / "temporary").iterdir()]
