"""The T4 gate: compile every kernel specialisation that the presets use, with no GPU, and read what came out.

    python -m sbldm_fast.kernels.preflight --sm 75

This stands in for a T4 until one is measured: the kernels are compiled, not run. What is compiled is what the launchers
launch: they run on tensors without memory, and each launch is recorded instead of sent to a GPU. Registers and local
memory are read from the binary (cuobjdump's resource usage), load widths and `.f64` from the PTX. budgets.toml says
what a kernel may cost.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ._backend import HAS_TRITON, triton
from ._group_tiles import plan, register_tile

# the package's attributes of these names are the functions, so the modules are asked for by name
(
    ddim_step,
    diffuse,
    frequency_loss,
    group_norm_silu,
    group_norm_silu_backward,
    philox_normal,
    solver_step,
    spectral_mse,
) = (
    importlib.import_module(f"{__package__}.{name}")
    for name in (
        "ddim_step",
        "diffuse",
        "frequency_loss",
        "group_norm_silu",
        "group_norm_silu_backward",
        "philox_normal",
        "solver_step",
        "spectral_mse",
    )
)

WIDE = 16  # bytes
REGISTERS = 65536  # per SM, of every architecture here
# resident warps, resident blocks and bytes of shared memory of an SM
ARCHITECTURES = {
    75: (32, 16, 65536),
    80: (64, 32, 167936),
    86: (48, 16, 102400),
    89: (48, 24, 102400),
    90: (64, 32, 233472),
    100: (64, 32, 233472),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.int8: "i8",
}

# Every GroupNorm that the presets run; a test derives it from the models. By use (with time modulation, the activation,
# what is added up before the norm, whether the sum is wanted too) and (C, num_groups): the pixels.
_NORMS = {
    "silu": {
        (32, 8): (16384,),
        (64, 8): (256, 4096, 16384),
        (96, 8): (64, 256, 1024),
        (128, 8): (64, 1024, 4096),
        (128, 32): (256, 1024),
        (192, 8): (16, 64),
        (192, 32): (64, 256, 1024),
        (256, 8): (16, 256, 1024),
        (256, 32): (64, 256),
        (384, 32): (16, 64, 256),
        (512, 32): (16, 64),
    },
    "silu bias": {
        (16, 8): (16384,),
        (32, 8): (256, 4096, 16384),
        (64, 8): (1024, 4096),
        (64, 32): (256, 1024),
        (96, 8): (256,),
        (128, 8): (1024,),
        (256, 8): (256,),
    },
    "none bias sum": {
        (64, 8): (64,),
        (128, 32): (64, 256),
    },
    "silu bias sum": {
        (16, 8): (4096, 16384),
        (32, 8): (64, 256, 1024, 4096, 16384),
        (64, 8): (16, 256, 1024, 4096),
        (64, 32): (64, 256, 1024),
        (128, 8): (16, 256, 1024),
        (128, 32): (16, 64),
        (256, 8): (256,),
        (256, 32): (16, 64),
    },
    "time silu bias": {
        (32, 8): (256,),
        (64, 8): (64,),
        (64, 32): (256, 1024),
        (128, 8): (16,),
        (128, 32): (64, 256),
        (256, 32): (16, 64),
    },
    "silu residual sum": {
        (64, 8): (64,),
        (128, 8): (16,),
        (128, 32): (64, 256),
        (256, 32): (16, 64),
    },
    "none bias residual sum": {
        (64, 8): (64,),
        (128, 8): (16,),
        (128, 32): (64, 256),
        (256, 32): (16, 64),
    },
    "silu bias residual sum": {
        (32, 8): (256, 16384),
        (64, 32): (256, 1024),
        (128, 8): (16, 1024),
        (256, 8): (256,),
        (256, 32): (16, 64),
    },
}
PRESET_NORMS = tuple(
    (C, G, HW, use) for use, sizes in _NORMS.items() for (C, G), pixels in sizes.items() for HW in pixels
)


class Specialisation(NamedTuple):
    """One kernel with the argument types and constants that one launch gives it."""

    name: str
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    wide: bool  # whether the layout allows 16-byte loads


@dataclass
class Report:
    """What one specialisation became on one architecture."""

    name: str
    kernel: str
    dtype: str
    sm: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    load: int = 0
    f64: int = 0
    warps: int = 0
    cubin: int = 0
    fault: str = ""


def launches(dtype: torch.dtype) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Every launch of the presets with tensors of `dtype`, on tensors without memory: its name, whether 16-byte loads
    fit, the call."""

    def new(*shape: int, dtype: torch.dtype = dtype, last: bool = False) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device="meta")
        return t.contiguous(memory_format=torch.channels_last) if last else t

    fp32, i64 = torch.float32, torch.int64
    for C, G, HW, use in PRESET_NORMS:
        uses = set(use.split())
        for last in (False, True):
            x = new(2, C, math.isqrt(HW), math.isqrt(HW), last=last)
            _, tile, _, _ = plan(x.shape, G, x.stride(1) == 1, x.element_size(), register_tile(x.device))
            side_by_side = tile[0] * tile[1] if last else HW
            wide = side_by_side * dtype.itemsize % WIDE == 0
            name, silu = f"{C}/{G} HW={HW} {'nhwc' if last else 'nchw'} {use}", "silu" in uses
            # mixed precision trains float32 weights on half-precision images
            for mode, weights in (("sample", dtype), ("train", fp32)):
                w = new(C, dtype=weights)
                affine = [w, w, *([new(2, C, dtype=weights)] * 2 if "time" in uses else [None] * 2)]
                terms = w if "bias" in uses else None, x if "residual" in uses else None
                keep = "sum" in uses or (mode == "train" and "bias" in uses)
                forward = partial(group_norm_silu._launch, x, *terms, G, *affine[:2], 1e-5, *affine[2:], silu, keep)
                yield f"{name} {mode}", wide, forward
            dh = x if "sum" in uses else None
            backward = partial(group_norm_silu_backward._launch, x, dh, x, new(2, 2, G, dtype=fp32), *affine, silu)
            yield f"{name} backward", wide, backward
    for shape in ((8, 16, 16), (4, 32, 32)):
        z, m = new(2, *shape, dtype=fp32), new(2, *shape)
        of = "x".join(map(str, shape))
        bars = new(50, 2, dtype=fp32)
        for kind in ddim_step.PREDICTION_TYPES:
            for eta in (0.0, 1.0):
                yield (
                    f"{of} {kind} eta={eta:g}",
                    True,
                    partial(ddim_step._launch, m, m, bars[1, 0], bars[1, 1], eta, m, kind, None),
                )
            for cutmix in (0, 2**21):
                call = partial(
                    diffuse._launch,
                    m,
                    new(2, dtype=torch.int64),
                    new(1000, dtype=fp32),
                    new(2, dtype=torch.int64),
                    0,
                    kind,
                    cutmix,
                )
                yield f"{of} {kind}{' cutmix' if cutmix else ''}", True, call
        for K in range(4):
            for guided, noisy, watched, last in product((False, True), repeat=4):
                if K and len({guided, noisy, watched, last}) > 1:
                    continue  # with history: nothing of the rest, or all of it
                call = partial(
                    solver_step._launch,
                    z,
                    new(4 if guided else 2, *shape, last=last),
                    new(50, 6 + 2 * K, dtype=fp32),
                    new(2, dtype=torch.int32),
                    new(1, dtype=fp32) if guided else None,
                    new(K, 2, 2, *shape, dtype=fp32) if K else None,
                    new(2, 2, dtype=i64) if noisy else None,
                    new(2, dtype=torch.bool) if watched else None,
                    z if watched else None,
                    new(2, 2, dtype=fp32) if watched else None,
                    None,
                )
                words = (f"K={K}", "guided" * guided, "noise" * noisy, "watched" * watched, "nhwc" * last)
                yield f"{of} {' '.join(filter(None, words))}", True, call
        yield f"{of}", True, partial(philox_normal._launch, new(1, dtype=i64), z.shape, 0, 0, fp32)
    for shape in ((8, 16, 16), (4, 32, 32), (1, 128, 128)):
        for last, gradient in product((False, True), repeat=2):
            pred, target = new(2, *shape, last=last), new(2, *shape, dtype=fp32)
            name = f"{'x'.join(map(str, shape))} {'nhwc' if last else 'nchw'}{' gradient' * gradient}"
            yield name, True, partial(frequency_loss._launch, pred, target, 1.0, 0.5, 0.25, gradient)
            yield name, not last or shape[0] == 1, partial(spectral_mse._launch, pred, target, 256.0, gradient)


def specialisations(dtype: torch.dtype) -> list[Specialisation]:
    """What Triton would compile for `launches(dtype)`, each once."""
    return unique(s for launch in launches(dtype) for s in recorded(*launch))


def unique(found: Iterable[Specialisation]) -> list[Specialisation]:
    """Of those that differ in no more than their names, the first."""
    first: dict[str, Specialisation] = {}
    for s in found:
        first.setdefault(repr(s[1:]), s)
    return list(first.values())


def recorded(name: str, wide: bool, launch: Callable[[], object]) -> list[Specialisation]:
    """The kernels that `launch` would have launched."""
    with mock.patch.object(triton.JITFunction, "run", autospec=True) as run:
        launch()
    return [_specialisation(name, wide, *call.args, **call.kwargs) for call in run.call_args_list]


def _specialisation(
    name: str, wide: bool, kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kw: Any
) -> Specialisation:
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
    return Specialisation(
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


def compile_one(s: Specialisation, dtype: str, sm: int) -> Report:
    """Compile for one architecture and read the binary."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.disable_line_info = True  # the size of a cubin should not depend on where this file lies
    report = Report(s.name, s.kernel, dtype, sm)
    try:
        source = ASTSource(getattr(importlib.import_module(s.module), s.kernel), s.signature, s.constants, s.attributes)
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": s.num_warps})
    except Exception as error:  # whatever the compiler raises is the finding
        report.fault = f"does not compile: {str(error).strip().splitlines()[-1][:120]}"
        return report
    usage, ptx = _resource_usage(built.asm["cubin"]), built.asm["ptx"]
    report.registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    report.spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    report.shared = built.metadata.shared
    report.f64 = len(re.findall(r"\.f64", ptx))
    report.load = max(
        (int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+) ", ptx)),
        default=0,
    )
    report.cubin = len(built.asm["cubin"])
    report.warps = _resident_warps(sm, report.registers, report.shared, s.num_warps)
    report.fault = _fault(report, s.wide)
    return report


def _resident_warps(sm: int, registers: int, shared: int, num_warps: int) -> int:
    # registers are given out to warps in lots of 256; CUDA C programming guide, table of technical specifications
    most_warps, most_blocks, shared_bytes = ARCHITECTURES[sm]
    by_registers = REGISTERS // (-(-32 * max(registers, 1) // 256) * 256 * num_warps)
    by_shared = shared_bytes // shared if shared else most_blocks
    return min(most_blocks, most_warps // num_warps, by_registers, by_shared) * num_warps


@functools.cache
def budgets() -> dict[str, dict[str, int]]:
    """budgets.toml: what a kernel may cost, with the defaults filled in."""
    read = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text())
    default = read.pop("default")
    return {"default": default} | {kernel: default | own for kernel, own in read.items()}


def _fault(r: Report, wide: bool) -> str:
    budget, got = budgets().get(r.kernel, budgets()["default"]), asdict(r)
    over = [
        f"{k} {got[k]} > {budget[k]}" for k in ("registers", "spilled", "shared", "f64", "cubin") if got[k] > budget[k]
    ]
    under = [f"{k} {got[k]} < {budget[k]}" for k in ("load",) * wide + ("warps",) if got[k] < budget[k]]
    return ", ".join(over + under)


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every kernel keeps its budget, 1 if one does not, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.kernels.preflight", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sm", default=",".join(map(str, ARCHITECTURES)), help="architectures, e.g. 75 or 75,80 (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of the table")
    parser.add_argument(
        "--worst",
        action="store_true",
        help="one line for each kernel and architecture: the worst figure in each column",
    )
    parser.epilog = "benchmarks/gate.jsonl, which the report shows, is the output of --worst --json"
    options = parser.parse_args(argv)
    if not HAS_TRITON:
        print("preflight: triton is not installed, nothing can be compiled", file=sys.stderr)
        return 2
    try:
        sms = [int(v) for v in options.sm.split(",")]
    except ValueError:
        sms = []
    if not sms or set(sms) - set(ARCHITECTURES):
        parser.error(f"--sm: got {options.sm}, allowed are {', '.join(map(str, ARCHITECTURES))}")
    jobs = [
        (s, TYPES[dtype], sm)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for s in specialisations(dtype)
        for sm in sms
        if dtype != torch.bfloat16 or sm >= 80
    ]
    reports = []
    show = _json if options.json else _line
    if not options.json:
        columns = f"{'regs':>4} {'spill':>5} {'shared':>6} {'load':>4} {'.f64':>4} warps/SM cubin"
        print(f"{'kernel':24} {'launch':40} {'dtype':5} {'sm':>3} {columns}")
    with ProcessPoolExecutor() as pool:
        for r in pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4):
            reports.append(r)
            if r.fault or not options.worst:
                print(show(r), flush=True)
    if options.worst:
        for kernel, sm in dict.fromkeys((r.kernel, r.sm) for r in reports):
            print(show(_worst([r for r in reports if (r.kernel, r.sm) == (kernel, sm)])))
    failures = sum(bool(r.fault) for r in reports)
    print(f"{len(jobs)} kernels compiled for sm {options.sm}, {failures} failed; compiled, not run", file=sys.stderr)
    return 1 if failures else 0


def _line(r: Report) -> str:
    kernel = r.kernel.strip("_").removesuffix("_kernel")
    figures = f"{r.registers:>4} {r.spilled:>5} {r.shared:>6} {r.load:>3}B {r.f64:>4} {r.warps:>8} {r.cubin:>5}"
    line = f"{kernel:24} {r.name:40} {r.dtype:5} {r.sm:>3} {figures}"
    return line + (f"  FAIL: {r.fault}" if r.fault else "")


def _json(r: Report) -> str:
    return json.dumps(asdict(r) | {"source": sources()})


@functools.cache
def sources() -> str:
    """A hash of the kernels' files: what was compiled."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _worst(reports: Sequence[Report]) -> Report:
    r = reports[0]
    top = {key: max(getattr(r, key) for r in reports) for key in ("registers", "spilled", "shared", "f64", "cubin")}
    low = {key: min(getattr(r, key) for r in reports) for key in ("load", "warps")}
    return Report(f"worst of {len(reports)}", r.kernel, "all", r.sm, **top, **low)


if __name__ == "__main__":
    sys.exit(main())
