"""What a step does on CUDA, counted without a GPU: operators are dispatched on meta tensors and compute nothing.

Meta tensors take CUDA's path through our ops; attention is the flash operator that PyTorch takes there in half precision.

python -m sbldm_fast.benchmarks.counts
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbldm_fast import UNet2D, preset
from sbldm_fast.models import AutoencoderKL
from sbldm_fast.models.layers import Attention
from sbldm_fast.sampling.loop import Buffers, make_step
from sbldm_fast.sampling.model import phase_upsampling, predictor

WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")  # operators that stall the host


class Counts(NamedTuple):
    """Of one step, or of decoding: operators that launch, by name; those that make the host wait; bytes that they read and write."""

    launches: Counter[str]
    waits: Counter[str]
    transfers: int
    bytes: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches, self.waits, self.transfers, self.bytes = Counter[str](), Counter[str](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if func.is_view or name in ("empty", "empty_strided", "empty_like", "detach", "new_empty", "reshape", "_unsafe_view"):
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        if name in WAITS:
            self.waits[name] += 1
        elif len(devices) > 1 and any(t.numel() > 1 for t in tensors if t.device.type == "cpu"):
            self.transfers += 1
        self.launches[name] += 1
        self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def count(batch: int = 1, dtype: torch.dtype = torch.float16, counter_rows: bool = False) -> tuple[Counts, Counts]:
    """The counts of one DDIM step of preset `paper` with our kernels, and of decoding; `counter_rows`: as `step-graph` reads its row."""
    p = preset("paper")
    unet = phase_upsampling(UNet2D(p.unet)).eval().to("meta", dtype)
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
    for module in unet.modules():
        if isinstance(module, Attention):
            module.attend = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    vae = AutoencoderKL(p.vae).eval().to("meta")
    with torch.no_grad(), backend("auto"):
        x = torch.empty(batch, p.unet.in_channels, p.unet.sample_size, p.unet.sample_size, device="meta")
        rows = torch.empty(50, unet.row_offsets.numel(), dtype=dtype, device="meta")
        table = torch.empty(50, 6, device="meta")
        buffers = Buffers(torch.zeros(2, dtype=torch.int32, device="meta"), None, None, None, None, None, None, None)
        step = make_step(predictor(unet), dtype, None, None, 0.0)
        counted = []
        for work in (
            lambda: step(x, rows.index_select(0, buffers.counter[:1]) if counter_rows else rows[:1], None, table, buffers, {}),
            lambda: vae.decode(x / 1.0),
        ):
            with _Counting() as mode:
                work()
            counted.append(Counts(mode.launches, mode.waits, mode.transfers, mode.bytes))
    return counted[0], counted[1]


def main() -> None:
    """Print the counts of the paper's UNet."""
    for batch in (1, 16, 64):
        step, decode = count(batch=batch)
        nodes = 50 * step.launches.total() + decode.launches.total()
        print(
            f"batch {batch}: a step {step.launches.total()} launches, {step.bytes / 1e6:.1f} MB read and written; decoding "
            f"{decode.launches.total()}; 50 steps and decoding in one graph {nodes} nodes; host waits "
            f"{step.waits.total() + decode.waits.total()}, transfers {step.transfers + decode.transfers}"
        )
    print("a step by operator: " + ", ".join(f"{n} {name}" for name, n in count()[0].launches.most_common()))


if __name__ == "__main__":
    main()
