"""What a model and a scheduler are, by content: a sampler compares it with what it was made from, once a batch.

Identity and version counters do not tell: a fused optimiser, `.data` and `load_state_dict` change weights in the same
memory, and some leave PyTorch's version counter as it was. So all bits are read where they lie, and summed in 1,021
columns with a random weight each: a prime that the sides of tensors do not share, so that exchanged channels fall into
other columns, unless 1,021 lie between them. A digest guards against changes, not against somebody who looks for two
weights of one digest.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COLUMNS = 1021
# elements of small tensors that are summed in one, on a CPU and elsewhere: a copy costs less than a call
TOGETHER = 2**17, 2**24
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
MANY = 256  # values: what holds more of them is data and no model
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # what PyTorch keeps in each, `training` among it
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def parts_of(thing: object, depth: int = 4) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules and loose tensors that a model or function is made of: itself, its owner, what it closes over, names
    or holds."""
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    seen: set[int] = set()

    def look(thing: object, depth: int) -> None:
        if depth < 0 or id(thing) in seen or isinstance(thing, (*_PLAIN, type, ModuleType)):
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            modules.append(thing)
        elif isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, (list, tuple, set, Mapping)):
            for inner in (thing.values() if isinstance(thing, Mapping) else thing) if len(thing) < MANY else ():
                look(inner, depth - 1)
        elif isinstance(thing, FunctionType):
            code, names = thing.__code__, thing.__globals__
            held = [names[n] for n in code.co_names if n in names] + [
                c.cell_contents for c in thing.__closure__ or () if _filled(c)
            ]
            for inner in (*held, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()):
                look(inner, depth - 1)
        elif isinstance(thing, partial):
            for inner in (thing.func, *thing.args, *thing.keywords.values()):
                look(inner, depth - 1)
        elif not hasattr(thing, "at_work"):  # a sampler looks after its own
            for inner in (
                getattr(thing, "__self__", None),
                getattr(thing, "__wrapped__", None),
                getattr(thing, "__dict__", None),
            ):
                look(inner, depth)

    look(thing, depth)
    return modules, tensors


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a function that is not defined yet
        return False


def survey(modules: Iterable[nn.Module], loose: Iterable[Tensor] = ()) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The structure of modules: each of their parts with the numbers, words and hooks that it keeps (a LoRA's scaling
    is in a dictionary) but not whether it trains, and the kind of every tensor; and the tensors: parameters, buffers,
    also those in no state dict, and attributes that are neither.
    """
    parts: list[Any] = []
    tensors, waiting, met = list(loose), list(modules), set[int]()
    while waiting:
        for name, module in waiting.pop(0).named_modules(memo=None):
            if id(module) in met:
                continue
            met.add(id(module))
            values = vars(module)
            words = []
            for key, value in values.items():
                if key not in _OF_EVERY_MODULE:
                    words.append((key, _plain(value, tensors, waiting)))
                elif key in _HOOKS and value:
                    words.append((key, tuple(map(id, value.values()))))
            parts.append((name, type(module), words))
            for found in (values["_parameters"], values["_buffers"]):
                for key, t in found.items():
                    if t is not None:
                        parts.append(key)
                        tensors.append(t)
    return (
        parts,
        [
            (t.shape, t.stride() if t.layout == torch.strided and not t.is_nested else 0, t.dtype, t.device)
            for t in tensors
        ],
    ), tensors


def addresses(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Which tensors they are, and where: what a recorded graph reads, and keeps reading."""
    return [(id(t), t.data_ptr() if t.layout == torch.strided else 0) for t in tensors]  # a sparse one has several


def digest(tensors: Iterable[Tensor]) -> int:
    """64 bits of the bits of all tensors, summed where they lie: one number is fetched from each device.

    `sum_k sum_c w_kc mix(sum_r bits_k[1021 r + c]) mod 2^64`, over groups k of tensors of one device and width, w
    random; mix(s) = s + s / 2^29 brings the signs of many elements down to where w has its bits.
    """
    groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    total = 0
    with torch.no_grad():
        for t in tensors:
            # no bits to be had: which one it is, and PyTorch's counter
            if t.is_quantized or t.layout != torch.strided or t.is_nested:
                total += hash((id(t), t._version))
            elif not t.is_meta and (n := t.numel()):
                groups.setdefault((t.get_device(), t.dtype), []).append(
                    t.view(-1) if t.is_contiguous() else _flat(t, n)
                )
        for number, (_, found) in enumerate(sorted(groups.items(), key=lambda item: str(item[0]))):
            device = found[0].device
            sums = torch.stack([_columns(_bits(v)) for v in _packed(found, TOGETHER[device.type != "cpu"])])
            total += int(((sums + (sums >> 29)) * _weights(number, len(sums), device)).sum())
    return total % 2**64


def fingerprint(thing: object) -> str:
    """A hash of an object's numbers, words, arrays and tensors, and of those inside them; functions and what has no
    values are left out."""
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
    # odd: no bit is multiplied away
    return torch.randint(-(2**62), 2**62, (count, COLUMNS), generator=random).mul_(2).add_(1).to(device)


def _plain(value: Any, tensors: list[Tensor], modules: list[nn.Module], depth: int = 3) -> Any:
    """A value without its tensors and modules, which are added to the lists; of an object its own values, of a function
    which one it is."""
    if isinstance(value, _PLAIN) or depth == 0:
        return value if isinstance(value, _PLAIN) else None
    if isinstance(value, Tensor):
        tensors.append(value)
        return None
    if isinstance(value, nn.Module):  # in a list, say, where PyTorch does not look
        modules.append(value)
        return None
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        if len(value) > MANY:
            return None
        if isinstance(value, (set, frozenset)):
            return {v for v in value if isinstance(v, _PLAIN)}
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [(str(k), _plain(v, tensors, modules, depth - 1)) for k, v in items]
    inside = getattr(value, "__dict__", None)  # a configuration, say
    return (
        id(value)
        if callable(value) or not inside or len(inside) > MANY
        else _plain(inside, tensors, modules, depth - 1)
    )


def _feed(made: Any, thing: object, depth: int) -> None:
    made.update(f"{type(thing).__qualname__}(".encode())
    if isinstance(thing, Tensor):
        made.update(f"{tuple(thing.shape)}{thing.dtype}".encode())
        made.update(
            thing.detach()
            .resolve_neg()
            .resolve_conj()
            .cpu()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    elif isinstance(thing, np.ndarray):
        made.update(f"{thing.shape}{thing.dtype}".encode() + thing.tobytes())
    elif isinstance(thing, Mapping) and depth:
        for key, value in thing.items():
            made.update(f"{key!r}=".encode())
            _feed(made, value, depth - 1)
    elif isinstance(thing, (list, tuple, deque)) and depth:
        for value in thing:
            _feed(made, value, depth - 1)
    elif isinstance(thing, (set, frozenset)):
        made.update(repr(sorted(map(repr, thing))).encode())
    elif hasattr(thing, "__dict__") and not isinstance(thing, (FunctionType, type, *_PLAIN)) and depth:
        _feed(made, vars(thing), depth - 1)
    elif " at 0x" not in (text := repr(thing)):  # which says where it is, not what
        made.update(text.encode())
    made.update(b")")
