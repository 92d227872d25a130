"""One module to one ONNX file, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from sbldm_fast.export import export
from sbldm_fast.export.modules import UNetGraph
from sbldm_fast.export.trace import Graph, onnx_bytes
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler


class NoForm(nn.Module):
    """A model with an operator that ONNX does not have, in a submodule."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), self.Inner())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Branching(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unet: operator aten.special_bessel_j0.default in module model.block.1 .* has no ONNX form"
    ):
        export(NoForm(), tmp_path / "o", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"torch.export cannot trace StepGraph: .*data-dependent"):
        export(Branching(), tmp_path / "o", scheduler=DDIMScheduler(), steps=2, shape=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_a_loop_are_in_its_body(exported: Callable[..., Path]) -> None:
    graph = onnx.load(exported(target="ort") / "sampler.onnx").graph
    body = next(a.g for n in graph.node if n.op_type == "Loop" for a in n.attribute if a.name == "body")
    inside, outside = ({t.name for t in g.initializer} for g in (body, graph))
    assert not inside & outside
    assert all(n.input[1] in inside for n in body.node if n.op_type == "Conv")
    assert all(n.input[1] in outside for n in graph.node if n.op_type == "Conv")


def test_free_axes_are_named_also_where_two_are_one() -> None:
    class Both(nn.Module):
        def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sum": given["a"] + given["b"], "all": torch.cat([given["a"], given["c"]], dim=1)}

    given = {"a": torch.ones(2, 3), "b": torch.ones(2, 3), "c": torch.ones(2, 4)}
    data = onnx_bytes(
        "g", Graph(Both(), given, {"a": {0: "batch"}, "b": {0: "batch"}, "c": {0: "batch", 1: "length"}}), 18
    )
    graph = onnx.load_model_from_string(data).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes["a"] == shapes["b"] == shapes["sum"] == ["batch", 3]
    assert shapes["c"] == ["batch", "length"]
    assert shapes["all"] == ["batch", "length + 3"]


@pytest.mark.parametrize("need_weights", [False, True])
def test_softmax_of_an_attention_module_is_float32(need_weights: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = x.flatten(2)
            out: Tensor = self.attention(h, h, h, need_weights=need_weights)[0].reshape(x.shape)
            return out

    with torch.no_grad():
        given = {"x": torch.randn(2, 3, 2, 4), "t": torch.zeros(2)}
        data = onnx_bytes("unet", Graph(UNetGraph(Attends(), torch.float16), given, {}), 21)
    graph = onnx.load_model_from_string(data).graph
    made = {o: n for n in graph.node for o in n.output}
    before = [made[n.input[0]] for n in graph.node if n.op_type == "Softmax"]
    assert [(n.op_type, n.attribute[0].i) for n in before] == [("Cast", onnx.TensorProto.FLOAT)]
