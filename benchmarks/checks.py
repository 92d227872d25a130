"""The first minute on a GPU: every op against float64 and PyTorch, and captured loops against a loop of the plain
objects.

python -m sbldm_fast.benchmarks.checks ops|graphs -o rows.jsonl     a line each, PASS, FAIL or SKIP; nothing that fails
stops the rest
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import backend, frequency_loss, group_norm_silu, mix_slices, spectral_mse
from sbldm_fast.kernels._backend import obstacle
from torch import Tensor

from sbldm_fast import FastSampler
from sbldm_fast.doctor import op_errors
from sbldm_fast.machine import default_device

from .harness import Absent, host, relative, why_not
from .rows import Row, append, head
from .setup import SamplingSetup, textbook_loop

# of the largest value, beside twice PyTorch's error
ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LOOP = 1e-4  # relative: a loop in float32
Errors = tuple[float, float]  # found, allowed


def op_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Errors]]]:
    """Every op in float32, then the gradients of the norm, of mixing and of the losses in each dtype, layout and way to
    run."""
    found = op_errors(device)
    yield from ((name, partial(_forward, call)) for name, call in found.items())
    for dtype in ATOL:
        for layout in (torch.contiguous_format, torch.channels_last):
            # a group in one program, and one that is cut
            for shape, groups in (((2, 64, 16, 16), 32), ((1, 4, 96, 90), 2)):
                name = (
                    f"group_norm_silu, gradients, {'x'.join(map(str, shape))}/{groups} {str(dtype)[6:]}"
                    f" {str(layout)[6:]}"
                )
                yield name, partial(_norm, shape, groups, dtype, layout, device)
            yield (
                f"mix_slices, gradients, {str(dtype)[6:]} {str(layout)[6:]}",
                partial(_mix, dtype, layout, device),
            )
        for side in (16, 64):  # the basis, and the FFT
            yield (
                f"frequency_loss, gradient, {side}x{side} {str(dtype)[6:]}",
                partial(_loss, frequency_loss, side, dtype, device),
            )
        yield f"spectral_mse, gradient, {str(dtype)[6:]}", partial(_loss, spectral_mse, 16, dtype, device)


def _forward(call: Callable[[], float]) -> Errors:
    with backend("torch"):
        plain = call()
    with backend("triton"):
        return call(), 2 * plain + 1e-5


def _three_way(
    run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], inputs: tuple[Tensor, ...], exact: Any
) -> Errors:
    """The largest error of the Triton op beside what is allowed: twice that of PyTorch in the same dtype, both against
    float64."""
    right = exact(tuple(t.double() for t in inputs))
    with backend("torch"):
        plain = run(inputs)
    with backend("triton"):
        ours = run(inputs)
    worst = 0.0, 1.0
    for a, b, c in zip(ours, plain, right, strict=True):
        size = max(1.0, float(c.abs().max()))
        error, allowed = (
            float((a.double() - c).abs().max()),
            2 * float((b.double() - c).abs().max()) + ATOL[inputs[0].dtype] * size,
        )
        if not error / allowed <= worst[0] / worst[1]:  # NaN is the worst of all
            worst = error, allowed
    return worst


def _norm(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Errors:
    draw = torch.Generator().manual_seed(0)
    x, residual, dy, dh = torch.randn(4, *shape, generator=draw)
    affine = torch.randn(3, shape[1], generator=draw), torch.randn(2, shape[0], shape[1], generator=draw)
    inputs = [t.to(device, dtype) for t in (x + 3, residual, dy, dh, *affine[0], *affine[1])]
    inputs[:4] = [t.contiguous(memory_format=layout) for t in inputs[:4]]

    def run(given: tuple[Tensor, ...], exact: bool = False) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (given[0], given[1], *given[4:])]
        x, residual, weight, bias, conv_bias, scale, shift = leaves
        if exact:
            h = x + conv_bias[:, None, None] + residual
            y = F.group_norm(h, groups, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None]
            y = F.silu(y)
        else:
            y, h = group_norm_silu(
                x, groups, weight, bias, scale=scale, shift=shift, conv_bias=conv_bias, residual=residual
            )
        return (y.detach(), h.detach(), *torch.autograd.grad([y, h], leaves, list(given[2:4])))

    return _three_way(run, tuple(inputs), partial(run, exact=True))


def _mix(dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> Errors:
    draw = torch.Generator().manual_seed(0)
    N, C = 5, 32
    images = torch.randn(3, N, C, 14, 10, generator=draw).to(device, dtype)
    x, residual, dy = (t.contiguous(memory_format=layout) for t in images)
    weight, bias = (torch.randn(*shape, generator=draw).to(device, dtype) for shape in ((N, 3, C), (C,)))
    volumes = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32, device=device)

    def run(given: tuple[Tensor, ...], exact: bool = False) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given[:4]]
        x, weight, bias, residual = leaves
        if exact:
            h = x + bias[:, None, None] + residual
            h = h + (h.to(dtype).double() - h).detach()  # what is mixed is rounded
            parts = zip(h.split([3, 2]), weight[..., None, None].split([3, 2]), strict=True)
            y = torch.cat([_mixed(*part) for part in parts])
        else:
            y = mix_slices(x, weight, volumes, bias, residual)
        return y.detach(), *torch.autograd.grad(y, leaves, given[4])

    return _three_way(run, (x, weight, bias, residual, dy), partial(run, exact=True))


def _mixed(h: Tensor, w: Tensor) -> Tensor:
    """One volume."""
    below, above = F.pad(h, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], F.pad(h, (0, 0, 0, 0, 0, 0, 0, 1))[1:]
    return h + w[:, 0] * below + w[:, 1] * h + w[:, 2] * above


def _loss(loss: Any, side: int, dtype: torch.dtype, device: torch.device) -> Errors:
    inputs = torch.randn(2, 2, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    factor = side * side if loss is spectral_mse else 1.0

    def run(given: tuple[Tensor, ...], exact: bool = False) -> tuple[Tensor, ...]:
        pred = given[0].detach().requires_grad_()
        value = factor * F.mse_loss(pred, given[1]) if exact else loss(pred, given[1])
        return value.detach(), *torch.autograd.grad(value, pred)

    return _three_way(run, (inputs[0], inputs[1]), partial(run, exact=True))


def graph_checks(device: torch.device, preset_name: str = "paper") -> Iterator[tuple[str, Callable[[], Errors]]]:
    """Five steps in each mode against the textbook's loop in plain PyTorch, in float32. A capture that fails makes
    later ones suspect."""
    problem = SamplingSetup(preset_name, 5, 1, device)

    def loop(mode: str) -> Errors:
        if mode != "eager" and device.type != "cuda":
            raise Absent("CUDA graphs need CUDA")
        unet, scheduler = problem.ours
        with backend("torch"):
            wanted = host(textbook_loop(unet, scheduler, 5, problem.noise))
        sampler = FastSampler(unet, scheduler, shape=problem.noise.shape[1:], steps=5, mode=mode)
        # captured, replayed, replayed
        return max(relative(host(sampler(noise=problem.noise)), wanted) for _ in range(3)), LOOP

    yield from ((f"FastSampler {mode}", partial(loop, mode)) for mode in ("eager", "loop-graph", "step-graph"))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m sbldm_fast.benchmarks.checks")
    parser.add_argument("what", choices=("ops", "graphs"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="paper")
    given = parser.parse_args(arguments)
    device = default_device()
    torch.backends.cudnn.allow_tf32 = False
    failed = 0
    common = head("checks", device=str(device))
    why = obstacle(device) if given.what == "ops" else None
    for name, check in op_checks(device) if given.what == "ops" else graph_checks(device, given.preset):
        row: Row = {"check": name}
        start = time.perf_counter()
        try:
            if why:
                raise Absent(why)
            error, allowed = check()
            row |= {"error": error, "allowed": allowed, "ok": error <= allowed}
        except Exception as problem:  # whatever a first launch raises: it is the finding
            row |= why_not(problem)
        row["seconds"] = round(time.perf_counter() - start, 3)
        append(given.out, [common | row])
        verdict = "SKIP" if "absent" in row else "PASS" if row.get("ok") else "FAIL"
        failed += verdict == "FAIL"
        detail = row.get("absent") or row.get("failed") or f"error {row['error']:.1e}, allowed {row['allowed']:.1e}"
        print(f"{verdict} {name}: {detail} ({row['seconds']:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
