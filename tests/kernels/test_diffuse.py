"""diffuse: the kernel against the reference and the formula, CutMix by its statistics and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sbldm_fast.kernels import backend, diffuse, philox_normal
from torch import Tensor

BOTH = pytest.mark.parametrize("name", ["torch", "triton"])
KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def bars() -> Tensor:
    return torch.linspace(0.999, 0.01, 100)  # on the default device


@BOTH
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial", [(5, 4), (3, 5, 4)], ids=["image", "volume"])
def test_formula(name: str, spatial: tuple[int, ...], kind: str) -> None:
    z0, t = torch.randn(3, 2, *spatial), torch.tensor([0, 50, 99])
    with backend(name):
        z_t, target = diffuse(z0, t, bars(), 5, first_index=2, stream=9, prediction_type=kind)
        e = philox_normal(z0.shape, 5, first_index=2, stream=9).double()
    a = bars()[t].double().reshape(-1, *[1] * (z0.dim() - 1))
    flow = kind == "flow_prediction"
    noised = a * z0 + (1 - a) * e if flow else a.sqrt() * z0 + (1 - a).sqrt() * e
    torch.testing.assert_close(z_t.double(), noised, rtol=0, atol=1e-6)
    expected = {"epsilon": e, "sample": z0.double(), "v_prediction": a.sqrt() * e - (1 - a).sqrt() * z0}
    torch.testing.assert_close(target.double(), e - z0 if flow else expected[kind], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("on_device")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 17),
    st.integers(1, 17),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_both_backends_agree(
    N: int, C: int, H: int, W: int, kind: str, p: float, seed: int, stream: int, dtype: torch.dtype
) -> None:
    z0, t = torch.randn(N, C, H, W).to(dtype), torch.randint(100, (N,))
    out = []
    for name in ("torch", "triton"):
        with backend(name):
            out.append(diffuse(z0, t, bars(), seed, stream=stream, prediction_type=kind, cutmix_prob=p))
    for a, b in zip(*out, strict=True):
        atol = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]  # one rounding of values up to 5
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def boxes(name: str, p: float, N: int, side: int = 8) -> Tensor:
    """Where sample n shows its neighbour: with a = 1 and z0 = n, z_t is z0."""
    z0 = torch.arange(float(N))[:, None, None, None].expand(N, 2, side, side).contiguous()
    with backend(name):
        z_t, target = diffuse(
            z0, torch.zeros(N, dtype=torch.int64), torch.ones(1), 3, prediction_type="sample", cutmix_prob=p
        )
    assert torch.equal(z_t, target)
    assert torch.equal(z_t[:, 0], z_t[:, 1])
    moved = z_t[:, 0] != z0[:, 0]
    assert torch.equal(z_t[:, 0][moved], z0.roll(-1, 0)[:, 0][moved])
    return moved


@BOTH
@pytest.mark.usefixtures("on_device")
def test_cutmix_replaces_one_rectangle_by_the_neighbour_in_a_quarter_of_the_samples(name: str) -> None:
    N = 400 if name == "torch" else 100  # each sample is drawn by its number: the kernel's are the first of the 400
    moved = boxes(name, 0.25, N)
    for box in moved:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            at = line.nonzero().flatten()
            assert len(at) == 0 or int(at[-1] - at[0]) + 1 == len(at)
    # a box may have no area: 1 of 64 by rounding down
    assert abs(int(moved.any((1, 2)).sum()) - 0.25 * N) < 4 * (0.25 * 0.75 * N) ** 0.5
    assert torch.equal(moved, boxes("torch", 0.25, N))
    assert not boxes(name, 0.0, N).any()
    assert boxes(name, 1.0, N).any((1, 2)).float().mean() > 0.9


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_box_goes_through_all_slices_of_a_volume(name: str) -> None:
    images = torch.arange(20.0)[:, None, None, None].expand(20, 2, 8, 8).contiguous()
    volumes = images[:, :, None].expand(20, 2, 3, 8, 8).contiguous()
    t = torch.zeros(20, dtype=torch.int64)
    with backend(name):
        flat, deep = (
            diffuse(z0, t, torch.ones(1), 3, prediction_type="sample", cutmix_prob=0.5)[0] for z0 in (images, volumes)
        )
    assert torch.equal(deep, flat[:, :, None].expand_as(deep))
    assert not torch.equal(flat, images)


@BOTH
@pytest.mark.usefixtures("on_device")
def test_noise_moves_with_the_box(name: str) -> None:
    z0, t = torch.zeros(50, 1, 6, 6), torch.zeros(50, dtype=torch.int64)
    with backend(name):
        z_t, e = diffuse(z0, t, torch.zeros(1), 1, cutmix_prob=1.0)
        plain = philox_normal(z0.shape, 1)
    assert torch.equal(z_t, e)  # a = 0: all noise
    own, others = e == plain, e == plain.roll(-1, 0)
    assert (own | others).all()
    assert not own.all()


@BOTH
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_flow_is_a_straight_line(name: str, p: float) -> None:
    """Along its target every z_t leads back to z0 and on to the noise, cut and mixed or not."""
    z0, t, share = torch.randn(6, 2, 5, 4), torch.arange(6), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.125, 0.0])
    with backend(name):
        z_t, target = diffuse(z0, t, share, 3, prediction_type="flow_prediction", cutmix_prob=p)
        begin, _ = diffuse(z0, t, torch.ones(6), 3, prediction_type="flow_prediction", cutmix_prob=p)
        end, e = diffuse(z0, t, torch.zeros(6), 3, cutmix_prob=p)
    s = 1 - share[:, None, None, None]
    torch.testing.assert_close(z_t - s * target, begin, rtol=0, atol=2e-6)
    torch.testing.assert_close(z_t + (1 - s) * target, e, rtol=0, atol=2e-6)
    assert torch.equal(end, e)


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_shard_draws_its_part(name: str) -> None:
    z0, t = torch.randn(6, 2, 3, 3), torch.arange(6)
    with backend(name):
        whole = diffuse(z0, t, bars(), 4)
        parts = [diffuse(z0[i : i + 3], t[i : i + 3], bars(), 4, first_index=i) for i in (0, 3)]
    for w, *p in zip(whole, *parts, strict=True):
        assert torch.equal(w, torch.cat(p))


@BOTH
@pytest.mark.usefixtures("on_device")
def test_a_timestep_off_the_table_is_nan(name: str) -> None:
    with backend(name):
        z_t, _ = diffuse(torch.randn(3, 1, 2, 2), torch.tensor([-1, 5, 100]), bars(), 0)
    assert z_t.isnan().flatten(1).all(1).tolist() == [True, False, True]


@BOTH
@pytest.mark.usefixtures("on_device")
def test_seed_and_stream_may_live_on_the_device(name: str) -> None:
    z0, t = torch.randn(2, 1, 3, 3), torch.tensor([3, 4])
    with backend(name):
        assert torch.equal(
            diffuse(z0, t, bars(), torch.tensor(7), stream=torch.tensor([2]))[0], diffuse(z0, t, bars(), 7, stream=2)[0]
        )


@BOTH
@pytest.mark.usefixtures("on_device")
def test_batch_of_none(name: str) -> None:
    with backend(name):
        z_t, target = diffuse(torch.empty(0, 2, 3, 3), torch.empty(0, dtype=torch.int64), bars(), 0)
    assert z_t.shape == target.shape == (0, 2, 3, 3)


@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(device: torch.device) -> None:
    z0 = torch.randn(2, 3, 17, 23, device=device)
    with backend("triton"):
        z_t, target = diffuse(z0, torch.tensor([1, 2], device=device), bars().to(device), 0, cutmix_prob=1.0)
    assert z_t.isfinite().all()
    assert target.isfinite().all()


def test_opcheck(device: torch.device) -> None:
    z0, t, key = (
        torch.randn(2, 2, 3, 3, device=device),
        torch.tensor([1, 2], device=device),
        torch.tensor([5, 0], device=device),
    )
    for kind in KINDS:
        torch.library.opcheck(torch.ops.sbldm_fast.diffuse.default, (z0, t, bars().to(device), key, 0, kind, 2**21))


@BOTH
def test_compiles_without_a_graph_break(name: str) -> None:
    z0, t = torch.randn(2, 2, 3, 3), torch.tensor([1, 2])
    with backend(name):
        expected = diffuse(z0, t, bars(), 5, cutmix_prob=0.5)
        got = torch.compile(diffuse, fullgraph=True, backend="aot_eager")(z0, t, bars(), 5, cutmix_prob=0.5)
    torch.testing.assert_close(got, expected)


Z, TS, BARS = torch.randn(2, 2, 3, 3), torch.tensor([1, 2]), bars()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dims": ({"z0": Z[0]}, r"z0: got torch.float32 \(2, 3, 3\), allowed is \[N, C, H, W\]"),
    "layout": ({"z0": Z.contiguous(memory_format=torch.channels_last)}, "z0: got strides"),
    "gradient": ({"z0": Z.clone().requires_grad_()}, "z0: got requires_grad=True"),
    "timesteps": ({"timesteps": TS[:1]}, r"timesteps: got shape \(1,\), allowed is \(2,\)"),
    "timesteps dtype": ({"timesteps": TS.int()}, "timesteps: got torch.int32, allowed is torch.int64"),
    "table": ({"alphas_cumprod": BARS[None]}, r"alphas_cumprod: got shape \(1, 100\)"),
    "table dtype": ({"alphas_cumprod": BARS.double()}, "alphas_cumprod: got torch.float64"),
    "seed": ({"seed": -1}, "seed: got -1, allowed is an integer from 0"),
    "seed type": ({"seed": 1.5}, "seed: got 1.5"),
    "stream": ({"stream": 2**31}, "stream: got 2147483648"),
    "seed tensor": ({"seed": torch.tensor(1.5)}, "seed: got torch.float32, allowed is torch.int64"),
    "first": ({"first_index": -1}, "first_index: got -1, allowed is an integer from 0"),
    "device": ({"timesteps": TS.to("meta")}, "timesteps: got device meta"),
    "kind": ({"prediction_type": "score"}, "prediction_type: got 'score', allowed are .*, flow_prediction"),
    "cutmix": ({"cutmix_prob": 1.5}, "cutmix_prob: got 1.5, allowed is 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        diffuse(**({"z0": Z, "timesteps": TS, "alphas_cumprod": BARS, "seed": 0} | given))
