"""Histories: a sampler is used, its model and scheduler changed, used again in another way; each answer is that of a
new sampler."""

from __future__ import annotations

import copy
import importlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler, DDPMScheduler, FastSampler, UNet2D, UNetConfig

SHAPE = (2, 4, 4)
UNET = UNetConfig(
    sample_size=4,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    attention_resolutions=(2,),
    attention_head_dim=4,
    norm_num_groups=4,
    time_embed_dim=8,
    dropout=0.5,
)
HISTORIES, LENGTH = (1000, 12) if os.environ.get("SBLDM_FAST_FUZZ") == "nightly" else (12, 8)
loop = importlib.import_module("sbldm_fast.sampling.loop")
source_module = importlib.import_module("sbldm_fast.sampling.source")
Mode = importlib.import_module("sbldm_fast.sampling.modes").Mode


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.gain = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Dropout(0.5),
            1.0,
        )
        self.out = nn.Conv2d(4, 2, 1)
        self.register_buffer("shift", torch.tensor(0.1), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = (
            self.gain * self.out(self.drop(nn.functional.silu(self.norm(self.conv(x))))) + self.shift + t / 9000
        )
        return out


def _step(model: nn.Module, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def _replace(model: nn.Module) -> None:
    name, module = random.choice(
        [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "." not in n]
    )
    setattr(model, name, copy.deepcopy(module))
    _scale(getattr(model, name))


def _scale(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(random.uniform(0.5, 1.5))


def _swap(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.flip(0).contiguous()


def _register(model: nn.Module) -> None:
    with torch.no_grad():
        for b in model.buffers():
            b.add_(0.1)


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}, assign=random.random() < 0.5)


CHANGES: dict[str, Callable[[nn.Module, Any], object]] = {
    "fused step": lambda model, s: _step(model, True),
    "step": lambda model, s: _step(model, False),
    "data": lambda model, s: _scale(model),
    "new data": lambda model, s: _swap(model),
    "load": lambda model, s: _load(model),
    "module": lambda model, s: _replace(model),
    "buffer": lambda model, s: _register(model),
    "number": lambda model, s: setattr(model, "gain", random.uniform(0.5, 2)),
    "training": lambda model, s: model.train(random.random() < 0.5),
    "layout": lambda model, s: model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "schedule": lambda model, s: setattr(s, "alphas_cumprod", s.alphas_cumprod * random.uniform(0.9, 1)),
    "timesteps": lambda model, s: s.set_timesteps(random.randint(1, 50)),
    "nothing": lambda model, s: None,
}
USES: dict[str, Callable[[FastSampler], Tensor]] = {
    "call": lambda s: s(3, seed=4),
    "one": lambda s: s(1, seed=5),
    "batches": lambda s: s(5, seed=1, batch_size=2),
    "trajectory": lambda s: s.trajectory(2),
    "image to image": lambda s: s.from_latents(torch.ones(2, *SHAPE), 0.6, seed=3),
    "list": lambda s: s(seed=[3, 3], n=2),
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on a CPU: what was recorded goes on with the tensors of then."""

    def record(work: Any, reset: Any, device: Any, pool: Any) -> Any:
        reset()
        return work

    monkeypatch.setattr(loop, "capture", record)
    real = source_module.parse_mode
    monkeypatch.setattr(
        source_module, "parse_mode", lambda mode, device: Mode(mode, None) if "graph" in mode else real(mode, device)
    )


@pytest.mark.parametrize("number", range(HISTORIES))
def test_every_answer_is_that_of_a_new_sampler(number: int, recorded: None) -> None:
    random.seed(number)
    torch.manual_seed(number)
    ours = number % 2 == 0
    model: nn.Module = UNet2D(UNET) if ours else Small()
    if ours:
        nn.init.normal_(model.row_offsets, std=0.1)  # type: ignore[arg-type]  # a parameter
    sched: Any = random.choice([DDIMScheduler, DDPMScheduler])(clip_sample=random.random() < 0.3)
    settings: dict[str, Any] = {
        "mode": random.choice(["eager", "eager", "step-graph", "loop-graph"]),
        "dtype": random.choice([None, None, torch.bfloat16]),
        "fuse": not ours and random.random() < 0.3,
        "decode": random.choice([None, torch.tanh]),
    }
    changes = [c for c in CHANGES if ours is False or c not in ("number", "module")]

    def make() -> FastSampler:
        return FastSampler(model, sched, shape=SHAPE, steps=5, **settings)

    sampler, history = make(), []
    for _ in range(LENGTH):
        change, use = random.choice(changes), random.choice(list(USES))
        history.append((change, use))
        CHANGES[change](model, sched)
        training = [m.training for m in model.modules()]
        got, expected = USES[use](sampler), USES[use](make())
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{settings}, {history}: {text}"
        )
        assert [m.training for m in model.modules()] == training, history
