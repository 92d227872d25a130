"""Tables against the loops they were read from."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import DDIMScheduler, DDPMScheduler, SolverTable
from sbldm_fast.diffusion import NotLinear
from sbldm_fast.diffusion.probe import copy_with_timesteps

from .schedulers import CASES, bent, measure, own_loop, row

diffusers = pytest.importorskip("diffusers", reason="diffusers brings the schedulers that these tests read")
schedulers = pytest.importorskip(
    "monai.networks.schedulers", reason="MONAI brings the schedulers that these tests read"
)

COMMITTED = (Path(__file__).parents[3] / "benchmarks" / "SCHEDULERS.md").read_text().splitlines()


@pytest.mark.parametrize(("library", "name", "config"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_table_is_its_schedulers_own_loop(library: str, name: str, config: dict[str, Any]) -> None:
    """In float32 through the sampler; all but the error, which depends on the machine, is what SCHEDULERS.md says."""
    measured = measure(library, name, config)
    assert measured[-1] < 1e-5, f"{name}: {measured[-1]:.1e}"
    line = row(library, name, config, measured)
    assert line.rpartition(" | ")[0] in {c.rpartition(" | ")[0] for c in COMMITTED}


@pytest.mark.parametrize(
    ("library", "name", "config"),
    [c for c in CASES if not c[2].get("thresholding")],
    ids=lambda v: v if isinstance(v, str) else None,
)
@pytest.mark.parametrize("steps", [4, 7, 50])
def test_in_float64_the_table_itself(library: str, name: str, config: dict[str, Any], steps: int) -> None:
    scheduler = getattr(importlib.import_module(library), name)(**config)
    table = SolverTable.from_scheduler(scheduler, steps)
    noise = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def draw(i: int) -> Tensor:
        return philox_normal((2, 4, 6, 6), 5, stream=i + 1).double()

    expected = own_loop(scheduler, steps, noise, draw)
    x, m = [noise * table.init_noise_sigma], []
    for i, t in enumerate(table.timesteps):
        m.append(bent(x[-1] * table.input_scale[i], t))
        x.append(table.step(i, x, m, draw(i)))
    error = float((x[-1] - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("library", [diffusers, schedulers], ids=["diffusers", "monai"])
def test_eta_is_the_noise_column(library: Any, eta: float) -> None:
    scheduler = library.DDIMScheduler(clip_sample=False)
    table = SolverTable.from_scheduler(scheduler, 10, eta=eta)
    t = table.timesteps
    a = scheduler.alphas_cumprod.double()
    before = [a[s] if s >= 0 else torch.tensor(1.0).double() for s in (t - 100).tolist()]
    a_prev = torch.stack(before)
    sigma = eta * ((1 - a_prev) / (1 - a[t]) * (1 - a[t] / a_prev)).sqrt()
    torch.testing.assert_close(table.rows[:, 3], sigma, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    # T = 4, betas 0.1 to 0.4, two steps: timesteps 2 and 0, alphas_cumprod 0.504 and 0.9, the last step leads to 1
    table = SolverTable.from_scheduler(
        DDIMScheduler(num_train_timesteps=4, beta_start=0.1, beta_end=0.4, clip_sample=False), 2
    )
    assert table.timesteps.tolist() == [2, 0]
    for line, (a, b) in zip(table.rows, ((0.504, 0.9), (0.9, 1.0)), strict=True):
        # x0 = (x - sqrt(1-a) m) / sqrt(a);  x' = sqrt(b) x0 + sqrt(1-b) m
        c_x, c_m = a**-0.5, -(((1 - a) / a) ** 0.5)
        expected = [c_x, c_m, 0.0, 0.0, b**0.5 * c_x, b**0.5 * c_m + (1 - b) ** 0.5]
        torch.testing.assert_close(line, torch.tensor(expected, dtype=torch.float64), rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(table.alpha, torch.tensor([0.504, 0.9], dtype=torch.float64).sqrt(), rtol=3e-7, atol=0)
    torch.testing.assert_close(
        table.sigma, (1 - torch.tensor([0.504, 0.9], dtype=torch.float64)).sqrt(), rtol=3e-7, atol=0
    )


def test_clipping_is_found_and_its_range() -> None:
    table = SolverTable.from_scheduler(DDIMScheduler(clip_sample_range=0.7), 10)
    assert table.clip_range == pytest.approx(0.7, rel=1e-12)
    assert (table.rows[:, 2] > 0).all()
    assert SolverTable.from_scheduler(DDPMScheduler(clip_sample_range=2.0), 10).clip_range == pytest.approx(
        2.0, rel=1e-12
    )
    assert SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 10).clip_range is None


def test_what_a_scheduler_holds_stays() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(7)
    state, random = repr(vars(scheduler)), torch.get_rng_state()
    SolverTable.from_scheduler(scheduler, 12)
    assert repr(vars(scheduler)) == state
    assert torch.equal(torch.get_rng_state(), random)


class Rounding(DDIMScheduler):
    """A step that no row describes."""

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **options: Any) -> Any:
        out = super().step(model_output, timestep, sample, **options)
        return out._replace(prev_sample=(out.prev_sample * 100).round() / 100)


def test_what_is_not_linear_is_refused_with_its_reason() -> None:
    for scheduler, steps, reason in (
        (
            diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=3.0),
            10,
            "neither as predicted nor clipped",
        ),
        (schedulers.DDIMScheduler(clip_sample_min=-1.0, clip_sample_max=0.5), 10, "neither as predicted nor clipped"),
        (
            diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=3.0),
            10,
            "is not a sum of what came before it",
        ),
        (Rounding(clip_sample=False), 5, "is not a sum of what came before it"),
        (diffusers.DEISMultistepScheduler(), 1000, "not finite"),
    ):
        with pytest.raises(NotLinear, match=reason):
            SolverTable.from_scheduler(scheduler, steps)


def test_bad_input_is_named() -> None:
    class Half:
        def step(self) -> None: ...

    for call, message in (
        (
            lambda: SolverTable.from_scheduler(Half(), 5),
            "scheduler: got Half, allowed is a scheduler with set_timesteps and step",
        ),
        (
            lambda: SolverTable.from_scheduler(DDIMScheduler(), 1001),
            "steps: got 1001, allowed is 1 to num_train_timesteps = 1000",
        ),
        (lambda: SolverTable.from_scheduler(diffusers.EulerDiscreteScheduler(), 0), "steps: got 0"),
        (
            lambda: SolverTable.from_scheduler(diffusers.PNDMScheduler(), 1),
            r"scheduler: PNDMScheduler.set_timesteps\(1\) failed: ValueError: operands",
        ),
        (
            lambda: SolverTable.from_scheduler(diffusers.PNDMScheduler(), 10, eta=0.5),
            "eta: got 0.5, allowed is 0 to 1, and 0 alone",
        ),
        (lambda: SolverTable.from_scheduler(DDIMScheduler(), 10, eta=2.0), "eta: got 2.0"),
        (
            lambda: SolverTable.from_scheduler(diffusers.UniPCMultistepScheduler(), 10).from_step(3),
            "table: got a history of 2 steps",
        ),
        (lambda: SolverTable.from_scheduler(DDIMScheduler(), 10).from_step(10), "start: got 10, allowed is 0 to 9"),
        (lambda: SolverTable.from_scheduler(DDIMScheduler(), 10, start=-1), "start: got -1, allowed is 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_rounding_is_not_a_history(steps: int, prediction: str) -> None:
    assert SolverTable.from_scheduler(diffusers.EulerDiscreteScheduler(prediction_type=prediction), steps).history == 0


def test_a_start_inside_is_diffusers_begin_index() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    table = SolverTable.from_scheduler(scheduler, 10, start=4)
    own = copy_with_timesteps(scheduler, 10, start=4)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    xs, ms = [x], []
    for i, t in enumerate(own.timesteps[4:]):
        ms.append(bent(xs[-1], t))
        xs.append(table.step(i, xs, ms))
        x = own.step(bent(x, t), t, x).prev_sample
    assert table.timesteps.tolist() == own.timesteps[4:].tolist()
    torch.testing.assert_close(xs[-1], x, rtol=1e-5, atol=1e-5)
    whole = SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 10)
    part = SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 10, start=4)
    for field in ("timesteps", "rows", "alpha", "sigma"):
        torch.testing.assert_close(getattr(whole.from_step(4), field), getattr(part, field), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("spacing", "steps", "first"),
    [("leading", 5, 830), ("leading", 10, 900), ("leading", 20, 940), ("leading", 50, 950), ("leading", 200, 800)],
)
def test_a_late_start_is_said_with_its_mend(spacing: str, steps: int, first: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this scheduler")
    with pytest.warns(
        UserWarning, match=f"UniPCMultistepScheduler: a run of {steps} steps starts at t = {first}, .*'trailing'"
    ):
        SolverTable.from_scheduler(diffusers.UniPCMultistepScheduler(timestep_spacing="leading"), steps)


def test_a_start_that_is_near_enough_is_not_spoken_of(recwarn: pytest.WarningsRecorder) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings these schedulers")
    for steps in (1, 50, 100, 1000):
        SolverTable.from_scheduler(DDIMScheduler(), steps)
        SolverTable.from_scheduler(diffusers.UniPCMultistepScheduler(timestep_spacing="trailing"), min(steps, 50))
        SolverTable.from_scheduler(diffusers.DDIMScheduler(), steps, start=steps // 2)
    assert not [w for w in recwarn if "starts at" in str(w.message)]
