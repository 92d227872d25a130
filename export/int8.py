"""Wide convolutions of a graph in int8, for a CPU: static, per channel, calibrated on what the model meets while it
samples.

Convolutions with fewer than 128 output channels stay in float32: there int8 gains little and loses much (LOG 17).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbldm_fast.errors import UserError

from .fusion import quiet

WIDE = 128


def quantize(data: bytes, feeds: Sequence[dict[str, np.ndarray]]) -> bytes:
    """The graph with quantization around its wide convolutions; `feeds` are inputs to calibrate the ranges on.

    Raises:
        ValueError: the graph has no wide convolution.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet(""):  # it recommends at the root logger what has been done
        plain, prepared, out = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "prepared", "out"))
        Path(plain).write_bytes(data)
        quant_pre_process(plain, prepared, skip_optimization=True, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        widths = {t.name: t.dims[0] for t in graph.initializer if t.dims}
        convolutions: list[Any] = [node for node in graph.node if node.op_type == "Conv"]
        narrow = [node.name for node in convolutions if widths.get(node.input[1], 0) < WIDE]
        if len(narrow) == len(convolutions):
            raise UserError(
                f"dtype: got int8 for a model without convolutions of {WIDE} channels or more, allowed is fp32"
            )
        quantize_static(
            prepared,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=narrow,
        )
        return Path(out).read_bytes()
