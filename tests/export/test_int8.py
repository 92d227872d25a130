"""int8 of wide convolutions, on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from sbldm_fast.export import ORTSampler, check, export

from sbldm_fast import Pipeline, UNet2D


def test_wide_convolutions_are_int8_and_the_images_stay(pipeline: Pipeline, tmp_path: Path) -> None:
    config = replace(pipeline.unet.config, block_out_channels=(128,), attention_resolutions=())
    pipeline, folder = Pipeline(pipeline.vae, UNet2D(config).eval(), pipeline.scheduler), tmp_path / "o"
    export(pipeline, folder, dtype="int8", batch=2, steps=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["dtype"] for name, entry in manifest["graphs"].items()} == {
        "unet": "int8",
        "step": "int8",
        "sampler": "fp32",
        "vae_encoder": "fp32",
        "vae_decoder": "fp32",
    }
    for name in ("unet", "step"):
        graph = onnx.load(folder / f"{name}.onnx").graph
        made, constant = {o: n for n in graph.node for o in n.output}, {t.name: t for t in graph.initializer}
        for node in (n for n in graph.node if n.op_type == "Conv"):
            source = made.get(node.input[1])
            weight = constant[node.input[1] if source is None else source.input[0]]
            assert (weight.data_type == onnx.TensorProto.INT8) == (weight.dims[0] >= 128)
    assert check(folder)["failures"] == []
    expected = pipeline.sampler(4, "eager")(3, seed=9).numpy()
    got = ORTSampler(folder, mode="step")(3, seed=9)
    error = np.sqrt(np.mean((got - expected) ** 2))
    assert 1e-6 < error <= 2e-2  # it is quantized, and within what the export allows
    assert np.abs(ORTSampler(folder, mode="sampler")(3, seed=9) - expected).max() <= 1e-4
