"""ONNX Runtime's own optimisation of UNets: each GroupNorm, with SiLU and sum, becomes one `com.microsoft` operator for CUDA."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of an ONNX graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def fused(data: bytes) -> tuple[bytes, int]:
    """A graph of opset 18 for CUDA, and how many group norms of it are fused (compiled, not run: `NhwcConv` has no CPU kernel).

    ONNX Runtime looks for the shape that the last reshape of a norm is given in a `Shape` node, which graphs of fixed shapes have not:
    they get it back, and the fusion takes it away again. What is inside a loop is left as it is: its optimiser cannot sort subgraphs.
    """
    import onnx
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model = onnx.load_model_from_string(data)
    made = {output: node for node in model.graph.node for output in node.output}
    for node in list(model.graph.node):
        source = made.get(node.input[0]) if node.op_type == "Reshape" else None
        shape = made.get(node.input[1]) if source is not None else None
        if source is not None and source.op_type == "InstanceNormalization" and (shape is None or shape.op_type != "Shape"):
            name = f"{node.output[0]}_shape"
            at = list(model.graph.node).index(node)
            model.graph.node.insert(at, onnx.helper.make_node("Shape", [made[source.input[0]].input[0]], [name], name=name))
            node.input[1] = name
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # its progress bar
        path = Path(folder) / "graph.onnx"
        onnx.save(model, path)
        model = optimize_model(str(path), model_type="unet", opt_level=0, optimization_options=FusionOptions("unet"), use_gpu=True).model
    return model.SerializeToString(), sum(node.op_type in ("GroupNorm", "SkipGroupNorm") for node in nodes(model.graph))
