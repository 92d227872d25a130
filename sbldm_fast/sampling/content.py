"""What a model and a scheduler are, by content: a sampler compares it with what it was made from, once a batch.

Identity and version counters do not tell: a fused optimiser, `.data` and `load_state_dict` change weights in the same memory, and some
leave PyTorch's version counter as it was. So all bits are read where they lie, and summed in 1,021 columns with a random weight each: a
prime that the sides of tensors do not share, so that exchanged channels fall into other columns. A digest guards against changes, not
against somebody who looks for two weights of one digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COLUMNS = 1021
TOGETHER = {"cpu": 2**15, "cuda": 2**24}  # elements of small tensors that are summed in one: a copy costs less than a call
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_INTEGERS = {1: torch.uint8, 2: torch.int16}  # else int32, whose sums cannot overflow: two signs that change would be none


def tensors_of(*models: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, also what is left out of a state dict."""
    for model in models:
        yield from model.named_parameters()
        yield from model.named_buffers()


def structure(*models: nn.Module) -> tuple[Any, ...]:
    """The modules with the numbers and words that they keep, and the kind of every tensor; nothing is read from a device."""
    modules = tuple((name, type(m), _words(vars(m))) for model in models for name, m in model.named_modules())
    return modules, tuple((name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors_of(*models))


def addresses(*models: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which tensors the modules hold and where: what a recorded graph reads, and keeps reading."""
    return tuple((id(t), t.data_ptr()) for _, t in tensors_of(*models))


def digest(*models: nn.Module) -> int:
    """64 bits of the bits of every parameter and buffer, summed on its device: one number is fetched from each.

    `sum_k sum_c w_kc mix(sum_r bits_k[1021 r + c]) mod 2^64`, over groups k of tensors of one device and width, w random;
    mix(s) = s + s / 2^29 brings the signs of many elements down to where w has its bits.
    """
    groups: dict[tuple[torch.device, int], list[Tensor]] = {}
    for _, t in tensors_of(*models):
        if t.numel() and not t.is_meta:
            groups.setdefault((t.device, t.itemsize), []).append(_bits(t))
    total = 0
    for number, ((device, _), bits) in enumerate(sorted(groups.items(), key=lambda item: str(item[0]))):
        sums = torch.stack([_columns(v) for v in _packed(bits, TOGETHER.get(device.type, 2**15))])
        total += int(((sums + (sums >> 29)) * _weights(number, len(sums), device)).sum())
    return total % 2**64


def fingerprint(thing: object) -> str:
    """A hash of an object's numbers, words, arrays and tensors, and of those inside them; functions and what has no values are left out."""
    made = hashlib.sha256()
    _feed(made, thing, 8)
    return made.hexdigest()


def _bits(t: Tensor) -> Tensor:
    """The elements in the order of memory, as integers; a view, unless they overlap or have gaps."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(order).reshape(-1).view(_INTEGERS.get(t.itemsize, torch.int32))


def _packed(bits: list[Tensor], most: int) -> Iterator[Tensor]:
    """Small ones put together up to `most` elements, in their order; large ones as they are."""
    waiting: list[Tensor] = []
    for v in bits:
        if waiting and sum(len(w) for w in waiting) + len(v) > most:
            yield torch.cat(waiting)
            waiting = []
        if len(v) > most:
            yield v
        else:
            waiting.append(v)
    if waiting:
        yield torch.cat(waiting)


def _columns(v: Tensor) -> Tensor:
    rows = len(v) // COLUMNS
    sums = v[: rows * COLUMNS].view(rows, COLUMNS).sum(0, dtype=torch.int64)
    rest = v[rows * COLUMNS :]
    sums[: len(rest)] += rest
    return sums


@cache
def _weights(number: int, count: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randint(-(2**62), 2**62, (count, COLUMNS), generator=random).mul_(2).add_(1).to(device)  # odd: no bit is multiplied away


def _words(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The plain values of a module, and of the containers among them (a LoRA's scaling is in a dictionary); not whether it trains."""
    return tuple((k, _plain(v)) for k, v in values.items() if k != "training" and (k[0] != "_" or k == "_internal_dict"))


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return tuple((str(k), _plain(v)) for k, v in value.items()) if isinstance(value, Mapping) else None


def _feed(made: Any, thing: object, depth: int) -> None:
    made.update(f"{type(thing).__qualname__}:".encode())
    if isinstance(thing, Tensor):
        made.update(f"{tuple(thing.shape)}{thing.dtype}".encode())
        made.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, np.ndarray):
        made.update(f"{thing.shape}{thing.dtype}".encode() + thing.tobytes())
    elif isinstance(thing, (*_PLAIN, np.generic)):
        made.update(f"{thing!r};".encode())
    elif depth and isinstance(thing, Mapping):
        for key, value in thing.items():
            made.update(f"{key}=".encode())
            _feed(made, value, depth - 1)
    elif depth and isinstance(thing, (list, tuple)):
        for value in thing:
            _feed(made, value, depth - 1)
    elif depth and (isinstance(thing, nn.Module) or not callable(thing)):
        _feed(made, getattr(thing, "__dict__", {}), depth - 1)
