"""What the machine computes in, by the flags of its processor."""

from __future__ import annotations

import pytest
import torch

from sbldm_fast import doctor
from sbldm_fast.machine import environment, native_half
from sbldm_fast.training.config import amp_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(("avx512_bf16", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_bf16_is_native_with_avx512_bf16_or_amx(avx512_bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, doctor and benchmarks give one answer; AVX512-BF16 without AMX was two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.bfloat16 if avx512_bf16 or amx else None
    assert native_half(CPU) is expected
    assert amp_dtype("auto", CPU) is expected
    assert doctor.doctor()["native_bf16"] is (expected is not None)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bf16_computes_in_float16(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert native_half(torch.device("cuda")) is expected


def test_an_old_driver_is_the_reason_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert environment()["no_gpu"] == "The NVIDIA driver on your system is too old (found version 11040)."
