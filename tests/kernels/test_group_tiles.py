"""How programs share a group: one launch or two, and where one gives way to the other."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import _group_tiles
from torch import Tensor

from .strategies import LAYOUTS
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


SHAPES = [(2, 6, 3, 4, 5), (2, 6, 1, 4, 5), (2, 6, 3, 1, 5), (2, 6, 3, 4, 1), (2, 6, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_no_image_is_seen_as_one_where_its_strides_allow_it(shape: tuple[int, ...]) -> None:
    def window(x: Tensor, *axes: int) -> Tensor:
        room = x.repeat([3 if i in axes else 1 for i in range(x.dim())])
        for axis in axes:
            room = room.narrow(axis, 1, x.shape[axis])
        return room

    views = LAYOUTS | {"columns": lambda x: window(x, x.dim() - 1), "slices": lambda x: window(x, 2)}
    volumes = {"rows": lambda x: window(x, 3), "rows and columns": lambda x: window(x, 3, 4)}
    for name, view in (views | (volumes if len(shape) == 5 else {})).items():
        x = view(torch.randn(shape))
        image = _group_tiles.as_images(x)
        assert image.dim() == 4
        assert torch.equal(image.flatten(2), x.flatten(2))
        if shape == SHAPES[0] and name in ("transposed", "rows and columns"):
            assert image.is_contiguous(), "a copy: neither pair of axes is one"
        elif 1 not in shape:
            assert image.data_ptr() == x.data_ptr(), name


def test_the_crossover_of_an_unmeasured_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _group_tiles.register_tile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card that nobody has measured")
    _group_tiles.register_tile.cache_clear()
    assert _group_tiles.register_tile(torch.device("cuda")) == default == 8192
    _group_tiles.register_tile.cache_clear()
