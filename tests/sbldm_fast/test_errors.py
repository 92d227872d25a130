"""Errors say what to do, in any process."""

from __future__ import annotations

import pickle

from sbldm_fast.errors import MissingExtra


def test_a_missing_extra_reaches_another_process() -> None:
    """As from a process that reads scans, which would else end as one that was killed."""
    error = pickle.loads(pickle.dumps(MissingExtra("reading NIfTI", "nibabel", "data")))
    assert str(error) == "reading NIfTI needs nibabel: pip install 'sbldm_fast[data]'"
    assert error.name == "nibabel"
