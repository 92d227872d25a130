"""ONNX Runtime's own optimisation of UNets: each GroupNorm, with SiLU and sum, becomes one `com.microsoft` operator for
CUDA."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of an ONNX graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def has_external_data(model: Any) -> bool:
    """Whether any tensor of a model, however deep, is in another file."""
    import onnx

    inside = [a for node in nodes(model.graph) for a in node.attribute]
    graphs = [model.graph, *(a.g for a in inside if a.HasField("g"))]
    tensors = [t for graph in graphs for t in graph.initializer] + [a.t for a in inside if a.HasField("t")]
    return any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fuse_group_norms(data: bytes) -> tuple[bytes, int]:
    """A graph of opset 18 for CUDA, and how many group norms of it are fused (compiled, not run: `NhwcConv` has no CPU
    kernel).

    ONNX Runtime looks for the shape that the last reshape of a norm is given in a `Shape` node, which graphs of fixed
    shapes have not: they get it back, and the fusion takes it away again. What is inside a loop is left as it is: its
    optimiser cannot sort subgraphs.
    """
    import onnx
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data))
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    fixed = {
        t.name: onnx.numpy_helper.to_array(t).tolist()
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.INT64
    }
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.input)}
    for node in list(graph.node):
        norm = made.get(node.input[0]) if node.op_type == "Reshape" else None
        split = made.get(norm.input[0]) if norm is not None and norm.op_type == "InstanceNormalization" else None
        # only where the tensor that was split into groups has the shape that is asked for: two reshapes may have become
        # one
        if split is not None and node.input[1] in fixed and sizes.get(split.input[0]) == fixed[node.input[1]]:
            name = f"{node.output[0]}_shape"
            graph.node.insert(
                list(graph.node).index(node), onnx.helper.make_node("Shape", [split.input[0]], [name], name=name)
            )
            node.input[1] = name
    with ExitStack() as stack:
        folder, nowhere = (
            stack.enter_context(tempfile.TemporaryDirectory()),
            stack.enter_context(Path(os.devnull).open("w")),
        )
        # its progress bar
        for silence in (redirect_stderr(nowhere), redirect_stdout(nowhere), quiet("onnxruntime.transformers")):
            stack.enter_context(silence)
        path = Path(folder) / "graph.onnx"
        onnx.save(model, path)
        model = optimize_model(
            str(path), model_type="unet", opt_level=0, optimization_options=FusionOptions("unet"), use_gpu=True
        ).model
    return model.SerializeToString(), sum(node.op_type in ("GroupNorm", "SkipGroupNorm") for node in nodes(model.graph))
