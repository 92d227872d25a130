"""Engines for a T4 by TensorRT-RTX, which needs no GPU to build them. Its builder can crash: it runs as a script.

python rtx.py GRAPH.onnx SM75     prints a line of JSON: {"built": true, "bytes": ..., "seconds": ...} or {"built":
false, "why": ...}
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BUILDER, BUILD_SECONDS = Path(__file__), 300
RANGES = {"batch": (1, 4, 16), "steps": (1, 50, 1000)}  # of the free axes: least, best, most
# TensorRT-RTX compiles no float32 matrix product for Turing; TensorRT, its sibling for T4s, may
KNOWN_LIMIT = "FP32 GEMM is not supported"


def build_in_process(data: bytes, dtype: str) -> tuple[dict[str, Any], str]:
    """Build the engine of a graph in another process, which may crash: for SM75, else, where only the known limit of
    float32 forbids that, for RTX's defaults.

    Returns:
        What was found for each capability, and why no engine was built, or ''.
    """
    found: dict[str, Any] = {}
    for capability in ("SM75", "default"):
        found[f"engine for {capability}"] = result = _run_builder(data, capability)
        if result.get("built"):
            return found, ""
        why = re.sub(r"\s+", " ", result.get("why", "no answer"))
        if capability != "SM75" or dtype != "fp32" or KNOWN_LIMIT not in why:
            break
    return found, f"TensorRT-RTX cannot build it for {capability}: {why[:300]}"


def _run_builder(data: bytes, capability: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.onnx"
        path.write_bytes(data)
        command = [sys.executable, str(BUILDER), str(path), capability]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"why": f"not built in {BUILD_SECONDS} s"}
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:]
        return {"why": " ".join([f"the builder ended with code {done.returncode}", *said])}
    result: dict[str, Any] = json.loads((done.stdout.strip().splitlines() or ["{}"])[-1])
    return result


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
