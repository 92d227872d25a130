"""The T4 gate: that it covers the presets, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import GroupNormSiLU, preflight
from torch import nn

from sbldm_fast.models import AutoencoderKL, UNet2D
from sbldm_fast.models.config import PRESETS


def test_table_of_norms_is_what_the_presets_run() -> None:
    seen = set()

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, GroupNormSiLU)
        x, modulated = args[0], len(args) > 1 and args[1] is not None
        seen.add((module.num_channels, module.num_groups, x.shape[2] * x.shape[3], modulated, module.activation))

    for p in PRESETS.values():
        unet, vae = UNet2D(p.unet).eval(), AutoencoderKL(p.vae).eval()
        for m in (*unet.modules(), *vae.modules()):
            if isinstance(m, GroupNormSiLU):
                m.register_forward_pre_hook(record)
        with torch.no_grad():
            unet(torch.randn(1, p.unet.in_channels, p.unet.sample_size, p.unet.sample_size), 5)
            vae.decode(vae.encode(torch.randn(1, 1, p.vae.sample_size, p.vae.sample_size)).mean)
    assert set(preflight.PRESET_NORMS) == seen


def run(code: str) -> Any:
    """Run code in a process whose Triton compiles instead of interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRELUDE = """
import json, torch
from dataclasses import asdict
from sbldm_fast.kernels import preflight as p
one = next(s for s in p.specialisations(torch.float32) if s.name.startswith("ddim_step epsilon eta=0"))
"""


@pytest.mark.skipif(not preflight.HAS_TRITON, reason="triton is not installed")
def test_reads_registers_loads_and_warps_from_the_binary() -> None:
    r = run(PRELUDE + "print(json.dumps(asdict(p.compile_one(one, 'fp32', 75))))")
    assert r["fault"] == ""
    assert (r["spilled"], r["f64"], r["load_bytes"]) == (0, 0, 16)
    assert 8 <= r["registers"] <= 128
    assert r["warps_per_sm"] == 32


@pytest.mark.skipif(not preflight.HAS_TRITON, reason="triton is not installed")
def test_finds_float64_narrow_loads_and_kernels_that_do_not_compile() -> None:
    faults = run(
        PRELUDE
        + """
wide = one._replace(signature=one.signature | {"x": "*fp64"})
narrow = one._replace(divisible=())
broken = one._replace(constants=one.constants | {"BLOCK": 1000})
print(json.dumps([p.compile_one(s, "", 75).fault for s in (wide, narrow, broken)]))
"""
    )
    assert ".f64" in faults[0]
    assert faults[1] == "widest load 4 bytes where the layout allows 16"
    assert faults[2].startswith("does not compile")


@pytest.mark.skipif(not preflight.HAS_TRITON, reason="triton is not installed")
def test_odd_problems_compile_too() -> None:
    """Sizes of one become constants, odd sizes and strides lose their divisibility: other code paths of the compiler."""
    faults = run("""
import json, torch
from sbldm_fast.kernels import preflight as p
def norm(C, G, H, W, strides, flat, affine):
    q = p.group_norm_silu.launch_parameters(C, G, H * W, strides[1] == 1, 2)
    args = dict.fromkeys(("x", "y"), torch.float16) | dict.fromkeys(("weight", "bias"), torch.float32 if affine else None)
    args |= {"scale": None, "shift": torch.float16, "scale_stride": 0, "shift_stride": 0, "C": C, "HW": H * W, "WIDTH": W}
    args |= dict(zip(("xn", "xc", "xh", "xw", "yn", "yc", "yh", "yw"), strides * 2))
    constants = {k: v for k, v in q.items() if k != "num_warps"} | {"FLAT": flat, "SILU": True, "eps": 1e-5}
    return p.specialisation("odd", p.group_norm_silu, "_group_norm_silu_kernel", args, constants, q["num_warps"], False)
cases = [
    norm(1, 1, 1, 1, (1, 1, 1, 1), True, False),
    norm(8, 8, 1, 1, (8, 1, 1, 1), True, True),
    norm(12, 4, 5, 7, (420, 35, 7, 1), True, True),
    norm(12, 4, 5, 7, (840, 70, 14, 2), False, True),
    norm(3, 3, 129, 130, (50310, 16770, 130, 1), True, True),
    norm(15, 3, 96, 90, (129600, 1, 1350, 15), True, True),
]
print(json.dumps([p.compile_one(s, "fp16", 75).fault for s in cases]))
""")
    assert faults == [""] * 6


def report(**values: Any) -> preflight.Report:
    return preflight.Report("k", "fp32", 75, **({"load_bytes": 16} | values))


@pytest.mark.parametrize(
    ("values", "fault"),
    [({}, ""), ({"spilled": 8}, "spills 8 bytes"), ({"f64": 3}, "3 .f64"), ({"shared": 49153}, "49153 bytes of shared"),
     ({"load_bytes": 8}, "widest load 8 bytes")],
)  # fmt: skip
def test_budgets(values: dict[str, Any], fault: str) -> None:
    wide = next(s for s in preflight.specialisations(torch.float32) if s.wide_loads)
    found = preflight._fault(wide, report(**values))
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def test_bad_architecture_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        preflight.main(["--sm", "70"])
    assert stop.value.code == 2
    assert "--sm: got 70, allowed are 75, 80, 86, 89, 90, 100" in capsys.readouterr().err
