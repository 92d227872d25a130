"""group_norm_silu, forward and with its backward, against PyTorch, torch.compile and, where installed, Liger-Kernel.

python -m sbldm_fast.benchmarks.bench_group_norm_silu     on a GPU: measures the line to add to kernels/crossover.json
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import _group_tiles, group_norm_silu
from torch import Tensor

from .rows import Row, append, head
from .suite_kernels import OpCase, Providers, on_device, ours
from .timing import bundle_calls, summary, time_in_turns

# the paper's UNet at its three widths, its VAE's widest norm, and 64 MB in float32
SHAPES = ((1, 64, 16, 32), (16, 64, 16, 32), (16, 256, 4, 32), (1, 32, 128, 8), (16, 64, 128, 32))
TILES = (512, 1024, 2048, 4096, 8192)


# with the bias of a convolution and a shortcut before the norm
SUMS = ((1, 64, 16, 32), (64, 64, 16, 32), (64, 256, 4, 32))


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def eager_sum(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, conv_bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    h = x + conv_bias[:, None, None] + residual
    return F.silu(F.group_norm(h, groups, weight, bias)), h


def fused_sum(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, conv_bias: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    return group_norm_silu(x, groups, weight, bias, conv_bias=conv_bias, residual=residual)


def problems(device: torch.device, large: bool) -> Iterator[OpCase]:
    for dtype in on_device(device):
        for (N, C, side, groups), last, train in (
            (shape, last, train)
            for shape in SHAPES[: None if large else -1]
            for last in (False, True)
            for train in (False, True)
        ):
            x = torch.randn(N, C, side, side, device=device, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            dy, arguments = torch.randn_like(x), (groups, *torch.randn(2, C, device=device, dtype=dtype))
            compiled = torch.compile(eager, dynamic=False)
            calls: dict[str, Callable[..., Any]] = {"eager": eager, "torch.compile": compiled, "ours": group_norm_silu}
            if device.type == "cuda" and not last:
                calls["Liger-Kernel, then silu"] = _liger
            providers: Providers = {name: _step(f, x, dy, arguments, train) for name, f in calls.items()}
            providers |= ours(providers["ours"])
            size, limit = x.numel() * x.element_size(), _group_tiles.register_tile(device)
            cut, cut_back = (
                int(_group_tiles.plan(x.shape, groups, last, x.element_size(), tile)[0][3] > 1)
                for tile in (limit, limit // 2)
            )
            # forward reads x and writes y, backward reads x and dy and writes dx; a group that is cut is read twice, in
            # one more launch
            yield OpCase(
                f"{N}x{C}x{side}x{side}/{groups}{' forward and backward' if train else ''}",
                dtype,
                "nhwc" if last else "nchw",
                size * (5 if train else 2),
                x.numel() * (35 if train else 12),
                (3 + cut + 2 * cut_back if train else 1 + cut),
                providers,
                size * (cut + 2 * cut_back * train),
            )

        for N, C, side, groups in SUMS:
            x, residual = torch.randn(2, N, side, side, C, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
            given = (x, groups, *torch.randn(3, C, device=device, dtype=dtype), residual)
            sums: Providers = {
                name: partial(f, *given)
                for name, f in (("eager", eager_sum), ("torch.compile", torch.compile(eager_sum)))
            }
            sums |= ours(partial(fused_sum, *given))
            moved = 4 * x.numel() * x.element_size()  # reads x and the residual, writes h and y
            yield OpCase(f"{N}x{C}x{side}x{side}/{groups} of a sum", dtype, "nhwc", moved, x.numel() * 14, 1, sums)


def _step(
    f: Callable[..., Tensor], x: Tensor, dy: Tensor, arguments: tuple[Any, ...], train: bool
) -> Callable[[], Any]:
    if not train:
        return torch.no_grad()(lambda: f(x, *arguments))
    leaves = [x.detach().requires_grad_(), *(t.detach().requires_grad_() for t in arguments[1:])]

    def step() -> tuple[Tensor, ...]:
        y = f(leaves[0], arguments[0], *leaves[1:])
        return y, *torch.autograd.grad(y, leaves, dy)

    return step


def _liger(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    y: Tensor = function.apply(x.flatten(2), weight, bias, x.shape[1], groups, 1e-5)
    return F.silu(y).view_as(x)


def measure_crossover(rounds: int = 9) -> tuple[int, Row]:
    """The largest group that is faster in one launch than in two on this GPU, in elements; and the seconds of both, by
    size."""
    best, seconds = TILES[0], {}
    for tile in TILES:
        x = torch.randn(4, 32, tile, 1, device="cuda", dtype=torch.float16)
        calls = {f"limit {limit}": bundle_calls(partial(_with_limit, x, limit), x.device) for limit in (tile, tile - 1)}
        raw = time_in_turns({name: call for name, (call, _, _) in calls.items()}, rounds, x.device)
        one, two = (summary(raw[name])["median_s"] / times for name, (_, times, _) in calls.items())
        seconds[str(tile)] = {"one launch": one, "two": two}
        if one <= two and best in (tile, TILES[TILES.index(tile) - 1]):
            best = tile
    return best, seconds


def _with_limit(x: Tensor, limit: int) -> Tensor:
    with mock.patch.object(
        importlib.import_module("sbldm_fast.kernels.group_norm_silu"), "register_tile", return_value=limit
    ):
        return group_norm_silu(x, 32)


def test_group_norm_silu(timed: Callable[[], None]) -> None:
    timed()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("the crossover is measured on a CUDA device, and this PyTorch sees none")
    found, seconds = measure_crossover()
    if sys.argv[1:2] == ["-o"]:
        append(sys.argv[2], [head("crossover", tile=found, seconds=seconds)])
    print(json.dumps({torch.cuda.get_device_name(): found}), json.dumps(seconds))
