"""What a step does on CUDA, counted without a GPU: operators are dispatched on meta tensors and compute nothing.

Meta tensors take CUDA's path through our ops; attention is the flash operator that PyTorch takes there in half
precision, and a convolution with a bias is two launches, as cuDNN has none that adds it (seen by `launches`, as is that
it takes 7 or 8 memsets more).

python -m sbldm_fast.benchmarks.counts > benchmarks/counts.json     a test fails when they differ
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sbldm_fast import UNet2D, preset
from sbldm_fast.models import AutoencoderKL
from sbldm_fast.models.layers import Attention
from sbldm_fast.sampling.loop import Buffers, make_step
from sbldm_fast.sampling.model import merged_biases, phase_upsampling, predictor

# operators that stall the host
WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")


class Counts(NamedTuple):
    """Of one step, or of decoding: operators that launch, by name; those that make the host wait; what each launch
    moves and computes."""

    launches: Counter[str]
    waits: Counter[str]
    transfers: int
    # of each launch: bytes read and written, operations of convolutions and matrix products
    work: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Read and written by all launches."""
        return sum(moved for moved, _ in self.work)

    @property
    def flops(self) -> int:
        """Operations of the convolutions and matrix products; a multiplication and an addition are two."""
        return sum(flops for _, flops in self.work)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches, self.waits, self.transfers = Counter[str](), Counter[str](), 0
        self.work: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name == "convolution" and any(t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]):
            # as cuDNN has it; on meta tensors it would be NCHW
            out = torch.empty_like(out, memory_format=torch.channels_last)
        if func.is_view or name in (
            "empty",
            "empty_strided",
            "empty_like",
            "detach",
            "new_empty",
            "reshape",
            "_unsafe_view",
        ):
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        if name in WAITS:
            self.waits[name] += 1
        elif len(devices) > 1 and any(t.numel() > 1 for t in tensors if t.device.type == "cpu"):
            self.transfers += 1
        self.launches[name] += 1
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        # addmm_ computes what addmm does
        flops = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), func._overloadpacket))
        self.work.append((moved, flops(*args, **(kwargs or {}), out_val=out) if flops else 0))
        if name == "convolution" and args[2] is not None:
            self.launches["bias of a convolution"] += 1
            self.work.append((2 * out.numel() * out.element_size(), 0))
        return out


def count(
    batch: int = 1, dtype: torch.dtype = torch.float16, counter_rows: bool = False, preset_name: str = "paper"
) -> tuple[Counts, Counts]:
    """The counts of one DDIM step with our kernels, and of decoding; `counter_rows`: as `step-graph` reads its row."""
    p = preset(preset_name)
    unet = merged_biases(phase_upsampling(UNet2D(p.unet))).eval().to("meta", dtype)
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
    for module in unet.modules():
        if isinstance(module, Attention):
            module.attend = _flash
    vae = AutoencoderKL(p.vae).eval().to("meta")
    with torch.no_grad(), backend("auto"):
        x = torch.empty(batch, p.unet.in_channels, p.unet.sample_size, p.unet.sample_size, device="meta")
        rows = torch.empty(50, unet.row_offsets.numel(), dtype=dtype, device="meta")
        table = torch.empty(50, 6, device="meta")
        buffers = Buffers(torch.zeros(2, dtype=torch.int32, device="meta"), None, None, None, None, None, None, None)
        step = make_step(predictor(unet), dtype, torch.channels_last, None, None, 0.0)
        counted = []
        for work in (
            lambda: step(
                x, rows.index_select(0, buffers.counter[:1]) if counter_rows else rows[:1], None, table, buffers, {}
            ),
            lambda: vae.decode(x / 1.0),
        ):
            with _Counting() as mode:
                work()
            counted.append(Counts(mode.launches, mode.waits, mode.transfers, mode.work))
    return counted[0], counted[1]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose result lies as CUDA's does, heads side by side, so that the projection behind it is one
    launch."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return torch.empty_like(out.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@cache
def step_work(preset_name: str, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Launches, bytes and operations of one step on CUDA, for the rows of `FastSampler`."""
    step = count(batch, dtype, preset_name=preset_name)[0]
    return {"launches": step.launches.total(), "bytes": step.bytes, "flops": step.flops}


def counted() -> dict[str, Any]:
    """The counts that CI gates, of the paper's models in float16: what changes them shows in a diff."""
    found: dict[str, Any] = {}
    for batch in (1, 16, 64):
        step, decode = count(batch)
        launches = step.launches.total(), decode.launches.total()
        found[f"batch {batch}"] = {
            "launches of a step": launches[0],
            "bytes of a step": step.bytes,
            "operations of a step": step.flops,
            "launches of decoding": launches[1],
            "nodes of 50 steps and decoding": 50 * launches[0] + launches[1],
            "host waits": step.waits.total() + decode.waits.total(),
            "transfers": step.transfers + decode.transfers,
        }
    found["a step by operator"] = dict(count()[0].launches.most_common())
    return found


if __name__ == "__main__":
    print(json.dumps(counted(), indent=2))
