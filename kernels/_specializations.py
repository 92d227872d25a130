"""From the calls in launches.json to what Triton compiles for them, with no GPU.

launches.json holds the calls of our ops that the models make (benchmarks/record.py writes it). Each is launched here on
tensors without memory, and what it would send to a GPU is kept instead: the kernel, the types of its arguments, its
constants.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ._backend import triton
from ._group_tiles import plan, register_tile

LAUNCHES = Path(__file__).with_name("launches.json")
WIDE = 16  # bytes
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.int8: "i8",
}


class Specialization(NamedTuple):
    """One kernel with the argument types and constants that one launch gives it."""

    name: str
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    wide: bool  # whether the layout allows 16-byte loads


class Launch(NamedTuple):
    """One call of an op: its name and its arguments, tensors without memory."""

    op: str
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The shape and layout of the first tensor and the options that are given."""
        first, *_ = self.arguments
        layout = "" if first.is_contiguous() else " nhwc" if first.stride(1) == 1 else " strided"
        words = []
        schema = getattr(torch.ops.sbldm_fast, self.op).default._schema.arguments
        for parameter, value in zip(schema, self.arguments, strict=True):
            if isinstance(value, Tensor):
                words += [parameter.name] * (str(parameter.type) == "Optional[Tensor]")
            elif value not in (None, False):
                words.append(parameter.name if value is True else f"{parameter.name}={value}")
        return f"{'x'.join(map(str, first.shape))}{layout} {' '.join(words)}"

    @property
    def wide(self) -> bool:
        """Whether the layout allows loads of 16 bytes."""
        if self.op.startswith("group_norm_silu"):
            x, groups = self.arguments[0], self.arguments[3]
            last = x.stride(1) == 1
            num_groups = groups if isinstance(groups, int) else groups.shape[2]
            _, tile, _, _ = plan(x.shape, num_groups, last, x.element_size(), register_tile(x.device))
            side_by_side = tile[0] * tile[1] if last else x.shape[2] * x.shape[3]
            return bool(side_by_side * x.element_size() % WIDE == 0)
        if self.op == "spectral_mse":
            return bool(self.arguments[0].stride() == self.arguments[1].stride())
        return True

    def record(self) -> list[Specialization]:
        """The kernels that it would launch."""
        launch = importlib.import_module(f"{__package__}.{self.op}")._launch
        with mock.patch.object(triton.JITFunction, "run", autospec=True) as run:
            launch(*self.arguments)
        return [_specialize(self.name, self.wide, *call.args, **call.kwargs) for call in run.call_args_list]


def launches(dtype: torch.dtype) -> list[Launch]:
    """Every call of the presets, for models that compute in `dtype`: launches.json, where float16 stands for it."""
    text = LAUNCHES.read_text().replace('"float16[', f'"{str(dtype).removeprefix("torch.")}[')
    return [Launch(op, tuple(map(_argument, arguments))) for op, *arguments in json.loads(text)]


def _argument(described: Any) -> Any:
    if not isinstance(described, str):
        return described
    if described.startswith("torch."):
        return getattr(torch, described.removeprefix("torch."))
    found = re.fullmatch(r"(\w+)\[([\d,]*)\](?: strides \[([\d,]*)\])?(?: offset (\d+))?", described)
    if found is None:
        return described
    dtype, shape, strides, offset = found.groups()
    sizes = _numbers(shape)
    t = torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    return t.as_strided(sizes, _numbers(strides) if strides else t.stride(), int(offset or 0))


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, listed.split(","))))


def specializations(dtype: torch.dtype) -> list[Specialization]:
    """What Triton would compile for `launches(dtype)`, each once."""
    return unique(s for launch in launches(dtype) for s in launch.record())


def unique(found: Iterable[Specialization]) -> list[Specialization]:
    """Of those that differ in no more than their names, the first."""
    first: dict[str, Specialization] = {}
    for s in found:
        first.setdefault(repr(s[1:]), s)
    return list(first.values())


def _specialize(
    name: str, wide: bool, kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kw: Any
) -> Specialization:
    bound = inspect.signature(kernel.fn).bind(*args, **kw).arguments
    fixed, plain = (
        {p.name for p in kernel.params if getattr(p, flag)} for flag in ("is_constexpr", "do_not_specialize")
    )
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (key, value) in enumerate(bound.items()):
        if key in plain:  # of a type alone
            signature[key] = "i32" if value < 2**31 else "i64"
            continue
        signature[key] = "constexpr" if key in fixed else _describe(value, (i,), constants, attributes)
        if key in fixed:
            constants[i,] = value
    return Specialization(
        name, kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, num_warps, wide
    )


def _describe(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    # as Triton's launcher: pointers by dtype, None and 1 as constants, multiples of 16 marked as such
    if isinstance(value, tuple):
        return tuple(_describe(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    start = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
    if start % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32" if value < 2**31 else "i64"
