"""What float32 means on CUDA while a sampler works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def float32_precision(device: torch.device, tf32: bool) -> Iterator[None]:
    """Inside, float32 convolutions and matrix products on CUDA are of float32, or with `tf32` of 10-bit mantissas on
    tensor cores.

    PyTorch's default is TF32 for convolutions and float32 for matrix products. What was set before comes back. The
    settings are of the process: threads that sample at the same time must ask for the same.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.cuda.matmul)
    try:
        before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer names: they must not be mixed
        older = False
        before = cudnn.conv.fp32_precision, matmul.fp32_precision
    else:
        older = True

    def use(convolutions: Any, products: Any) -> None:
        if older:  # not matmul.allow_tf32, after which Inductor could not ask for the precision
            cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)
        else:
            cudnn.conv.fp32_precision, matmul.fp32_precision = convolutions, products

    try:
        use(*((tf32, "high" if tf32 else "highest") if older else ["tf32" if tf32 else "ieee"] * 2))
        yield
    finally:
        use(*before)
