"""The suites by name."""

from __future__ import annotations

import inspect

import pytest
from sbldm_fast.benchmarks.suites import SUITES


@pytest.mark.parametrize("name", SUITES)
def test_quick_arguments_are_of_the_kinds_that_the_suite_takes(name: str) -> None:
    """One number where it takes one, and several where it takes several."""
    suite = SUITES[name]
    known = inspect.signature(suite.run).parameters
    assert suite.quick.keys() <= known.keys()
    for key, value in suite.quick.items():
        assert isinstance(value, list) == isinstance(known[key].default, tuple), key
