"""Tables against the loops they were read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import DDIMScheduler, DDPMScheduler, FastSampler, SolverTable
from sbldm_fast.diffusion import NotLinear
from sbldm_fast.diffusion.table import prepared, scaled_input, scheduler_step

diffusers = pytest.importorskip("diffusers", reason="diffusers brings the schedulers that these tests read")
schedulers = pytest.importorskip("monai.networks.schedulers", reason="MONAI brings the schedulers that these tests read")

NO_CLIP = {"clip_sample": False}
DIFFUSERS: list[tuple[str, dict[str, Any], int]] = [  # with the history that each needs
    ("DDIMScheduler", NO_CLIP, 0),
    ("DDIMScheduler", {}, 0),
    ("DDIMScheduler", NO_CLIP | {"prediction_type": "sample"}, 0),
    ("DDIMScheduler", NO_CLIP | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 0),
    ("DDPMScheduler", NO_CLIP, 0),
    ("DDPMScheduler", {}, 0),
    ("PNDMScheduler", {}, 10),
    ("PNDMScheduler", {"skip_prk_steps": True}, 3),
    ("DEISMultistepScheduler", {}, 1),
    ("DPMSolverMultistepScheduler", {}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 2),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 1),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, 1),
    ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}, 1),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 1),
    ("DPMSolverSinglestepScheduler", {}, 1),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, 1),
    ("UniPCMultistepScheduler", {}, 2),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 3),
    ("EulerDiscreteScheduler", {}, 0),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, 0),
    ("EulerAncestralDiscreteScheduler", {}, 0),
    ("HeunDiscreteScheduler", {}, 1),
    ("LMSDiscreteScheduler", {}, 3),
    ("KDPM2DiscreteScheduler", {}, 1),
]
MONAI: list[tuple[str, dict[str, Any], int]] = [
    ("DDIMScheduler", NO_CLIP, 0),
    ("DDIMScheduler", {}, 0),
    ("DDPMScheduler", NO_CLIP, 0),
    ("PNDMScheduler", {}, 10),
    ("PNDMScheduler", {"skip_prk_steps": True}, 3),
    ("RFlowScheduler", {}, 0),
]
CASES = [(diffusers, *c) for c in DIFFUSERS] + [(schedulers, *c) for c in MONAI]
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A model that is not linear and knows the time."""
    return torch.tanh(x @ WEIGHT.to(x.dtype)) + torch.sin(t.to(x.dtype) / 100) * x.abs().sqrt() * 0.1


def own_loop(scheduler: Any, steps: int, x: Tensor, eta: float = 0.0, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The scheduler's own loop in float64 from noise of unit variance, and the noise that it drew at each step."""
    s, generator, noises = prepared(scheduler, steps, eta), torch.Generator().manual_seed(seed), []
    x = x * float(getattr(s, "init_noise_sigma", 1.0))
    for i, t in enumerate(s.timesteps):
        before = generator.get_state()
        m = bent(scaled_input(s, x, t), t)
        x = scheduler_step(s, m, i, x, eta, generator)[0].double()
        dtype = torch.float32 if type(s).__name__.startswith("DPMSolverMultistep") else torch.float64
        noises.append(torch.randn(x.shape, generator=torch.Generator().set_state(before), dtype=dtype).double())
    return x, noises


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(("library", "name", "config", "history"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_table_is_its_schedulers_own_loop(library: Any, name: str, config: dict[str, Any], history: int, steps: int) -> None:
    scheduler = getattr(library, name)(**config)
    table = SolverTable.from_scheduler(scheduler, steps)
    noise = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected, z = own_loop(scheduler, steps, noise)
    x, m = [noise * table.init_noise_sigma], []
    for i, t in enumerate(table.timesteps):
        m.append(bent(x[-1] * table.input_scale[i], t))
        x.append(table.step(i, x, m, z[i]))
    error = float((x[-1] - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"{name}: {error:.1e}"
    if steps == 20:
        assert table.history == history
    assert table.stochastic == (name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler") or "algorithm_type" in config)


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
    table = SolverTable.from_scheduler(DDIMScheduler(num_train_timesteps=4, beta_start=0.1, beta_end=0.4, clip_sample=False), 2)
    assert table.timesteps.tolist() == [2, 0]
    for row, (a, b) in zip(table.rows, ((0.504, 0.9), (0.9, 1.0)), strict=True):
        # x0 = (x - sqrt(1-a) m) / sqrt(a);  x' = sqrt(b) x0 + sqrt(1-b) m
        c_x, c_m = a**-0.5, -(((1 - a) / a) ** 0.5)
        expected = [c_x, c_m, 0.0, 0.0, b**0.5 * c_x, b**0.5 * c_m + (1 - b) ** 0.5]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(table.alpha, torch.tensor([0.504, 0.9], dtype=torch.float64).sqrt(), rtol=3e-7, atol=0)
    torch.testing.assert_close(table.sigma, (1 - torch.tensor([0.504, 0.9], dtype=torch.float64)).sqrt(), rtol=3e-7, atol=0)


def test_clipping_is_found_and_its_range() -> None:
    table = SolverTable.from_scheduler(DDIMScheduler(clip_sample_range=0.7), 10)
    assert table.clip_range == pytest.approx(0.7, rel=1e-12)
    assert (table.rows[:, 2] > 0).all()
    assert SolverTable.from_scheduler(DDPMScheduler(clip_sample_range=2.0), 10).clip_range == pytest.approx(2.0, rel=1e-12)
    assert SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 10).clip_range is None


def test_what_a_scheduler_holds_stays() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(7)
    state, random = repr(vars(scheduler)), torch.get_rng_state()
    SolverTable.from_scheduler(scheduler, 12)
    assert repr(vars(scheduler)) == state
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_file_keeps_every_bit(name: str, tmp_path: Path) -> None:
    table = SolverTable.from_scheduler(getattr(diffusers, name)(), 10)
    table.save(tmp_path / "t.json")
    again = SolverTable.load(tmp_path / "t.json")
    for field in table.__dataclass_fields__:
        a, b = getattr(table, field), getattr(again, field)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b, field


def test_unknown_x0_is_null_in_the_file(tmp_path: Path) -> None:
    table = SolverTable.from_scheduler(diffusers.IPNDMScheduler(), 5)
    assert table.rows[:, :2].isnan().all()
    table.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0][:2] == [None, None]
    assert SolverTable.load(tmp_path / "t.json").rows[:, :2].isnan().all()


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 3).to_dict()
    for change, message in (
        ({"rows": [[1.0]]}, "rows: got"),
        ({"rows": "x"}, "not a solver table"),
        ({"sigma": [1.0]}, "rows: got"),
        ({"input_scale": [None] * 3}, "not finite"),
        ({"timesteps": None}, "not a solver table"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            SolverTable.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps({k: v for k, v in good.items() if k != "alpha"}))
    with pytest.raises(ValueError, match="not a solver table"):
        SolverTable.load(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"nothing\.json"):
        SolverTable.load(tmp_path / "nothing.json")


class Rounding(DDIMScheduler):
    """A step that no row describes."""

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **options: Any) -> Any:
        out = super().step(model_output, timestep, sample, **options)
        return out._replace(prev_sample=(out.prev_sample * 100).round() / 100)


def test_what_is_not_linear_is_refused_with_its_reason() -> None:
    for scheduler, steps, reason in (
        (diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=3.0), 10, "neither as predicted nor clipped"),
        (schedulers.DDIMScheduler(clip_sample_min=-1.0, clip_sample_max=0.5), 10, "neither as predicted nor clipped"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=3.0), 10, "is not a sum of what came before it"),
        (Rounding(clip_sample=False), 5, "is not a sum of what came before it"),
        (diffusers.DEISMultistepScheduler(), 1000, "not finite"),
    ):
        with pytest.raises(NotLinear, match=reason):
            SolverTable.from_scheduler(scheduler, steps)


def test_bad_input_is_named() -> None:
    class Half:
        def step(self) -> None: ...

    for call, message in (
        (lambda: SolverTable.from_scheduler(Half(), 5), "scheduler: got Half, allowed is a scheduler with set_timesteps and step"),
        (lambda: SolverTable.from_scheduler(DDIMScheduler(), 1001), "steps: got 1001, allowed is 1 to num_train_timesteps = 1000"),
        (lambda: SolverTable.from_scheduler(diffusers.EulerDiscreteScheduler(), 0), "steps: got 0"),
        (lambda: SolverTable.from_scheduler(diffusers.PNDMScheduler(), 10, eta=0.5), "eta: got 0.5, allowed is 0 to 1, and 0 alone"),
        (lambda: SolverTable.from_scheduler(DDIMScheduler(), 10, eta=2.0), "eta: got 2.0"),
        (lambda: SolverTable.from_scheduler(diffusers.UniPCMultistepScheduler(), 10).from_step(3), "table: got a history of 2 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_start_inside_is_diffusers_begin_index() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    table = SolverTable.from_scheduler(scheduler, 10, start=4)
    own = prepared(scheduler, 10, start=4)
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


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_in_float32_through_the_sampler(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    got = FastSampler(bent, scheduler, shape=(4, 6, 6), steps=20, mode="eager")(2, seed=3)
    expected, _ = own_loop(scheduler, 20, philox_normal((2, 4, 6, 6), 3).double())
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4
