"""How programs share a group: one launch or two, and where one gives way to the other."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import _group_tiles

from .test_group_norm_silu import compare, problem

modules = tuple(importlib.import_module(f"sbldm_fast.kernels.group_norm_silu{part}") for part in ("", "_backward"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_and_two_agree(
    channels_last: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, three_way: Any
) -> None:
    x, groups, others = problem((2, 12, 16, 15, 2), torch.float32, device, 10.0, channels_last)
    assert _group_tiles.plan(x.shape, groups, channels_last, 4, 8192)[0][3] == 1
    whole = compare(x, groups, others, True, three_way)
    for m in modules:
        monkeypatch.setattr(m, "register_tile", lambda _: 256)
    for tile, chunks in ((4096, 2), (256, 8)):
        _group_tiles.plan.cache_clear()
        monkeypatch.setattr(_group_tiles, "SPLIT_TILE", tile)
        assert _group_tiles.plan(x.shape, groups, channels_last, 4, 256)[0][3] == chunks
        torch.testing.assert_close(whole, compare(x, groups, others, True, three_way), rtol=1e-5, atol=1e-5)
    _group_tiles.plan.cache_clear()


def test_the_crossover_of_an_unmeasured_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _group_tiles.register_tile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card that nobody has measured")
    _group_tiles.register_tile.cache_clear()
    assert _group_tiles.register_tile(torch.device("cuda")) == default == 8192
    _group_tiles.register_tile.cache_clear()
