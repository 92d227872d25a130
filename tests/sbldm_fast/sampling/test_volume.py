"""A volume: where its slices lie, windows, one loop, conditions, guidance, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sbldm_fast import Pipeline
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.sampling.field import draw_field
from sbldm_fast.sampling.volume import find_positions, windows_of

from ..small import AGE, MODALITY, UNET, small_pipeline

POSITION = Covariate("position", low=-20.0, high=20.0, unit="mm")
ASKED = replace(UNET, covariates=(AGE, MODALITY, POSITION))
HEIGHTS = [2.0 * i for i in range(-3, 3)]


@pytest.fixture(scope="module")
def mixing() -> Pipeline:
    return small_pipeline(replace(ASKED, slice_mixing=True))


def test_a_volume_is_its_slices_in_one_batch(mixing: Pipeline) -> None:
    made = mixing.sample_volume(positions=HEIGHTS, seed=3, steps=4, cond={"age": 40, "modality": "T2"})
    assert made.shape == (6, 1, 16, 16)
    sampler = mixing.sampler(4)
    cond: dict[str, Any] = {"age": 40, "modality": "T2", "position": HEIGHTS, "slice": range(6)}
    noise = draw_field(HEIGHTS, 3, mixing.latent_shape, torch.device("cpu"))
    assert torch.equal(made, sampler(noise=noise, cond=cond))
    assert not torch.allclose(made, sampler(noise=noise, cond={k: cond[k] for k in cond if k != "slice"}), atol=1e-3)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_any_mode_makes_it(mode: str, mixing: Pipeline) -> None:
    arguments: dict[str, Any] = {"positions": HEIGHTS, "steps": 3, "cond": {"age": 40}, "guidance_scale": 2.0}
    made, eager = mixing.sample_volume(mode=mode, **arguments), mixing.sample_volume(mode="eager", **arguments)
    torch.testing.assert_close(made, eager, rtol=1e-4, atol=1e-4)


def test_guidance_mixes_each_half_for_itself(mixing: Pipeline) -> None:
    """Guidance of 1 is the conditional pass, of 0 the one that is told nothing but its neighbours."""
    arguments: dict[str, Any] = {"positions": HEIGHTS, "steps": 3, "seed": 1}
    told = mixing.sample_volume(**arguments, cond={"age": 40})
    one = mixing.sample_volume(**arguments, cond={"age": 40}, guidance_scale=1.0)
    torch.testing.assert_close(one, told, rtol=1e-4, atol=1e-4)
    zero = mixing.sample_volume(**arguments, cond={"age": 40}, guidance_scale=0.0)
    noise = draw_field(HEIGHTS, 1, mixing.latent_shape, torch.device("cpu"))
    untold = mixing.sampler(3)(noise=noise, cond={"slice": range(6)})
    torch.testing.assert_close(zero, untold, rtol=1e-4, atol=1e-4)


def test_a_network_without_mixing_or_conditions_makes_one() -> None:
    pipe = small_pipeline()
    made = pipe.sample_volume(5, steps=3, seed=2)
    noise = draw_field([-4.0, -2.0, 0.0, 2.0, 4.0], 2, pipe.latent_shape, torch.device("cpu"))
    assert torch.equal(made, pipe.sampler(3)(noise=noise))


def test_windows_cover_every_slice_and_share_some() -> None:
    assert windows_of(10, 10) == windows_of(10, 99) == [0]
    for count, window in ((11, 10), (100, 64), (160, 48), (160, 16), (7, 2), (333, 40)):
        starts = windows_of(count, window)
        assert starts[0] == 0
        assert starts[-1] == count - window
        shared = [a + window - b for a, b in pairwise(starts)]
        assert min(shared) >= min(16, window // 2)


def test_windows_of_slices_that_do_not_mix_change_nothing() -> None:
    pipe = small_pipeline(ASKED)
    cond = {"age": [30.0 + i for i in range(6)]}
    whole = pipe.sample_volume(positions=HEIGHTS, steps=3, cond=cond)
    torch.testing.assert_close(
        pipe.sample_volume(positions=HEIGHTS, steps=3, cond=cond, window=4), whole, rtol=1e-4, atol=1e-5
    )


def test_windows_of_slices_that_mix_go_over_into_one_another(mixing: Pipeline) -> None:
    heights = [2.0 * i for i in range(12)]
    heights = [z - 10 for z in heights]
    parts = mixing.sample_volume(positions=heights, steps=3, window=8)
    first = mixing.sample_volume(positions=heights[:8], steps=3)
    last = mixing.sample_volume(positions=heights[4:], steps=3)
    torch.testing.assert_close(parts[:4], first[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[8:], last[4:], rtol=1e-4, atol=1e-5)
    low, high = torch.minimum(first[4:], last[:4]), torch.maximum(first[4:], last[:4])
    assert bool(((parts[4:8] >= low - 1e-5) & (parts[4:8] <= high + 1e-5)).all())


def test_positions_are_all_over_what_the_model_knows() -> None:
    assert find_positions([POSITION], None, None) == [-20.0 + 2 * i for i in range(21)]
    assert find_positions([POSITION], 3, None) == [-20.0, 0.0, 20.0]
    assert find_positions([], 2, None) == [-1.0, 1.0]
    assert find_positions([], None, torch.tensor([1, 2])) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0.0], "positions: got 1, allowed are 2 or more"),
        ([0.0, 2.0, 1.0], "positions: got 2 mm, then 1 mm, allowed is from the bottom up"),
        ([0.0, 2.0, 2.0], "positions: got 2 mm, then 2 mm"),
        ([0.0, 2.0, 6.0], "positions: got distances of 2 to 4 mm, allowed is one distance without gaps"),
        ([0.0, math.nan], "positions: got"),
        ([0.0, 1e9], "positions: got"),
        ("low", "positions: got 'low', allowed are numbers"),
        (torch.zeros(2, 3), "positions: got 0, allowed are 2 or more"),
    ],
)
def test_bad_positions_are_named(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_positions([POSITION], None, positions)


def test_what_a_volume_cannot_be_is_named(mixing: Pipeline) -> None:
    for arguments, message in (
        ({"slices": 1}, "slices: got 1, allowed is 2 or more"),
        ({"slices": 3, "positions": HEIGHTS}, "slices: got 3 and 6 positions"),
        ({"positions": HEIGHTS, "window": 1}, "window: got 1, allowed is 2 or more"),
        ({"positions": HEIGHTS, "scheduler": "ddpm"}, "scheduler: got one with noise in its steps"),
        ({"positions": HEIGHTS, "cond": {"position": 3}}, "cond: got 'position', allowed for a volume are positions"),
        ({"positions": HEIGHTS, "cond": {"slice": 3}}, "cond: got 'slice'"),
        ({"positions": [-30.0, -28.0]}, r"cond\['position'\]: got -30, the model was trained on -20 to 20 mm"),
    ):
        with pytest.raises(ValueError, match=message):
            mixing.sample_volume(**{"steps": 3, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slices: got None, allowed for a model that knows no position"):
        small_pipeline().sample_volume()


def test_too_many_slices_name_the_window_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = small_pipeline(replace(ASKED, slice_mixing=True))
    plain = type(mixing.unet).forward_rows

    def full(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("full")
        return plain(self, x, *rest)

    monkeypatch.setattr(type(mixing.unet), "forward_rows", full)
    with pytest.raises(MemoryError, match=r"window: 6 at a time do not fit into memory; 3 do.* give a window of 3"):
        mixing.sample_volume(positions=HEIGHTS, steps=3, mode="eager")


def test_guidance_keeps_volumes_of_any_numbers_apart(mixing: Pipeline) -> None:
    """Numbers in which the conditional half would follow on the unconditional one."""
    noise = draw_field(HEIGHTS[:4], 0, mixing.latent_shape, torch.device("cpu"))
    made = [
        mixing.sampler(3)(noise=noise, cond={"slice": numbers, "age": 40}, guidance_scale=3.0)
        for numbers in ([2, 3, 0, 1], [12, 13, 0, 1], [None, None, 5, 6])
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[0][2:], made[2][2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made[0][:2], made[2][:2], atol=1e-3)


def test_a_batch_does_not_end_within_a_volume(mixing: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"batch_size: got 4, allowed with cond\['slice'\] are batches that"):
        mixing.sampler(3)(6, cond={"slice": range(6)}, batch_size=4)
    two = mixing.sampler(3)(6, cond={"slice": [0, 1, 2, 0, 1, 2]}, batch_size=3)
    torch.testing.assert_close(two, mixing.sampler(3)(6, cond={"slice": [0, 1, 2, 0, 1, 2]}), rtol=1e-4, atol=1e-5)


def test_a_condition_may_be_a_scalar_of_any_library(mixing: Pipeline) -> None:
    plain = mixing.sample_volume(positions=HEIGHTS, steps=3, cond={"age": 70.0})
    for age in (np.float64(70), torch.tensor(70.0), np.array([70.0])):
        assert torch.equal(mixing.sample_volume(positions=HEIGHTS, steps=3, cond={"age": age}), plain)
    for cond in ([1, 2], "age"):
        with pytest.raises(ValueError, match=r"cond: got (list|str), allowed is a mapping of age, modality, position"):
            mixing.sample_volume(positions=HEIGHTS, steps=3, cond=cond)  # type: ignore[arg-type]
