"""mix_slices, of a sum and alone, against the same in PyTorch, and alone against a depth-wise convolution along z, for
which z is brought to an axis of its own and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import mix_slices
from torch import Tensor

from .suite_kernels import OpCase, Providers, on_device, ours

# slices, channels, height, width: of preset brain's first and last level, and 64 MB in float32
SHAPES = ((32, 64, 16, 16), (160, 32, 28, 20), (160, 128, 7, 5), (1024, 64, 16, 16))


def eager(
    x: Tensor, weight: Tensor, volumes: Tensor, conv_bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    h = x if conv_bias is None or residual is None else x + conv_bias[:, None, None] + residual
    below, own, above = weight[..., None, None].unbind(1)
    meet = (volumes[1:] == volumes[:-1])[:, None, None, None]
    y = h + own * h
    y[1:] += torch.where(meet, below * h[:-1], 0)
    y[:-1] += torch.where(meet, above * h[1:], 0)
    return y


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Of one volume."""
    N, C, H, W = x.shape
    along_z = x.permute(2, 3, 1, 0).reshape(H * W, C, N)
    y = F.conv1d(along_z, weight[0].t()[:, None], padding=1, groups=C).view(H, W, C, N).permute(3, 2, 0, 1)
    return x + y


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for dtype in on_device(device):
        for N, C, H, W in SHAPES[: None if large else -1]:
            x, residual = torch.randn(2, N, H, W, C, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
            weight, bias = torch.randn(1, 3, C, device=device, dtype=dtype), torch.randn(C, device=device, dtype=dtype)
            given = x, weight, torch.zeros(N, dtype=torch.int32, device=device)
            size = x.numel() * x.element_size()
            for terms in ((), (bias, residual)):
                providers: Providers = {
                    "eager": partial(eager, *given, *terms),
                    "torch.compile": partial(torch.compile(eager, dynamic=False), *given, *terms),
                }
                if not terms:
                    providers["depth-wise convolution"] = partial(convolution, x, weight)
                providers |= ours(partial(mix_slices, *given, *terms))
                # its neighbours in z find a slice in the cache
                moved, flops = size * (3 if terms else 2), x.numel() * (8 if terms else 6)
                shape = f"{N}x{C}x{H}x{W}{' of a sum' if terms else ''}"
                yield OpCase(shape, dtype, "nhwc", moved, flops, 1, providers)


def test_mix_slices(timed: Callable[[], None]) -> None:
    timed()
