"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.backends.cudnn.allow_tf32 = False  # parity is judged in float32
if not torch.cuda.is_available():
    # before any kernel file is imported: Triton decides at decoration time whether it interprets
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Triton reads the variable above when kernels are defined
from sbldm_fast.kernels._backend import HAS_TRITON, tl  # noqa: E402

# SBLDM_FAST_FUZZ=nightly pytest tests/kernels/test_fuzz.py --hypothesis-show-statistics
_common = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, derandomize=True, **_common)
settings.register_profile("nightly", max_examples=1000, **_common)
# each example of a kernel compiles on a GPU: a failure is told as it was found, without the hundreds that would make it
# smaller
settings.register_profile("gpu", max_examples=25, derandomize=True, phases=(Phase.explicit, Phase.generate), **_common)
settings.load_profile(os.environ.get("SBLDM_FAST_FUZZ", "gpu" if torch.cuda.is_available() else "ci"))

ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
CHROMIUM = shutil.which("chromium")
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled steps of tests stay out of the user's cache."""
    os.environ["SBLDM_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def fresh_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of preset `demo` with fresh weights."""
    from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, preset

    torch.manual_seed(0)
    p = preset("demo")
    path = tmp_path_factory.mktemp("pipe") / "p"
    Pipeline(AutoencoderKL(p.vae), UNet2D(p.unet), p.scheduler).save(path)
    return path


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU (Triton's interpreter) and, where there is one, the GPU."""
    return torch.device(request.param)


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """New tensors lie on the CPU (Triton's interpreter) and, where there is one, on the GPU."""
    with device:
        yield


@pytest.fixture
def three_way() -> Callable[..., None]:
    """`err(ours, fp64) <= 2 err(torch in the same dtype, fp64) + atol(dtype)`, NaN and Inf in the same places."""

    def check(
        ours: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, gradient: bool = False, unit: float = 1.0
    ) -> None:
        assert ours.dtype == same.dtype
        assert ours.shape == same.shape == exact.shape
        finite = exact.isfinite() & same.isfinite()
        assert torch.equal(ours.isnan(), same.isnan()), "NaN where the reference has none, or the reverse"
        assert torch.equal(ours[ours.isinf()], same[same.isinf()]), (
            "Inf where the reference has none, or of the other sign"
        )
        if finite.any():
            error = float((ours.double() - exact)[finite].abs().max())
            # a gradient is a sum over pixels or the batch: its rounding goes with its size, not with one; unit: the
            # size of its terms
            unit = max(1.0, unit, float(exact[finite].abs().max()) if gradient else 0.0)
            allowed = 2 * float((same.double() - exact)[finite].abs().max()) + ATOL[ours.dtype] * unit
            assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every `torch.empty` and `torch.empty_like` with NaN, so that an element left unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture(scope="session")
def ms_scans() -> Path:
    """The real scans of `../shared/data/ms` (Lesjak et al. 2016, CC-BY)."""
    if not (SHARED / "ms").is_dir():
        pytest.skip("the real scans are not beside this checkout (../shared/data/ms)")
    return SHARED / "ms"


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_to_bfloat16() -> None:
    """Triton's interpreter cuts float32 off to bfloat16 and loses subnormal numbers; a GPU rounds, as PyTorch does."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not HAS_TRITON:
        return
    from triton.runtime import interpreter

    builder, plain = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        elif kinds == (tl.bfloat16, tl.float32):
            data = torch.from_numpy(np.array(source.data).view(np.int16)).view(torch.bfloat16).float().numpy()
        else:
            return plain(self, source, to)
        return interpreter.TensorHandle(data, to.scalar)

    builder.cast_impl = cast


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a page in a real browser, with its flags; what it prints."""
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")

    def run(url: str, *flags: str) -> str:
        quiet = [
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        quiet += [
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=4000",
        ]
        done = subprocess.run(
            [CHROMIUM, "--headless", *quiet, *flags, url], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    return run
