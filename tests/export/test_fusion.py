"""ONNX Runtime's fusion of norms: all of them, free or fixed batch, float32 or float16."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from sbldm_fast.export import export
from sbldm_fast.export.fusion import fused, nodes

from sbldm_fast import DDIMScheduler


@pytest.mark.parametrize("name", ["unet", "step", "vae_encoder", "vae_decoder"])
def test_every_norm_fuses_and_no_shape_is_left(exported: Callable[..., Path], name: str) -> None:
    folder = exported(target="ort")
    entry = json.loads((folder / "manifest.json").read_text())["graphs"][name]
    data, count = fused((folder / f"{name}.onnx").read_bytes())
    kinds = Counter(node.op_type for node in nodes(onnx.load_model_from_string(data).graph))
    assert count == kinds["GroupNorm"] + kinds["SkipGroupNorm"] == entry["norms"] > 0
    assert not kinds["InstanceNormalization"]
    assert not kinds["Shape"]


def test_norms_between_casts_fuse_too(tiny: Any, tmp_path: Path) -> None:
    manifest = export(tiny(), tmp_path / "o", dtype="fp16", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    for name in ("unet", "step"):
        assert manifest["graphs"][name]["fused_norms"] == manifest["graphs"][name]["norms"] == 1


def test_nodes_of_inner_graphs_are_seen(exported: Callable[..., Path]) -> None:
    graph = onnx.load(exported(target="ort") / "sampler.onnx").graph
    assert sum(n.op_type == "Conv" for n in nodes(graph)) > sum(n.op_type == "Conv" for n in graph.node) > 0
