"""pytest-benchmark over the cases of the suites: python -m pytest benchmarks/bench_ddim_step.py --benchmark-save=before

A module's cases are its `pytest_cases()`, or those of an op's `problems`. `--benchmark-compare` holds a run against a
stored one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sbldm_fast.machine import default_device

from .harness import Absent, Case, failures, host, parity
from .suite_kernels import cases
from .timing import wait


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the module, named by problem and provider."""
    if "group_of_cases" not in metafunc.fixturenames:
        return
    device = default_device()
    module = metafunc.module
    groups: dict[str, dict[str, Case]]
    if hasattr(module, "pytest_cases"):
        groups = module.pytest_cases(device)
    else:
        groups = {
            f"{p.shape} {p.layout} {str(p.dtype)[6:]}": cases(p, device) for p in module.problems(device, large=False)
        }
    chosen = [(group, name) for group, found in groups.items() for name in found]
    metafunc.parametrize(
        ("group_of_cases", "provider"),
        [(groups[g], name) for g, name in chosen],
        ids=[f"{g} {name}" for g, name in chosen],
    )


@pytest.fixture
def timed(benchmark: Any, group_of_cases: dict[str, Case], provider: str) -> Callable[[], None]:
    """Times the case, after its result was compared with that of the case it is held against."""

    def run() -> None:
        case = group_of_cases[provider]
        torch.compiler.reset()
        results = {}
        try:
            call = case.build()
            results[provider] = host((case.check or call)())
        except (Absent, ImportError) as why:
            pytest.skip(f"{provider}: {why}")
        for other in {name for name in (case.reference, case.baseline) if name and name != provider}:
            theirs = group_of_cases[other]
            built = theirs.build()
            results[other] = host((theirs.check or built)())
        found = parity(case, results, results, provider)
        row = {"provider": provider, "parity": found, "approximate": case.approximate}
        assert not failures([row]), f"{failures([row])}: no figure"
        device = default_device()
        benchmark.extra_info["provider"] = provider

        def waited() -> None:
            call()
            wait(device)

        benchmark(waited)

    return run
