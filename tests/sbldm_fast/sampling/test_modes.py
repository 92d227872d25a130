"""What `auto` is, when and why."""

from __future__ import annotations

import pytest
import torch

from sbldm_fast import FastSampler, UNet2D
from sbldm_fast.sampling import loop, modes

from ..small import SHAPE, relative, scheduler


def test_auto_says_what_it_took_and_why(unet: UNet2D) -> None:
    sampler = FastSampler(unet, scheduler(), shape=SHAPE)
    assert sampler.mode == "eager"
    assert "cpu has no CUDA graphs" in sampler.reason
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [modes.choose(*c)[0] for c in ((cuda, 1, 50), (cuda, 1, 1000), (cpu, 16, 50), (cpu, 1000, 50))] == [
        "loop-graph",
        "step-graph",
        "eager",
        "compile",
    ]


def test_auto_compiles_for_a_call_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "COMPILE_PAYS", 12)
    monkeypatch.setattr(loop, "compile_ahead", lambda function, *_: (function, False))
    sampler = FastSampler(lambda x, t: 0.1 * x, scheduler(), shape=(3, 2, 2), steps=4)
    eager = sampler(2)
    assert sampler.mode == "eager"
    assert relative(sampler(3)[:2], eager) < 1e-5
    assert sampler.mode == "compile"
    assert "3 samples of 4 steps" in sampler.reason
    sampler(2)
    assert sampler.mode == "compile", "what is compiled stays"
