"""pytest-benchmark over the cases of the suites: python -m pytest benchmarks/bench_ddim_step.py --benchmark-save=before

A module's cases are its `pytest_cases()`, or those of an op's `problems`. `--benchmark-compare` holds a run against a stored one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .harness import Absent, Case, relative, tensors
from .kernels import cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the module, named by problem and provider."""
    if "group_of_cases" not in metafunc.fixturenames:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = metafunc.module
    groups: dict[str, dict[str, Case]]
    if hasattr(module, "pytest_cases"):
        groups = module.pytest_cases(device)
    else:
        groups = {f"{p.shape} {p.layout} {str(p.dtype)[6:]}": cases(p, device) for p in module.problems(device, large=False)}
    chosen = [(group, name) for group, found in groups.items() for name in found]
    metafunc.parametrize(
        ("group_of_cases", "provider"), [(groups[g], name) for g, name in chosen], ids=[f"{g} {name}" for g, name in chosen]
    )


@pytest.fixture
def timed(benchmark: Any, group_of_cases: dict[str, Case], provider: str) -> Callable[[], None]:
    """Times the case, after its result was compared with that of the case it is held against."""

    def result(case: Case) -> tuple[Any, list[torch.Tensor]]:
        call = case.build()
        return call, [t.detach().float().cpu().clone() for t in tensors((case.check or call)())]

    def run() -> None:
        case = group_of_cases[provider]
        torch.compiler.reset()
        try:
            call, got = result(case)
        except (Absent, ImportError) as why:
            pytest.skip(f"{provider}: {why}")
        if case.against not in (None, provider):
            wanted = result(group_of_cases[case.against])[1]
            error = max(relative(a, b) for a, b in zip(got, wanted, strict=True))
            plain = group_of_cases.get(case.plain or "")
            lost = max(relative(a, b) for a, b in zip(result(plain)[1], wanted, strict=True)) if plain else 0.0
            assert error <= case.tolerance + 2 * lost, f"{provider} differs from {case.against} by {error:.1e}: no figure"
        benchmark.extra_info["provider"] = provider
        benchmark(call)

    return run
