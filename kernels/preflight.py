"""The T4 gate: compile every kernel specialisation that the presets use, with no GPU, and read what came out.

    python -m sbldm_fast.kernels.preflight --sm 75

This stands in for a T4 until one is measured: the kernels are compiled, not run. Numbers come from the binary: registers
and local memory from cuobjdump's resource usage, load widths from the SASS, `.f64` from the PTX.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._backend import HAS_TRITON, triton

# the package's attributes of these names are the functions, so the modules are asked for by name
ddim_step, group_norm_silu, philox_normal = (
    importlib.import_module(f"{__package__}.{name}") for name in ("ddim_step", "group_norm_silu", "philox_normal")
)

SMS = (75, 80, 86, 89, 90, 100)
MAX_SHARED = 48 * 1024
WIDE = 16  # bytes
REGISTERS = 65536  # per SM, all of SMS
WARPS = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64}  # resident per SM at most: CUDA C programming guide, table 27

# Every GroupNorm that the presets run, as (C, num_groups, HW, time modulation, activation); a test derives it from the models.
PRESET_NORMS: tuple[tuple[int, int, int, bool, str], ...] = (
    (16, 8, 4096, False, "silu"),
    (16, 8, 16384, False, "silu"),
    (32, 8, 64, False, "silu"),
    (32, 8, 256, False, "silu"),
    (32, 8, 256, True, "silu"),
    (32, 8, 1024, False, "silu"),
    (32, 8, 4096, False, "silu"),
    (32, 8, 16384, False, "silu"),
    (64, 8, 16, False, "silu"),
    (64, 8, 64, False, "none"),
    (64, 8, 64, False, "silu"),
    (64, 8, 64, True, "silu"),
    (64, 8, 256, False, "silu"),
    (64, 8, 1024, False, "silu"),
    (64, 8, 4096, False, "silu"),
    (64, 8, 16384, False, "silu"),
    (64, 32, 64, False, "silu"),
    (64, 32, 256, False, "silu"),
    (64, 32, 256, True, "silu"),
    (64, 32, 1024, False, "silu"),
    (64, 32, 1024, True, "silu"),
    (96, 8, 64, False, "silu"),
    (96, 8, 256, False, "silu"),
    (96, 8, 1024, False, "silu"),
    (128, 8, 16, False, "none"),
    (128, 8, 16, False, "silu"),
    (128, 8, 16, True, "silu"),
    (128, 8, 64, False, "silu"),
    (128, 8, 256, False, "silu"),
    (128, 8, 1024, False, "silu"),
    (128, 8, 4096, False, "silu"),
    (128, 32, 16, False, "silu"),
    (128, 32, 64, False, "none"),
    (128, 32, 64, False, "silu"),
    (128, 32, 64, True, "silu"),
    (128, 32, 256, False, "none"),
    (128, 32, 256, False, "silu"),
    (128, 32, 256, True, "silu"),
    (128, 32, 1024, False, "silu"),
    (192, 8, 16, False, "silu"),
    (192, 8, 64, False, "silu"),
    (192, 32, 64, False, "silu"),
    (192, 32, 256, False, "silu"),
    (192, 32, 1024, False, "silu"),
    (256, 8, 16, False, "silu"),
    (256, 8, 256, False, "silu"),
    (256, 8, 1024, False, "silu"),
    (256, 32, 16, False, "none"),
    (256, 32, 16, False, "silu"),
    (256, 32, 16, True, "silu"),
    (256, 32, 64, False, "none"),
    (256, 32, 64, False, "silu"),
    (256, 32, 64, True, "silu"),
    (256, 32, 256, False, "silu"),
    (384, 32, 16, False, "silu"),
    (384, 32, 64, False, "silu"),
    (384, 32, 256, False, "silu"),
    (512, 32, 16, False, "silu"),
    (512, 32, 64, False, "silu"),
)


class Specialisation(NamedTuple):
    """One kernel with the argument types and constants that one launch gives it."""

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    wide_loads: bool  # whether the layout allows 16-byte loads


@dataclass
class Report:
    """What one specialisation became on one architecture."""

    name: str
    dtype: str
    sm: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    load_bytes: int = 0
    f64: int = 0
    warps_per_sm: int = 0
    fault: str = ""


def specialisation(
    name: str, module: Any, kernel: str, args: dict[str, Any], constants: dict[str, Any], num_warps: int, wide: bool
) -> Specialisation:
    """What Triton's launcher would make of `args`: pointers by dtype, None and 1 as constants, multiples of 16 as such."""
    signature, divisible, fixed = {}, [], dict(constants)
    for key, value in args.items():
        if value is None or (isinstance(value, int) and value == 1):
            fixed[key] = value
            signature[key] = "constexpr"
        elif isinstance(value, torch.dtype):
            signature[key] = "*" + {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}[value]
            divisible.append(key)
        else:
            signature[key] = "i32"
            if value % 16 == 0:
                divisible.append(key)
    signature |= dict.fromkeys(constants, "constexpr")
    return Specialisation(name, module.__name__, kernel, signature, fixed, tuple(divisible), num_warps, wide)


def specialisations(dtype: torch.dtype) -> Iterator[Specialisation]:
    """Every specialisation of the presets for one dtype, each once."""
    seen = set()
    for C, G, HW, modulated, activation in PRESET_NORMS:
        for channels_last in (False, True):
            p = group_norm_silu.launch_parameters(C, G, HW, channels_last, dtype.itemsize)
            key = (*p.values(), modulated, activation, channels_last)
            if key in seen:
                continue
            seen.add(key)
            width = math.isqrt(HW)
            strides = (C * HW, 1, width * C, C) if channels_last else (C * HW, HW, width, 1)
            args: dict[str, Any] = dict.fromkeys(("x", "y", "weight", "bias"), dtype)
            args |= dict.fromkeys(("scale", "shift"), dtype if modulated else None)
            args |= {"scale_stride": 0, "shift_stride": 0, "C": C, "HW": HW, "WIDTH": width}  # one row of time for the batch
            args |= dict(zip(("xn", "xc", "xh", "xw", "yn", "yc", "yh", "yw"), strides * 2, strict=True))
            constants = {k: v for k, v in p.items() if k != "num_warps"} | {"FLAT": True, "SILU": activation == "silu", "eps": 1e-5}
            name = f"group_norm_silu {C}/{G} HW={HW} {'nhwc' if channels_last else 'nchw'}{' time' if modulated else ''} {activation}"
            side_by_side = int(p["GROUPS"]) * int(p["CHANNELS"]) if channels_last else HW
            yield specialisation(
                name, group_norm_silu, "_group_norm_silu_kernel", args, constants, int(p["num_warps"]),
                side_by_side * dtype.itemsize % WIDE == 0,
            )  # fmt: skip
    for prediction in ddim_step.PREDICTION_TYPES:
        for eta in (0.0, 1.0):
            args = {"x": dtype, "model_output": dtype, "noise": dtype if eta else None, "y": dtype, "alpha_bar": torch.float32,
                    "alpha_bar_prev": torch.float32, "numel": 2048, "a_stride": 0, "a_prev_stride": 0}  # fmt: skip
            constants = {"BLOCK": ddim_step.BLOCK, "eta": eta, "PREDICTION": prediction, "CLIP": None}
            s = specialisation(f"ddim_step {prediction} eta={eta:g}", ddim_step, "_ddim_step_kernel", args, constants, 4, True)
            # the two alphas are neighbours in a table, so at best one of them is aligned
            yield s._replace(divisible=tuple(k for k in s.divisible if not k.startswith("alpha")))
    args = {"y": dtype, "seed": torch.int64, "first_index": 0, "stream": 0, "numel": 2048}
    yield specialisation("philox_normal", philox_normal, "_philox_normal_kernel", args, {"BLOCK": philox_normal.BLOCK}, 4, False)


def compile_one(s: Specialisation, dtype: str, sm: int) -> Report:
    """Compile for one architecture and read the binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(s.module), s.kernel)
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    report = Report(s.name, dtype, sm)
    try:
        source = ASTSource(
            fn=function,
            signature={name: s.signature[name] for name in function.arg_names},
            constexprs={position[k]: v for k, v in s.constants.items()},
            attrs={position[k]: [["tt.divisibility", 16]] for k in s.divisible},
        )
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": s.num_warps})
    except Exception as error:  # whatever the compiler raises is the finding
        report.fault = f"does not compile: {str(error).strip().splitlines()[-1][:120]}"
        return report
    usage, sass = _disassemble(built.asm["cubin"])
    report.registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]  # cuobjdump always prints it
    report.spilled = int(re.search(r"LOCAL:(\d+)", usage).group(1)) + int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
    report.shared = built.metadata.shared
    report.f64 = len(re.findall(r"\.f64", built.asm["ptx"]))
    widths = [int(w or 32) // 8 for w in re.findall(r"LDG\.E(?:\.(?:CONSTANT|EL|EF|STRONG\.\w+))*(?:\.(\d+))?", sass)]
    report.load_bytes = max(widths, default=0)
    report.warps_per_sm = min(WARPS[sm], REGISTERS // (32 * max(report.registers, 1)))
    report.fault = _fault(s, report)
    return report


def _fault(s: Specialisation, r: Report) -> str:
    if r.spilled:
        return f"spills {r.spilled} bytes"
    if r.f64:
        return f"{r.f64} .f64 instructions"
    if r.shared > MAX_SHARED:
        return f"{r.shared} bytes of shared memory"
    if s.wide_loads and r.load_bytes < WIDE:
        return f"widest load {r.load_bytes} bytes where the layout allows {WIDE}"
    return ""


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
               for flag in ("--dump-resource-usage", "--dump-sass")]  # fmt: skip
    return run[0], run[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every kernel passes, 1 if one does not, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.kernels.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--sm", default=",".join(map(str, SMS)), help="architectures, e.g. 75 or 75,80 (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of the table")
    options = parser.parse_args(argv)
    if not HAS_TRITON:
        print("preflight: triton is not installed, nothing can be compiled", file=sys.stderr)
        return 2
    try:
        sms = [int(v) for v in options.sm.split(",")]
    except ValueError:
        sms = []
    if not sms or set(sms) - set(SMS):
        parser.error(f"--sm: got {options.sm}, allowed are {', '.join(map(str, SMS))}")
    jobs = [
        (s, name, sm)
        for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16))
        for s in specialisations(dtype)
        for sm in sms
        if name != "bf16" or sm >= 80
    ]
    failures = 0
    if not options.json:
        print(f"{'kernel':58} {'dtype':5} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>6} {'load':>4} {'.f64':>4} {'warps/SM':>8}")
    with ProcessPoolExecutor() as pool:
        for r in pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4):
            failures += bool(r.fault)
            if options.json:
                print(json.dumps(asdict(r)), flush=True)
            else:
                line = f"{r.name:58} {r.dtype:5} {r.sm:>3} {r.registers:>4} {r.spilled:>5} {r.shared:>6} {r.load_bytes:>3}B"
                line += f" {r.f64:>4} {r.warps_per_sm:>8}"
                print(line + (f"  FAIL: {r.fault}" if r.fault else ""), flush=True)
    print(f"{len(jobs)} kernels compiled for sm {options.sm}, {failures} failed; compiled, not run", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
