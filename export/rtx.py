"""Build one ONNX file for a T4 (SM75) with TensorRT-RTX, which needs no GPU for it. Run as a script: the builder can
crash.

python rtx.py GRAPH.onnx SM75     prints a line of JSON: {"built": true, "bytes": ..., "seconds": ...} or {"built":
false, "why": ...}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

RANGES = {"batch": (1, 4, 16), "steps": (1, 50, 1000)}  # of the free axes: least, best, most


def build(path: Path, capability: str) -> dict[str, Any]:
    """An engine of the graph for a compute capability, or for RTX's defaults (`default`); nothing is kept of it."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        return {"built": False, "why": "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))}
    config = builder.create_builder_config()
    if capability != "default":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile, free = builder.create_optimization_profile(), False
    for i in range(network.num_inputs):
        given = network.get_input(i)
        if -1 in given.shape:
            free = True
            words = [given.get_dimension_name(axis) for axis in range(len(given.shape))]
            sizes = [RANGES[word] if size == -1 else (size,) * 3 for size, word in zip(given.shape, words, strict=True)]
            profile.set_shape(given.name, *zip(*sizes, strict=True))
    if free:
        config.add_optimization_profile(profile)
    start = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"built": False, "why": log.errors[-1] if log.errors else "no reason given"}
    return {"built": True, "bytes": engine.nbytes, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]), sys.argv[2])))
