"""Problems that nobody chose: layouts, dtypes and values for every op, and the gradients of a run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from sbldm_fast.kernels._arguments import CHANNELS_LAST
from torch import Tensor

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**32)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=CHANNELS_LAST.get(x.dim(), torch.contiguous_format)),
    "half of a concatenation": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
    "one sample for all": lambda x: x[:1].expand(x.shape),
}
HUGE = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 3e4}
TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7}  # below the smallest normal number
VALUES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "normal": lambda x, _: x,
    "mean 10": lambda x, _: x + 10,
    "mean 100": lambda x, _: x + 100,
    "constant": lambda x, _: torch.full_like(x, 3),
    "denormal": lambda x, dtype: x * TINY[dtype],
    "huge": lambda x, dtype: x.clamp(-1, 1) * HUGE[dtype],
}
lines, images, volumes = (st.tuples(*[st.integers(1, most)] * n) for n, most in ((1, 140), (2, 12), (3, 5)))
latents = st.tuples(st.integers(0, 4), st.integers(1, 3), images | volumes).map(lambda s: (*s[:2], *s[2]))
layouts, values = st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(VALUES))
bad_values = st.sampled_from([None, None, None, float("nan"), float("inf"), -float("inf")])


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str, value: str, bad: float | None = None) -> Tensor:
    x = VALUES[value](torch.randn(shape), dtype).to(dtype)
    if bad is not None:
        x.view(-1)[int(torch.randint(x.numel(), ()))] = bad
    return LAYOUTS[layout](x)


def with_gradients(
    run: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None, *upstream: Tensor
) -> dict[str, Tensor]:
    leaves = {k: (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_() for k, t in tensors.items()}
    outputs = run(**leaves)
    torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    grads = {f"d{k}": t.grad for k, t in leaves.items() if t.grad is not None}
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | grads
