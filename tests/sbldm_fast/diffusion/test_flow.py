"""Rectified flow: the schedulers against diffusers and MONAI, and against fields whose end is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sbldm_fast
from sbldm_fast import FlowMatchEulerDiscreteScheduler, RFlowScheduler, SchedulerConfig, SolverTable

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer that these tests compare with")
networks = pytest.importorskip("monai.networks.schedulers", reason="MONAI is the peer that these tests compare with")

Model = Callable[[Tensor, Tensor], Tensor]
MAISI: dict[str, Any] = {"use_discrete_timesteps": False, "use_timestep_transform": True}
SIZE = 64**3


def run(scheduler: Any, steps: int, model: Model, x: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    after = [*times[1:], torch.zeros_like(times[0])]
    told = "next_timestep" in inspect.signature(scheduler.step).parameters
    for t, following in zip(times, after, strict=True):
        out = scheduler.step(model(x, t), t, x, **({"next_timestep": following} if told else {}))
        x = out[0] if isinstance(out, tuple) else out.prev_sample
    return x


def bent(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * torch.cos(t.to(x.dtype) / 300)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
def test_euler_steps_are_those_of_diffusers(steps: int, shift: float) -> None:
    ours, theirs = (
        of(shift=shift) for of in (FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    )
    same = {"rtol": 2e-7, "atol": 0}
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, **same)
    x, e = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(ours, steps, bent, x), run(theirs, steps, bent, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, **same)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, **same)
    theirs.set_timesteps(steps)
    for t in theirs.timesteps[[0, -1]].expand(3, 2).T:
        expected = theirs.scale_noise(x, t, e)
        torch.testing.assert_close(ours.scale_noise(x, t, e), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours.add_noise(x, e, t), ours.scale_noise(x, t, e))
    half = ours.step(e.half(), ours.timesteps[0], x.half()).prev_sample
    assert torch.equal(half, theirs.step(e.half(), theirs.timesteps[0], x.half()).prev_sample)


@pytest.mark.parametrize("steps", [1, 3, 17])
@pytest.mark.parametrize("name", ["flow", "flow, shifted", "rflow", "rflow of MAISI", "dpm"])
def test_the_velocity_towards_one_point_ends_there(name: str, steps: int) -> None:
    """Where all data are the point c, the field is `(x - c) / s`: every Euler step stays on the line to c."""
    made = {
        "flow": FlowMatchEulerDiscreteScheduler,
        "flow, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "rflow": RFlowScheduler,
        "rflow of MAISI": lambda: RFlowScheduler(**MAISI, input_img_size_numel=SIZE),
        "dpm": lambda: sbldm_fast.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }[name]()
    x, c = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sign = -1 if name.startswith("rflow") else 1
    end = run(made, steps, lambda x, t: sign * (x - c) / (t.double() / 1000), x)
    torch.testing.assert_close(end, c, rtol=0, atol=5e-3 if name == "dpm" else 1e-5)  # dpm begins at s = 0.999


def test_tables_of_flows_know_x0_and_the_noise() -> None:
    for shift in (1.0, 3.0):
        table = SolverTable.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), 12)
        theirs = SolverTable.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), 12)
        torch.testing.assert_close(table.rows[:, 2:], theirs.rows[:, 2:], rtol=0, atol=1e-7)
        s = table.timesteps / 1000
        torch.testing.assert_close(table.rows[:, :2], torch.stack([s * 0 + 1, -s], 1), rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.stack([table.alpha, table.sigma]), torch.stack([1 - s, s]), rtol=0, atol=1e-6)
        assert float(table.rows[:, 5].sum()) == pytest.approx(-1, abs=1e-9)


class Sized(networks.RFlowScheduler):  # type: ignore[misc]
    """MONAI's, told the size of an image, which its `set_timesteps` needs."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(num_inference_steps, input_img_size_numel=SIZE)


@pytest.mark.parametrize("steps", [2, 10, 30, 50])
@pytest.mark.parametrize("config", [{}, {"use_discrete_timesteps": False}, MAISI, {"use_timestep_transform": True}])
def test_compat_monai_is_monai_and_ours_adds_up(config: dict[str, Any], steps: int) -> None:
    theirs, ours = Sized(**config), RFlowScheduler(**config, input_img_size_numel=SIZE)
    compat = RFlowScheduler(**config, input_img_size_numel=SIZE, compat="monai")
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(compat, steps, bent, x), run(theirs, steps, bent, x))
    assert compat.timesteps.dtype == theirs.timesteps.dtype
    assert torch.equal(compat.timesteps, theirs.timesteps)
    t = theirs.timesteps[0]
    for a, b in zip(compat.step(x, t, x), theirs.step(x, t, x), strict=True):
        assert torch.equal(a, b)
    read = {"monai": theirs, "compat": compat, "ours": ours}
    rows = {name: SolverTable.from_scheduler(of, steps).rows for name, of in read.items()}
    assert torch.equal(rows["monai"], rows["compat"])
    assert float(rows["ours"][:, 5].sum()) == pytest.approx(1, abs=1e-9)
    if not config:
        torch.testing.assert_close(rows["ours"], rows["monai"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("steps", "total"), [(10, 1.0036), (30, 1.0096), (50, 1.0170)])
def test_monai_goes_further_than_the_way_is_long(steps: int, total: float) -> None:
    """With the timesteps of MAISI, by what its `int(next_timestep)` cuts off; with whole ones it does not."""
    rows = SolverTable.from_scheduler(Sized(**MAISI), steps).rows
    assert float(rows[:, 5].sum()) == pytest.approx(total, abs=5e-5)
    rows = SolverTable.from_scheduler(networks.RFlowScheduler(), steps).rows
    assert float(rows[:, 5].sum()) == pytest.approx(1, abs=1e-9)


def test_folders_and_configs_cross_over(tmp_path: Path) -> None:
    for of in (diffusers.FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler):
        of(shift=3.0).save_pretrained(tmp_path)
        assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config.shift == 3
    for kind in (FlowMatchEulerDiscreteScheduler, RFlowScheduler):
        kind(num_train_timesteps=500).save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).config.num_train_timesteps == 500
    with pytest.raises(ValueError, match="prediction_type: got 'rflow', allowed are epsilon"):
        sbldm_fast.DDIMScheduler.from_pretrained(tmp_path)
    assert RFlowScheduler.from_config(MAISI | {"sample_method": "uniform", "scale": 1.4}).config.spatial_dim == 3


FLOW = SchedulerConfig(prediction_type="flow_prediction")
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        name: (
            lambda name=name: getattr(sbldm_fast, name).from_config(FLOW),
            f"prediction_type: got 'flow_prediction', allowed for {name} are epsilon, sample, v_prediction; FlowMatch",
        )
        for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    },
    "another prediction": (
        lambda: FlowMatchEulerDiscreteScheduler.from_config(SchedulerConfig()),
        "prediction_type: got 'epsilon', allowed for FlowMatchEulerDiscreteScheduler is flow_prediction; DDIM",
    ),
    "dynamic": (
        lambda: FlowMatchEulerDiscreteScheduler.from_config(
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
        ),
        "use_dynamic_shifting: got True, allowed is none",
    ),
    "shift": (lambda: FlowMatchEulerDiscreteScheduler(shift=0.0), "shift is 0.0, allowed is 0.001 to"),
    "unknown": (lambda: RFlowScheduler(shift=2.0), "RFlowConfig: got 'shift', allowed are"),
    "compat": (lambda: RFlowScheduler(compat="diffusers"), "compat: got 'diffusers', allowed are exact, monai"),
    "size": (
        lambda: RFlowScheduler(**MAISI).set_timesteps(10),
        "input_img_size_numel: got None, allowed with use_timestep_transform is 1 or more",
    ),
    "steps": (lambda: RFlowScheduler().set_timesteps(0), "num_inference_steps: got 0, allowed is 1 to 1000"),
    "no steps": (
        lambda: FlowMatchEulerDiscreteScheduler().step(torch.ones(1), 1.0, torch.ones(1)),
        "num_inference_steps: got None, call set_timesteps first",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_flow_is_is_refused(case: str) -> None:
    made, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        made()


def test_a_timestep_that_is_not_there_is_named() -> None:
    scheduler, x = FlowMatchEulerDiscreteScheduler(), torch.ones(1)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep: got 7.0, 0 times in self.timesteps"):
        scheduler.step(x, 7.0, x)
