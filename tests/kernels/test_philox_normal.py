"""philox_normal: the integer stream against Random123's vectors, the normals on every backend and split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, philox_normal
from sbldm_fast.kernels._backend import tl, triton
from sbldm_fast.kernels.philox_normal import philox_reference

# Random123, examples/kat_vectors, "philox4x32 10": counter, key, result
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_integer_stream_is_random123s(counter: list[int], key: list[int], words: list[int]) -> None:
    got = philox_reference([torch.tensor([c]) for c in counter], (key[0], key[1]))
    assert [int(w) for w in got] == words


@triton.jit
def _words_kernel(out, counter, seed):
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    words = tl.philox(tl.load(seed), c0, c1, c2, c3)
    for i in tl.static_range(4):
        tl.store(out + i, words[i].to(tl.uint32, bitcast=True))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_integer_stream_of_triton_is_random123s(
    counter: list[int], key: list[int], words: list[int], device: torch.device
) -> None:
    seed = np.array(key, dtype=np.uint32).view(np.int64)  # the kernel's seed is both words of the key
    out = torch.zeros(4, dtype=torch.uint32, device=device)
    counters = torch.tensor(counter, dtype=torch.uint32, device=device)
    _words_kernel[(1,)](out, counters, torch.from_numpy(seed).to(device))
    assert out.tolist() == words


def test_first_normals_by_hand(device: torch.device) -> None:
    u = [((w >> 9) + 0.5) / 2**23 for w in KNOWN[0][2]]
    expected = [
        math.sqrt(-2 * math.log(u[i])) * f(2 * math.pi * (u[i + 1] - 0.5)) for i in (0, 2) for f in (math.cos, math.sin)
    ]
    for name in ("torch", "triton"):
        with backend(name):
            got = philox_normal((1, 4), 0, device=device)
        torch.testing.assert_close(got.cpu(), torch.tensor([expected]), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (3, 5, 7), (1, 1), (4, 1023), (0, 8, 4, 4)])
@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_backends_agree_to_a_millionth(shape: tuple[int, ...], seed: int, device: torch.device) -> None:
    out = {}
    for name in ("torch", "triton"):
        with backend(name):
            out[name] = philox_normal(shape, seed, first_index=3, stream=2, device=device)
    assert out["triton"].shape == shape
    torch.testing.assert_close(out["triton"], out["torch"], rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 9), st.data())
def test_a_split_batch_draws_the_same_bits(seed: int, n: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, n))
    whole = philox_normal((n, 3, 5), seed)
    parts = [philox_normal((cut, 3, 5), seed), philox_normal((n - cut, 3, 5), seed, first_index=cut)]
    assert torch.equal(whole, torch.cat(parts))


def test_distribution() -> None:
    z = philox_normal((16, 8, 32, 32), 1).double()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # neighbours, samples and streams are uncorrelated
    others = [
        z.roll(1, -1),
        z.roll(1, 0),
        philox_normal((16, 8, 32, 32), 1, stream=1).double(),
        philox_normal((16, 8, 32, 32), 2).double(),
    ]
    for other in others:
        assert abs(float((z * other).mean())) < 5 / math.sqrt(n)


def test_dtype_is_a_rounding_of_float32() -> None:
    z = philox_normal((2, 9), 5)
    assert torch.equal(philox_normal((2, 9), 5, dtype=torch.float16), z.half())


def test_opcheck(device: torch.device) -> None:
    seed = torch.tensor([7], device=device)
    torch.library.opcheck(torch.ops.sbldm_fast.philox_normal.default, (seed, [2, 3, 4], 0, 0, torch.float32))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_without_a_graph_break(name: str) -> None:
    with backend(name):
        got = torch.compile(philox_normal, fullgraph=True, backend="aot_eager")((2, 3, 4), 5)
        assert torch.equal(got, philox_normal((2, 3, 4), 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, r"shape: got \(\)"),
        ({"shape": (-1, 2)}, "shape: got"),
        ({"shape": (1, 2**31)}, "shape: got .* fewer than"),
        ({"seed": -1}, "seed: got -1, allowed is an integer from 0"),
        ({"seed": 2**63}, "seed: got"),
        ({"seed": 0.5}, "seed: got 0.5"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, allowed are float32"),
        ({"first_index": 1.5}, "first_index: got 1.5"),
        ({"first_index": -1}, "first_index: got -1"),
        ({"stream": 2**31}, "stream: got"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox_normal(**({"shape": (1, 4), "seed": 0} | arguments))
