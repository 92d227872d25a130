"""The machine that this runs on: its versions, its devices, and what it computes in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "monai",
    "onnx",
    "onnxruntime",
    "openvino",
    "liger_kernel",
    "nibabel",
    "nilearn",
)


def default_device() -> torch.device:
    """The first CUDA device, or the processor where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_half(device: torch.device) -> torch.dtype | None:
    """The half precision that `device` computes in and does not emulate.

    It is bfloat16 on a GPU from sm_80 on and on a processor with AVX512-BF16 or AMX, float16 on any other GPU, and
    None on any other processor.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and native else None


def torchrun_number(name: str, default: int, least: int, most: int) -> int:
    """What torchrun says in the environment; `default` where it does not run.

    Raises:
        UserError: no whole number, or one that is not in `least` to `most`.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"{name}: got {text!r} in the environment, allowed is {least} to {most}: torchrun sets it with the others"
        )
    return int(text)


def environment() -> dict[str, Any]:
    """What a measurement depends on: versions, processor, threads, GPU."""
    cuda = torch.cuda.is_available()
    info: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu("model name") or platform.processor(),
        "cpu_model": "/".join(_cpu(key) for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "no_gpu": _no_gpu(),
    }
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        info |= {"sm": 10 * major + minor, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return info


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _no_gpu() -> str | None:
    """Why there is no CUDA device; an old driver, say."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "no device"
