"""The processes that train together."""

from __future__ import annotations

import pytest

from sbldm_fast.errors import UserError
from sbldm_fast.training.ranks import torchrun


@pytest.mark.parametrize(
    ("name", "value"), [("LOCAL_RANK", "x"), ("LOCAL_RANK", "-1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "0")]
)
def test_an_environment_that_is_no_torchruns_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for key in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: got '{value}' in the environment"), torchrun():
        pass
