"""What a step does on CUDA, counted without a GPU: the launches, bytes and operations of what `record` has recorded.

A convolution with a bias is two launches, as cuDNN has none that adds it (seen by `launches`, as is that it takes 7 or
8 memsets more).

python -m sbldm_fast.benchmarks.counts > benchmarks/counts.json     a test fails when they differ
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .record import Call, record_step

# operators that stall the host
WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")
# operators that launch nothing, as views do
ALLOCATIONS = (
    "empty",
    "empty_strided",
    "empty_like",
    "detach",
    "new_empty",
    "reshape",
    "_unsafe_view",
)


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


def count_calls(calls: Iterable[Call]) -> Counts:
    """What recorded calls launch, move and compute."""
    counts = Counts(Counter(), Counter(), 0, [])
    for call in calls:
        name = call.operator._overloadpacket.__name__
        if call.operator.is_view or name in ALLOCATIONS:
            continue
        tensors = [t for t in tree_leaves((call.args, call.kwargs, call.out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        if name in WAITS:
            counts.waits[name] += 1
        elif len(devices) > 1 and any(t.numel() > 1 for t in tensors if t.device.type == "cpu"):
            counts = counts._replace(transfers=counts.transfers + 1)
        counts.launches[name] += 1
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        # addmm_ computes what addmm does
        flops = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), call.operator._overloadpacket))
        counts.work.append((moved, flops(*call.args, **call.kwargs, out_val=call.out) if flops else 0))
        if name == "convolution" and call.args[2] is not None:
            counts.launches["bias of a convolution"] += 1
            counts.work.append((2 * call.out.numel() * call.out.element_size(), 0))
    return counts


def count(
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    counter_rows: bool = False,
    preset_name: str = "paper",
    volume: bool = False,
) -> tuple[Counts, Counts]:
    """The counts of one DDIM step with our kernels, and of decoding, of `record_step` with these arguments."""
    step, decode = record_step(batch, dtype, counter_rows, preset_name, volume)
    return count_calls(step), count_calls(decode)


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
    for name, volume in (("a volume of 160 slices", True), ("160 slices apart", False)):  # 003's, preset brain
        step, decode = count(160, preset_name="brain", volume=volume)
        found[name] = {
            "launches of a step": step.launches.total(),
            "bytes of a step": step.bytes,
            "operations of a step": step.flops,
            "of these mix_slices": step.launches["mix_slices"],
            "operations of decoding": decode.flops,
            "host waits": step.waits.total(),
            "transfers": step.transfers,
        }
    found["batch 1 with covariates"] = {"launches of a step": count(preset_name="covariates")[0].launches.total()}
    found["a step by operator"] = dict(count()[0].launches.most_common())
    return found


if __name__ == "__main__":
    print(json.dumps(counted(), indent=2))
