"""The GAN of 000 section 4.5: a small, standard one, of MONAI's blocks.

Losses: `softplus(-D(x)) + softplus(D(G(z)))` for the discriminator, `softplus(-D(G(z)))` for the generator, z 64 normal
numbers; Adam at 2e-4 with betas 0.5 and 0.999, in turns. Source: Goodfellow et al. 2014, arXiv:1406.2661; the recipe of
Radford et al. 2016, arXiv:1511.06434.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.data import Slices

from ..errors import MissingExtra

NOISE = 64  # numbers that an image is made from
WIDTHS = (128, 64, 32)


@dataclass(frozen=True)
class TrainedGAN:
    """A generator, and what training it took."""

    generator: nn.Module
    parameters: int
    steps: int
    seconds: float

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> Tensor:
        """n images in [-1, 1]."""
        z = torch.randn(n, NOISE, generator=torch.Generator().manual_seed(seed))
        device = next(self.generator.parameters()).device
        return torch.cat([self.generator(part.to(device)).tanh().cpu() for part in z.split(50)])


def train_gan(
    data: Slices, seconds: float, batch_size: int, seed: int, clock: Callable[[], float], device: torch.device
) -> TrainedGAN:
    """Train for so many seconds of `clock` on square slices, their side a multiple of 8.

    Raises:
        ImportError: MONAI is not installed.
    """
    try:
        from monai.networks.nets import Discriminator, Generator
    except ImportError:
        raise MissingExtra("the GAN of table 4.5", "monai", "bench") from None
    torch.manual_seed(seed)
    batch: Any = ("batch", {"affine": True})
    side = data.array.shape[-1]
    small = side // 2 ** len(WIDTHS)
    widths = (*WIDTHS[1:], 1)
    generator = Generator((NOISE,), (WIDTHS[0], small, small), widths, (2, 2, 2), 5, 0, "RELU", batch).to(device)
    leaky: Any = ("leakyrelu", {"negative_slope": 0.2})
    critic = Discriminator((1, side, side), WIDTHS[::-1], (2, 2, 2), 5, 0, leaky, batch, None, last_act=None).to(device)
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (critic, generator)]
    draw = torch.Generator().manual_seed(seed)
    start, steps = clock(), 0
    while clock() - start < seconds:
        x = data[torch.randint(len(data), (batch_size,), generator=draw)].to(device)
        made = generator(torch.randn(batch_size, NOISE, generator=draw).to(device)).tanh()
        loss = F.softplus(-critic(x)).mean() + F.softplus(critic(made.detach())).mean()
        _descend(loss, optimizers[0])
        _descend(F.softplus(-critic(made)).mean(), optimizers[1])
        steps += 1
    parameters = sum(p.numel() for m in (critic, generator) for p in m.parameters())
    return TrainedGAN(generator.eval(), parameters, steps, clock() - start)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
