"""Digests, fingerprints, and what a function is made of: the content by which a change is seen."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sbldm_fast.sampling import loop
from sbldm_fast.sampling.content import COLUMNS, addresses, digest, fingerprint, survey

from ..small import make, scheduler
from .changes import Small, through_data


def bits(model: nn.Module) -> int:
    return digest(survey([model])[1])


class Holds(nn.Module):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)


@given(
    st.integers(1, 3 * COLUMNS),
    st.sampled_from(["float32", "float16", "bfloat16", "float64", "int64", "bool", "complex64"]),
    st.data(),
)
def test_any_bit_any_exchange_and_any_sign_changes_the_digest(n: int, dtype: str, data: Any) -> None:
    values = torch.randn(n).to(getattr(torch, dtype))
    before = bits(Holds(values))
    assert before == bits(Holds(values.clone()))
    raw = values.clone().view(torch.uint8)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7)) if dtype != "bool" else 1
    assert bits(Holds(raw.view(values.dtype))) != before
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    exchanged = values.clone()
    exchanged[[i, j]] = values[[j, i]]
    # words a multiple of 1,021 apart fall into one column, and two float32 are a word: what the sum cannot tell apart
    assert (
        (bits(Holds(exchanged)) != before) == (not torch.equal(exchanged, values))
        or (i // 2 - j // 2) % COLUMNS == 0
        or (i - j) % COLUMNS == 0
    )
    if dtype not in ("bool", "int64"):
        assert bits(Holds(-values)) != before


def test_exchanged_channels_layouts_and_names_are_told_apart() -> None:
    conv = nn.Conv2d(64, 64, 3)
    before = bits(conv), survey([conv])[0]
    with torch.no_grad():
        conv.weight.copy_(conv.weight.flip(0))
    assert bits(conv) != before[0]
    with torch.no_grad():
        conv.weight.copy_(conv.weight.flip(0))
    assert (bits(conv), survey([conv])[0]) == before
    a, b = torch.ones(3), torch.zeros(3)
    assert bits(Holds(a, b)) != bits(Holds(b, a))
    conv.train(False)
    assert survey([conv])[0] == before[1], "whether it trains is not what it computes"
    conv.padding = (1, 1)
    assert survey([conv])[0] != before[1]
    assert bits(Holds(torch.empty(0), torch.tensor(1.5))) != bits(Holds(torch.empty(0), torch.tensor(-1.5)))
    strided = torch.arange(12.0).reshape(3, 4)[:, ::2]
    assert bits(Holds(strided)) == bits(Holds(strided.clone()))


def test_tensors_without_bits_do_no_harm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls them a beta, or deprecated
        odd = [
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        ]
    held = Holds(*odd, torch.ones(3, device="meta"))
    assert bits(held) == bits(held)
    tensors = survey([held])[1]
    assert addresses(tensors) == addresses(tensors)


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.inner: Any = type("Inner", (), {})()
        self.inner.models = [model]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.inner.models[0](x, t)
        return out


def test_fingerprints_tell_values_and_not_objects() -> None:
    assert fingerprint(scheduler()) == fingerprint(scheduler())
    assert fingerprint(scheduler()) != fingerprint(scheduler(steps_offset=1))
    nested: dict[str, Any] = {"a": [1, 2.0, None], "b": {"c": torch.ones(2, dtype=torch.bfloat16)}}
    assert fingerprint(nested) == fingerprint(copy.deepcopy(nested))
    nested["b"]["c"][1] = 2
    assert fingerprint(nested) != fingerprint({"a": [1, 2.0, None], "b": {"c": torch.ones(2, dtype=torch.bfloat16)}})
    nested["b"]["self"] = nested
    assert fingerprint(nested), "a cycle ends"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[1], [2]], [[1, [2]]]),
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
        ({1, 2}, {1, 3}),
        (range(3), range(4)),
        (bytearray(b"a"), bytearray(b"b")),
        (torch.ones(2), torch.ones(1, 2)),
        (Holder(nn.Linear(1, 1)), Holder(nn.Linear(1, 1))),
    ],
    ids=["lists", "mappings", "sets", "ranges", "bytes", "shapes", "objects"],
)
def test_fingerprints_of_other_things_differ(one: Any, other: Any) -> None:
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))


def in_a_default(model: nn.Module) -> Any:
    return lambda x, t, model=model: 2 * model(x, t)


def in_a_closure_of_a_closure(model: nn.Module) -> Any:
    def twice(f: Any) -> Any:
        return lambda x, t: 2 * f(x, t)

    return twice(lambda x, t: model(x, t))


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "lambda": lambda model: lambda x, t: 2 * model(x, t),
    "mapping": lambda model: (lambda d: lambda x, t: d["m"](x, t))({"m": model}),
    "partial": lambda model: functools.partial(lambda net, x, t: net(x, t), model),
    "default": in_a_default,
    "closure": in_a_closure_of_a_closure,
    "object": Holder,
    "method": lambda model: Holder(model).__call__,
    "tensor": lambda model: (lambda w: lambda x, t: x * w.mean())(model.conv.weight),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_function_is_made_of_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(loop, "compile_ahead", lambda function, *_: (made.append(1) or function, False))
    model = Small()
    sampler = make(WAYS[way](model), mode="compile")
    for count in (1, 1, 2, 2):
        if count == 2 and len(made) == 1:
            through_data(model)
        sampler(2)
        assert len(made) == count
