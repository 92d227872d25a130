"""One module to one ONNX file: free axes by name, weights where ONNX Runtime wants them, nothing of the machine
inside."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from sbldm_fast.errors import UserError
from sbldm_fast.images import NOTICE

from .fusion import quiet
from .modules import Tensors


class Graph(NamedTuple):
    """A graph to write: its module, an example of its inputs, which of their axes are free."""

    module: nn.Module
    given: Tensors
    free: dict[str, dict[int, str]]


def program(name: str, graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch.export has it.

    Raises:
        ValueError: it cannot be traced; the message says why.
    """
    free = {k: dict.fromkeys(graph.free.get(k, {}), torch.export.Dim.DYNAMIC) for k in graph.given}
    try:
        return torch.export.export(
            graph.module, (graph.given,), dynamic_shapes=(free,) if graph.free else None, strict=False
        )
    except Exception as failure:  # whatever the tracer raises on a foreign model
        why = " ".join(str(failure).split())[:300]
        raise UserError(f"{name}: torch.export cannot trace {type(graph.module).__name__}: {why}") from failure


def onnx_bytes(name: str, graph: Graph, opset: int) -> bytes:
    """The graph as ONNX has it: single file, its free axes named, without the exporter's notes on where each node came
    from.

    Raises:
        ValueError: what torch.export cannot trace, or an operator that has no ONNX form, with its module.
    """
    import onnx

    traced = program(name, graph)
    with quiet("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecation notices are not about our model
        try:
            made = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                external_data=False,
                input_names=list(graph.given),
                output_names=_outputs(traced),
            )
        except torch.onnx.errors.OnnxExporterError as failure:
            raise UserError(f"{name}: {_culprit(traced, failure)}") from failure
    assert made is not None  # the exporter gives None only for dynamo=False
    model = made.model_proto
    words = {
        d.dim_param: axes[i]
        for v in model.graph.input
        for axes in [graph.free.get(v.name, {})]
        for i, d in enumerate(v.type.tensor_type.shape.dim)
        if i in axes
    }
    if fallen := [word for word in words if not word]:
        raise UserError(f"{name}: {len(fallen)} free axes became fixed; the exporter fell back to a static shape")
    _clean(model.graph, words)
    for node in model.graph.node:
        if node.op_type == "Loop":
            _move_weights_into(next(a.g for a in node.attribute if a.name == "body"), model.graph)
    model.metadata_props.append(onnx.StringStringEntryProto(key="notice", value=NOTICE))
    return bytes(model.SerializeToString())


def _outputs(program: torch.export.ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    return list(spec.unflatten(range(spec.num_leaves)))


def _clean(graph: Any, words: dict[str, str]) -> None:
    for node in graph.node:
        node.ClearField("metadata_props")  # stack traces, with the paths of the machine
        node.ClearField("doc_string")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _clean(attribute.g, words)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.ClearField("metadata_props")
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param:
                d.dim_param = re.sub(r"\w+", lambda m: words.get(m[0], m[0]), d.dim_param)
    graph.ClearField("metadata_props")


def _move_weights_into(body: Any, graph: Any) -> None:
    # ONNX Runtime blocks the layout of convolutions only where their weights are initialisers of the same graph (LOG
    # 18)
    outside = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    inside = {name for node in body.node for name in node.input}
    moved = [t for t in graph.initializer if t.name in inside - outside]
    kept = [t for t in graph.initializer if t.name not in inside - outside]
    body.initializer.extend(moved)
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _culprit(program: torch.export.ExportedProgram, failure: BaseException) -> str:
    """The operator that has no ONNX form, and the module it is in."""
    reasons = [str(failure)]
    while failure.__cause__ is not None:
        failure = failure.__cause__
        reasons.append(str(failure))
    found = re.search(r"Error when translating node .*?torch\.ops\.\w+\.(\w+)", "\n".join(reasons))
    if found is not None:
        # before decomposition the operator may have a prefix: aten.special_NAME, prims.NAME
        for node in program.graph.nodes:
            if node.op == "call_function" and found[1] in str(node.target):
                where = list(node.meta["nn_module_stack"].values())[-1]
                return (
                    f"operator {node.target} in module {where[0]} ({getattr(where[1], '__name__', where[1])}) has no"
                    " ONNX form"
                )
        return f"operator {found[1]} has no ONNX form"
    return f"the exporter failed: {' '.join(str(failure).split())[:300]}"
