"""What is said when memory is full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sbldm_fast import FastSampler

from ..small import scheduler


def test_out_of_memory_says_what_fits() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.1 * x

    sampler = FastSampler(model, scheduler(), shape=(2,), steps=3, mode="eager")
    with pytest.raises(
        MemoryError,
        match="n: 16 at a time do not fit into memory; 4 do, a step of them ran just now: give a batch size of 4",
    ):
        sampler(16)
    assert sampler(16, batch_size=4).shape == (16, 2)


def test_out_of_memory_of_decoding_and_other_errors() -> None:
    def decode(z: Tensor) -> Tensor:
        if len(z) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z

    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(2,), steps=3, mode="eager", decode=decode)
    with pytest.raises(MemoryError, match="n: 16 at a time do not fit into memory; 2 do"):
        sampler(16)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory") if len(x) > 2 else RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        FastSampler(broken, scheduler(), shape=(2,), steps=3, mode="eager")(4)
