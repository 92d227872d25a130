"""A sampler that several threads share, and one that calls itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import FastSampler, Pipeline
from sbldm_fast.sampling.turn import Turn

from ..small import scheduler, small_pipeline


def at_once(work: Callable[[int], Tensor], seeds: range) -> list[Tensor]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, seeds))


def test_threads_that_share_a_pipeline_get_what_each_would_alone() -> None:
    torch.manual_seed(2)
    pipe = small_pipeline()
    alone = [Pipeline(pipe.vae, pipe.unet, pipe.scheduler.config).sample(2, seed=seed, steps=5) for seed in range(12)]
    for got, expected in zip(at_once(lambda seed: pipe.sample(2, seed=seed, steps=5), range(12)), alone, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_threads_that_share_a_sampler_take_turns(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, 3, padding=1)
    sampler = FastSampler(lambda x, t: model(x), scheduler(), shape=(2, 4, 4), steps=5, mode=mode, eta=0.5)
    alone = [sampler(2, seed=seed) for seed in range(8)]
    for got, expected in zip(at_once(lambda seed: sampler(2, seed=seed), range(8)), alone, strict=True):
        assert torch.equal(got, expected)
    latents = [sampler.from_latents(alone[0], 0.4, seed=seed) for seed in range(8)]
    for got, expected in zip(
        at_once(lambda seed: sampler.from_latents(alone[0], 0.4, seed=seed), range(8)), latents, strict=True
    ):
        assert torch.equal(got, expected)


def test_streams_of_one_sampler_may_alternate() -> None:
    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(2, 4, 4), steps=5, mode="eager")
    one, two = sampler.stream(4, seed=1, batch_size=2), sampler.stream(4, seed=2, batch_size=2)
    parts = [next(one), next(two), next(one), next(two)]
    assert torch.equal(torch.cat(parts[::2]), sampler(4, seed=1, batch_size=2))
    assert torch.equal(torch.cat(parts[1::2]), sampler(4, seed=2, batch_size=2))


@pytest.mark.parametrize("where", ["callback", "model", "decode"])
def test_a_call_from_inside_is_an_error_and_not_a_deadlock(where: str) -> None:
    again: dict[str, Any] = {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        if where == "model" and "sampler" in again:
            again.pop("sampler")(1)
        return 0.1 * x

    def decode(z: Tensor) -> Tensor:
        return sampler(1) if where == "decode" else z

    sampler = FastSampler(model, scheduler(), shape=(2, 4, 4), steps=3, mode="eager", decode=decode)
    again["sampler"] = sampler
    callback = (lambda i, t, x: sampler.from_latents(x, 0.5)) if where == "callback" else None
    with pytest.raises(
        ValueError, match="sampler: got a call from its own callback, model or decode, allowed is another sampler"
    ):
        sampler(1, callback=callback)
    where = ""
    again.clear()
    assert sampler(1).shape == (1, 2, 4, 4), "the turn was given back"


def test_a_turn_that_fails_is_given_back_to_those_who_wait() -> None:
    turn, order = Turn(), []

    def wait() -> None:
        with turn:
            order.append("second")

    waiting = threading.Thread(target=wait)
    with pytest.raises(KeyError), turn:  # noqa: PT012  # of one turn
        waiting.start()
        order.append("first")
        raise KeyError
    waiting.join(10)
    assert order == ["first", "second"]
