"""solver_step: kernel and reference against the formula in float64, and against ddim_step over a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, ddim_step, philox_normal, solver_step
from sbldm_fast.kernels._arguments import CHANNELS_LAST
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = pytest.mark.parametrize("name", ["torch", "triton"])


def new_counter(device: torch.device | None = None) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


class Textbook:
    """The formula with Python lists for history, in the dtype of what it is fed."""

    def __init__(self, table: Tensor, clip: float | None) -> None:
        self.table, self.clip, self.step = table, clip, 0
        self.past: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, m: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        c_x, c_m, d, s, a, b, *rest = self.table[self.step].to(x.dtype)
        x0 = c_x * x + c_m * m
        x0 = x0 if self.clip is None else x0.clamp(-self.clip, self.clip)
        y = a * x + b * m + d * x0
        for (xk, mk), ak, bk in zip(self.past, rest[::2], rest[1::2], strict=False):
            y = y + ak * xk + bk * mk
        self.past.insert(0, (x, m))
        self.step += 1
        return (y if z is None else y + s * z), x0


def random_table(steps: int, K: int) -> Tensor:
    table = torch.randn(steps, 6 + 2 * K) / 2
    for i in range(min(steps, K)):
        table[i, 6 + 2 * i :] = 0  # no more than i steps lie behind step i
    return table


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 16, 16), (2, 1, 50, 45)])
def test_parity(
    shape: tuple[int, ...], K: int, clip: float | None, dtype: torch.dtype, device: torch.device, three_way: Any
) -> None:
    table = random_table(5, K)
    x = torch.randn(shape).to(device, dtype)
    outputs = torch.randn(5, *shape).to(device, dtype)
    history = torch.empty(K, 2, *shape, dtype=dtype, device=device) if K else None  # poisoned: unread until written
    exact, same = Textbook(table.to(device).double(), clip), Textbook(table.to(device), clip)
    counter = new_counter(device)
    with backend("triton"):
        for m in outputs:
            y = solver_step(x, m, table.to(device), counter, history=history, clip_range=clip)
            three_way(y, same(x, m)[0], exact(x.double(), m.double())[0])
            x = y
    assert counter.tolist() == [5, 0]


@pytest.mark.usefixtures("on_device")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3),
    st.integers(1, 3000),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.integers(0, 2**31),
)
def test_both_backends_agree_on_everything(
    N: int,
    numel: int,
    K: int,
    guided: bool,
    noisy: bool,
    watched: bool,
    some_frozen: bool,
    clip: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    table, x, steps = random_table(3, K), torch.randn(N, numel), torch.randn(3, (1 + guided) * N, numel)
    runs = []
    for name in ("torch", "triton"):
        buffers: dict[str, Any] = {"history": torch.zeros(K, 2, N, numel) if K else None}
        if watched:
            buffers |= {"x0": torch.full((N, numel), torch.nan), "statistics": torch.zeros(N, 2)}
        if noisy:
            buffers["seeds"] = torch.tensor([[seed, 3 + i] for i in range(N)])
        if some_frozen:
            buffers["frozen"] = torch.arange(N) % 2 == 0
            buffers.get("x0", torch.zeros(())).zero_()  # a frozen sample keeps what it has
        y, counter, trail = x, new_counter(), []
        with backend(name):
            for m in steps:
                y = solver_step(
                    y,
                    m,
                    table,
                    counter,
                    guidance_scale=torch.arange(N) + 0.5 if guided else None,
                    clip_range=clip,
                    **buffers,
                )
                trail += [y, *(b.clone() for b in buffers.values() if b is not None)]
        runs.append([*trail, counter[0]])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def ddim_rows(alphas_cumprod: Tensor) -> Tensor:
    """Rows of deterministic DDIM for epsilon, by hand: x' = sqrt(a') x0 + sqrt(1 - a') m."""
    a, b = alphas_cumprod[:-1], alphas_cumprod[1:]
    zero = torch.zeros_like(a)
    return torch.stack([1 / a.sqrt(), -((1 - a) / a).sqrt(), b.sqrt(), zero, zero, (1 - b).sqrt()], 1)


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_run_of_ddim(name: str) -> None:
    bars = torch.linspace(0.01, 0.999, 51, dtype=torch.float64)
    table, counter = ddim_rows(bars).float(), new_counter()
    x = y = torch.randn(2, 4, 4, 4)
    with backend(name):
        for i in range(50):
            x = ddim_step(x, torch.sin(x), bars[i], bars[i + 1])
            y = solver_step(y, torch.sin(y), table, counter)
    assert counter[0] == 50
    assert float((x - y).abs().max() / x.abs().max()) < 1e-5


@BOTH
@pytest.mark.usefixtures("on_device")
def test_known_answer(name: str) -> None:
    # a = 0.36, a' = 0.64, as in ddim_step: x0 = (1 - 0.8 m) / 0.6; m = 0 + 2 (0.25 - 0) = 0.5 by guidance; x' = 0.8 x0
    # + 0.6 m = 1.1
    table = torch.tensor([[1 / 0.6, -0.8 / 0.6, 0.8, 0.0, 0.0, 0.6]])
    x, x0, statistics = torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 2)
    m = torch.stack([torch.zeros(4), torch.full((4,), 0.25)])
    with backend(name):
        y = solver_step(x, m, table, new_counter(), guidance_scale=2.0, x0=x0, statistics=statistics)
    torch.testing.assert_close(y, torch.full((1, 4), 1.1))
    torch.testing.assert_close(x0, torch.ones(1, 4))
    torch.testing.assert_close(statistics, torch.tensor([[4 * 0.25, 4 * 1.0]]))


@BOTH
@pytest.mark.usefixtures("on_device")
def test_noise_is_that_of_philox_normal(name: str) -> None:
    table = torch.zeros(2, 6)
    table[:, 3] = torch.tensor([1.0, 2.0])
    seeds, counter, x = torch.tensor([[7, 4], [2**63 - 1, 0]]), new_counter(), torch.zeros(2, 2, 3, 5)
    with backend(name):
        drawn = [solver_step(x, x, table, counter, seeds=seeds) for _ in range(2)]
        for i in (0, 1):
            expected = [
                philox_normal((1, 2, 3, 5), int(s), first_index=int(n), stream=i + 1) * (i + 1) for s, n in seeds
            ]
            assert torch.equal(drawn[i], torch.cat(expected))


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_frozen_sample_stays(name: str) -> None:
    table = torch.tensor([[1.0, 0.0, 0.5, 0.0, 0.0, 0.0]])
    x, m, x0, statistics = torch.randn(2, 9), torch.randn(2, 9), torch.full((2, 9), 5.0), torch.ones(2, 2)
    with backend(name):
        y = solver_step(x, m, table, new_counter(), frozen=torch.tensor([True, False]), x0=x0, statistics=statistics)
    assert torch.equal(y[0], x[0])
    torch.testing.assert_close(y[1], x[1] / 2)
    assert (x0[0] == 5).all()
    assert torch.equal(x0[1], x[1])
    assert (statistics[0] == 0).all()


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_step_beyond_the_table_is_nan(name: str) -> None:
    counter, x = new_counter(), torch.randn(1, 5)
    with backend(name):
        assert solver_step(x, x, torch.ones(1, 6), counter).isfinite().all()
        assert solver_step(x, x, torch.ones(1, 6), counter).isnan().all()


@BOTH
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("spatial", [(4, 5), (2, 4, 5)], ids=["image", "volume"])
def test_a_channels_last_output_is_read_in_place(name: str, spatial: tuple[int, ...], guided: bool) -> None:
    table, x = torch.randn(1, 6), torch.randn(2, 3, *spatial)
    m = torch.randn(2 * (1 + guided), 3, *spatial)
    last = m.contiguous(memory_format=CHANNELS_LAST[m.dim()])
    with backend(name):
        ys = [solver_step(x, v, table, new_counter(), guidance_scale=2.0 if guided else None) for v in (m, last)]
    assert torch.equal(*ys)


def test_half_precision_output_with_a_float32_sample(device: torch.device) -> None:
    table, x, m = (
        torch.randn(1, 6, device=device),
        torch.randn(2, 7, device=device),
        torch.randn(2, 7, device=device).half(),
    )
    with backend("triton"):
        got = [solver_step(x, v, table, new_counter(device)) for v in (m, m.float())]
    assert torch.equal(*got)
    assert got[0].dtype == torch.float32


@BOTH
@pytest.mark.usefixtures("on_device")
def test_batch_of_none(name: str) -> None:
    x, counter = torch.empty(0, 4), new_counter()
    with backend(name):
        assert solver_step(x, x, torch.ones(2, 6), counter).shape == x.shape
    assert counter[0] == 1


def test_opcheck(device: torch.device) -> None:
    x, m = torch.randn(2, 3, 4, device=device), torch.randn(4, 3, 4, device=device)
    op = torch.ops.sbldm_fast.solver_step.default
    arguments = (
        torch.randn(5, 10, device=device),
        new_counter(device),
        torch.ones(1, device=device),
        torch.zeros(2, 2, *x.shape, device=device),
        torch.zeros(2, 2, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.bool, device=device),
        torch.zeros_like(x),
        torch.zeros(2, 2, device=device),
        1.0,
    )
    torch.library.opcheck(op, (x, m, *arguments))
    torch.library.opcheck(op, (x, x.clone(), torch.randn(5, 6, device=device), new_counter(device), *[None] * 7))


@BOTH
def test_compiles_without_a_graph_break(name: str) -> None:
    table, x, m = random_table(3, 1), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    got = []
    with backend(name):
        for step in (solver_step, torch.compile(solver_step, fullgraph=True, backend="aot_eager")):
            counter, history, y = new_counter(), torch.zeros(1, 2, 2, 3, 4), x
            for _ in range(3):
                y = step(y, m, table, counter, history=history)
            got.append((y, history, counter[0]))
    torch.testing.assert_close(*got)


X, T = torch.randn(2, 3, 4, 4), torch.ones(1, 6)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": X.double()}, "x: got torch.float64"),
    "layout": ({"x": X.contiguous(memory_format=torch.channels_last)}, "x: got strides"),
    "output": ({"model_output": X[:1]}, r"model_output: got shape \(1, 3, 4, 4\), allowed is \(2, 3, 4, 4\)"),
    "guided output": ({"guidance_scale": 2.0}, r"model_output: got shape \(2, 3, 4, 4\), allowed is \(4, 3, 4, 4\)"),
    "table": (
        {"table": torch.ones(1, 8)},
        r"table: got torch.float32 \(1, 8\) on cpu, allowed is float32 \[steps, 6 \+ 2 \* 0\]",
    ),
    "table dtype": ({"table": T.double()}, "table: got torch.float64"),
    "counter": ({"counter": torch.zeros(1, dtype=torch.int32)}, r"counter: got shape \(1,\), allowed is \(2,\)"),
    "counter dtype": ({"counter": torch.zeros(2)}, "counter: got torch.float32, allowed is torch.int32"),
    "history": ({"table": torch.ones(1, 8), "history": X[None, None]}, "history: got shape"),
    "seeds": ({"seeds": torch.zeros(2, 2)}, "seeds: got torch.float32, allowed is torch.int64"),
    "frozen": ({"frozen": torch.zeros(3, dtype=torch.bool)}, r"frozen: got shape \(3,\)"),
    "half a watch": ({"x0": X.clone()}, "statistics: got None, allowed are x0 and statistics together"),
    "device": ({"model_output": X.to("meta")}, "model_output: got device meta, allowed is that of x, cpu"),
    "no history in a history": (
        {"table": torch.ones(1, 6), "history": torch.ones(0, 2, *X.shape)},
        r"history: got shape .* with K >= 1",
    ),
    "strided guidance": (
        {"model_output": torch.cat([X, X]), "guidance_scale": torch.ones(4)[::2]},
        "guidance_scale: got strides",
    ),
    "strided mask": ({"frozen": torch.ones(4, dtype=torch.bool)[::2]}, "frozen: got strides"),
    "strided counter": ({"counter": torch.zeros(4, dtype=torch.int32)[::2]}, "counter: got strides"),
    "clip that is no number": ({"clip_range": float("nan")}, "clip_range: got nan"),
    "clip": ({"clip_range": 0.0}, "clip_range: got 0.0"),
    "gradient": ({"x": X.clone().requires_grad_()}, "x: got requires_grad=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        solver_step(**({"x": X, "model_output": X, "table": T, "counter": new_counter()} | given))
