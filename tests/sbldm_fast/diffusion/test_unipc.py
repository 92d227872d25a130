"""UniPC beside diffusers': the same timesteps, the same numbers, first order after a start in the middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sbldm_fast import DDIMScheduler, NoiseSchedule, SolverTable, UniPCMultistepScheduler, preset
from sbldm_fast.diffusion.schedulers import FILE
from sbldm_fast.files import read_json


def run(scheduler: Any, n: int, start: int = 0) -> Tensor:
    """All x of a run on random model outputs."""
    random = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "sigmas"):  # diffusers rounds them to float32, and subtracts their logarithms
        a = scheduler.alphas_cumprod.double()[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1)])
    if start:
        scheduler.set_begin_index(start)
    x = [torch.randn(1, 2, 4, 4, generator=random, dtype=torch.float64)]
    for t in scheduler.timesteps[start:]:
        m = torch.randn(x[0].shape, generator=random, dtype=torch.float64)
        x.append(scheduler.step(m, t, x[-1])[0])
    return torch.stack(x)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_equals_diffusers(schedule: str, spacing: str, order: int, kind: str) -> None:
    """The second schedule ends at an SNR of 2e-9."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test compares with")
    config = {"prediction_type": kind, "solver_order": order, "timestep_spacing": spacing, "beta_schedule": schedule}
    ours, theirs = UniPCMultistepScheduler(**config), diffusers.UniPCMultistepScheduler(**config)
    for n in (1, 2, 3, 10, 50):
        for start in range(min(n, 2)):
            a, b = run(ours, n, start), run(theirs, n, start)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            assert float((a - b).abs().max() / b.abs().max()) < 2e-6, (n, start)


def test_defaults_are_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that this test compares with")
    ours, theirs = UniPCMultistepScheduler(), diffusers.UniPCMultistepScheduler()
    torch.testing.assert_close(run(ours, 7), run(theirs, 7), rtol=1e-5, atol=1e-5)
    again = UniPCMultistepScheduler.from_config(diffusers.UniPCMultistepScheduler(solver_order=3).config)
    assert again.config.solver_order == 3


def test_a_model_of_one_answer_is_solved_in_any_number_of_steps() -> None:
    """Where the model always says the same x0, every step is exact: x stays alpha x0 + sigma e."""
    x0, e = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for order in (1, 2, 3):
        s = UniPCMultistepScheduler.from_config(
            preset("paper").scheduler, prediction_type="sample", solver_order=order, timestep_spacing="trailing"
        )
        s.set_timesteps(9)
        a = NoiseSchedule("cosine_ramp").alphas_cumprod64[s.timesteps]
        x = a[0].sqrt() * x0 + (1 - a[0]).sqrt() * e
        for i, t in enumerate(s.timesteps):
            x = s.step(x0, t, x).prev_sample
            wanted = x0 if i == 8 else a[i + 1].sqrt() * x0 + (1 - a[i + 1]).sqrt() * e
            torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)


def test_a_run_begins_anew(tmp_path: Any) -> None:
    s = UniPCMultistepScheduler.from_config(preset("demo").scheduler, timestep_spacing="trailing", solver_order=3)
    first = run(s, 5)
    assert torch.equal(run(s, 5), first), "what was remembered of a run is forgotten"
    assert torch.equal(run(s, 5, 2), run(s, 5, 2))
    assert SolverTable.from_scheduler(s, 12).history == 3
    assert SolverTable.from_scheduler(s, 5, start=4).history == 0, "the last step leads to x0 alone"
    s.save_pretrained(tmp_path)
    assert read_json(tmp_path / FILE)["_class_name"] == "UniPCMultistepScheduler"
    assert UniPCMultistepScheduler.from_pretrained(tmp_path).config == s.config


def test_a_terminal_snr_of_0_has_numbers() -> None:
    s = UniPCMultistepScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample")
    assert run(s, 4).isfinite().all()


def test_bad_input_is_named() -> None:
    for bad in ({"solver_order": 4}, {"solver_order": 0}):
        with pytest.raises(ValueError, match=r"solver_order is [04], allowed is 1 to 3"):
            UniPCMultistepScheduler(**bad)
    s = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        s.step(torch.zeros(1), 5, torch.zeros(1))
    s.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep: got 5, allowed are the 3"):
        s.step(torch.zeros(1), 5, torch.zeros(1))
    s.step(torch.zeros(1), 999, torch.zeros(1))
    with pytest.raises(ValueError, match="timestep: got 333, allowed after 999 is 666"):
        s.step(torch.zeros(1), 333, torch.zeros(1))
    for bad in (-1, 3, None, "a"):
        with pytest.raises(ValueError, match=r"begin_index: got .*, allowed is 0 to 2"):
            s.set_begin_index(bad)  # type: ignore[arg-type]
    for spacing in ("linspace", "leading"):
        few = UniPCMultistepScheduler(num_train_timesteps=10, timestep_spacing=spacing)
        with pytest.raises(ValueError, match=f"num_inference_steps: got 10, allowed with '{spacing}' are fewer"):
            few.set_timesteps(10)
    for name, other in (("use_karras_sigmas", True), ("solver_type", "bh1"), ("final_sigmas_type", "sigma_min")):
        with pytest.raises(ValueError, match=f"{name}: got {other!r}, allowed is .*; FastSampler takes diffusers' own"):
            UniPCMultistepScheduler.from_config({name: other})
    assert isinstance(DDIMScheduler.from_config(s.config), DDIMScheduler)
