"""ONNX Runtime's fusion of norms: all of them, free or fixed batch, float32 or float16."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from sbldm_fast.export import check, export
from sbldm_fast.export.fusion import fuse_group_norms, nodes, quiet
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler


@pytest.mark.parametrize("name", ["unet", "step", "vae_encoder", "vae_decoder"])
def test_every_norm_fuses_and_no_shape_is_left(exported: Callable[..., Path], name: str) -> None:
    folder = exported(target="ort")
    entry = json.loads((folder / "manifest.json").read_text())["graphs"][name]
    data, count = fuse_group_norms((folder / f"{name}.onnx").read_bytes())
    kinds = Counter(node.op_type for node in nodes(onnx.load_model_from_string(data).graph))
    assert count == kinds["GroupNorm"] + kinds["SkipGroupNorm"] == entry["norms"] > 0
    assert not kinds["InstanceNormalization"]
    assert not kinds["Shape"]


def test_norms_between_casts_fuse_too(tiny: Any, tmp_path: Path) -> None:
    manifest = export(tiny(), tmp_path / "o", dtype="fp16", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    for name in ("unet", "step"):
        assert manifest["graphs"][name]["fused_norms"] == manifest["graphs"][name]["norms"] == 1


class Reshaped(nn.Module):
    """A norm whose groups are cut from what another reshape has read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 3 * 8 * 8), nn.GroupNorm(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h: Tensor = self.linear(x.mean(1).mean(1)).reshape(-1, 3, 8, 8)
        return x + self.norm(h)


class Shared(nn.Module):
    """One norm twice, which ONNX Runtime's optimiser cannot sort."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h: Tensor = self.norm(self.conv(nn.functional.silu(self.norm(self.conv(x)))))
        return h


@pytest.mark.parametrize("model", [Reshaped, Shared])
def test_a_foreign_form_is_exported_whether_it_fuses_or_not(model: type[nn.Module], tmp_path: Path, capfd: Any) -> None:
    torch.manual_seed(0)
    manifest = export(model(), tmp_path / "o", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    for name in ("unet", "step"):
        entry = manifest["graphs"][name]
        assert entry["norms"] == (1 if model is Reshaped else 2)
        assert 0 <= entry["fused_norms"] <= entry["norms"]
    report = check(tmp_path / "o")
    assert report["failures"] == []
    assert len(report["remarks"]) == sum(
        g["fused_norms"] < g["norms"] for g in (manifest["graphs"][n] for n in ("unet", "step"))
    )
    assert capfd.readouterr().out == ""


def test_loggers_are_left_as_they_were() -> None:
    before = logging.getLogger().level, logging.getLogger("torch.onnx").level
    with quiet("", "torch.onnx"):
        assert logging.getLogger().level == logging.ERROR
    assert (logging.getLogger().level, logging.getLogger("torch.onnx").level) == before


def test_nodes_of_inner_graphs_are_seen(exported: Callable[..., Path]) -> None:
    graph = onnx.load(exported(target="ort") / "sampler.onnx").graph
    assert sum(n.op_type == "Conv" for n in nodes(graph)) > sum(n.op_type == "Conv" for n in graph.node) > 0
