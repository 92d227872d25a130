"""What a model and a scheduler are, by content: a sampler compares it with what it was made from, once a batch.

Identity and version counters do not tell: a fused optimiser, `.data` and `load_state_dict` change weights in the same memory, and some
leave PyTorch's version counter as it was. So all bits are read where they lie, and summed in 1,021 columns with a random weight each: a
prime that the sides of tensors do not share, so that exchanged channels fall into other columns. A digest guards against changes, not
against somebody who looks for two weights of one digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COLUMNS = 1021
TOGETHER = 2**17, 2**24  # elements of small tensors that are summed in one, on a CPU and elsewhere: a copy costs less than a call
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def survey(*models: nn.Module) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The structure of models: every module with the numbers and words that it keeps (a LoRA's scaling is in a dictionary) but not whether
    it trains, and the kind of every tensor; and the tensors, parameters and buffers, also what is left out of a state dict.
    """  # fmt: skip
    modules, kinds, tensors = [], [], []
    for model in models:
        for name, module in model.named_modules():
            values = vars(module)
            words = tuple((k, _plain(v)) for k, v in values.items() if k == "_internal_dict" or (k[0] != "_" and k != "training"))
            modules.append((name, type(module), words))
            for found in (values["_parameters"], values["_buffers"]):
                for key, t in found.items():
                    if t is not None:
                        kinds.append((key, t.shape, t.stride(), t.dtype, t.device))
                        tensors.append(t)
    return (modules, kinds), tensors


def addresses(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Which tensors they are, and where: what a recorded graph reads, and keeps reading."""
    return [(id(t), t.data_ptr()) for t in tensors]


def digest(tensors: Iterable[Tensor]) -> int:
    """64 bits of the bits of all tensors, summed where they lie: one number is fetched from each device.

    `sum_k sum_c w_kc mix(sum_r bits_k[1021 r + c]) mod 2^64`, over groups k of tensors of one device and width, w random;
    mix(s) = s + s / 2^29 brings the signs of many elements down to where w has its bits.
    """
    groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    with torch.no_grad():
        for t in tensors:
            if not t.is_meta and (n := t.numel()):
                groups.setdefault((t.get_device(), t.dtype), []).append(t.view(-1) if t.is_contiguous() else _flat(t, n))
        total = 0
        for number, (_, found) in enumerate(sorted(groups.items(), key=lambda item: str(item[0]))):
            device = found[0].device
            sums = torch.stack([_columns(_bits(v)) for v in _packed(found, TOGETHER[device.type != "cpu"])])
            total += int(((sums + (sums >> 29)) * _weights(number, len(sums), device)).sum())
    return total % 2**64


def fingerprint(thing: object) -> str:
    """A hash of an object's numbers, words, arrays and tensors, and of those inside them; functions and what has no values are left out."""
    made = hashlib.sha256()
    _feed(made, thing, 8)
    return made.hexdigest()


def _flat(t: Tensor, n: int) -> Tensor:
    """The elements in the order of memory; a view, unless they overlap or have gaps."""
    ordered = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return ordered.reshape(n).contiguous()


def _bits(v: Tensor) -> Tensor:
    if v.is_complex():
        v = torch.view_as_real(v.resolve_conj()).flatten()
    # pairs of float32 are read twice as fast; the sums of float64 would overflow and lose its signs two by two
    pairs = v.dtype == torch.float32 and len(v) % 2 == 0 and v.storage_offset() % 2 == 0
    return v.view(torch.int64 if pairs else _INTEGERS.get(v.itemsize, torch.int32))


def _packed(bits: list[Tensor], most: int) -> Iterator[Tensor]:
    """Small ones put together up to `most` elements, in their order; large ones as they are."""
    waiting: list[Tensor] = []
    total = 0
    for v in bits:
        n = v.numel()
        if waiting and total + n > most:
            yield torch.cat(waiting)
            waiting, total = [], 0
        if n > most:
            yield v
        else:
            waiting.append(v)
            total += n
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
