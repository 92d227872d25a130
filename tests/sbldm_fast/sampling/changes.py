"""What a caller may do to a model that a sampler was made from, and a model that is not ours to do it to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A model that is not ours: live in eager mode, a copy in half precision and when it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * self.gain + t / 5000


class Adapted(nn.Module):
    """A convolution with a low-rank update beside it, as adapters put it into a model."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner, self.scaling = inner, {"default": 0.5}
        self.down, self.up = nn.Conv2d(inner.in_channels, 2, 1), nn.Conv2d(2, inner.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.scaling["default"] * self.up(self.down(x))
        return out


def fused_adamw(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(1.1)


def new_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.1


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def average(model: nn.Module) -> None:
    ema = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for mine, averaged in zip(model.parameters(), ema.module.parameters(), strict=True):
            mine.set_((averaged * 1.1).untyped_storage(), 0, mine.shape, averaged.stride())


def buffers(model: nn.Module) -> None:
    for b in model.buffers():
        b.mul_(1.5)


def adapter(model: nn.Module) -> None:
    assert isinstance(model, Small)
    model.conv = Adapted(model.conv)  # type: ignore[assignment]


CHANGES: list[Callable[[nn.Module], None]] = [fused_adamw, through_data, new_data, loaded, assigned, average]
