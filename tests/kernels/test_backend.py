"""The choice between reference and kernel."""

from __future__ import annotations

import pytest
import torch
from sbldm_fast.kernels import _backend, backend, group_norm_silu

X = torch.randn(1, 4, 2, 2)


def test_auto_is_the_reference_on_a_cpu() -> None:
    assert _backend.resolve(torch.device("cpu"))[0] == "torch"


def test_auto_is_the_kernel_on_cuda_unless_it_lacks_a_gradient_that_is_asked_for() -> None:
    assert _backend.resolve(torch.device("cuda")) == ("triton", "CUDA device")
    assert _backend.resolve(torch.device("cuda"), no_gradient=True)[0] == "torch"


def test_context_ends_with_its_block_even_by_an_error() -> None:
    before = _backend._choice
    with pytest.raises(ZeroDivisionError), backend("torch"):
        assert 1 / 0 if _backend.resolve(torch.device("cuda")) == ("torch", "asked for") else None
    assert _backend._choice == before


def test_a_gpu_too_old_for_triton_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 0))
    _backend._too_old.cache_clear()
    name, reason = _backend.resolve(torch.device("cuda"))
    _backend._too_old.cache_clear()
    assert name == "torch"
    assert "7.0 or newer, and cuda has 6.0" in reason


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda', allowed are auto, torch, triton"), backend("cuda"):
        pass


def test_triton_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        backend("triton"),
        pytest.raises(ValueError, match="backend='triton' cannot run on cpu: Triton has no cpu target"),
    ):
        group_norm_silu(X, 2)


def test_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_choice", "fast")
    with pytest.raises(ValueError, match="SBLDM_FAST_BACKEND: got 'fast'"):
        group_norm_silu(X, 2)
