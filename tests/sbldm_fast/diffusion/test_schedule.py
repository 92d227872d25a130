"""Schedules against values derived by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sbldm_fast import NoiseSchedule
from sbldm_fast.diffusion.schedule import rescale_zero_terminal_snr


def close(got: torch.Tensor, expected: list[float]) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-17)


def test_schedules_by_hand() -> None:
    # linear of three: 0.1, 0.2, 0.3; alphas_cumprod 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7
    linear = NoiseSchedule("linear", 3, 0.1, 0.3)
    close(linear.betas, [0.1, 0.2, 0.3])
    close(linear.alphas_cumprod64, [0.9, 0.72, 0.504])
    # roots 0.1, 0.2, 0.3 squared
    close(NoiseSchedule("scaled_linear", 3, 0.01, 0.09).betas, [0.01, 0.04, 0.09])
    # T = 2, so t/T is 1/2 and 1: 1 - cos(45 deg), 1 - cos(90 deg)
    close(NoiseSchedule("cosine_ramp", 2, 0.1, 0.3).betas, [0.1 + 0.2 * (1 - math.sqrt(0.5)), 0.3])
    # linear 0.1, 0.3 times (1/2)^2 and 1
    close(NoiseSchedule("gamma", 2, 0.1, 0.3, gamma=2.0).betas, [0.025, 0.3])
    # the same, scaled from the sum 0.325 back to 0.4
    close(
        NoiseSchedule("gamma", 2, 0.1, 0.3, gamma=2.0, normalise="sum").betas, [0.025 * 0.4 / 0.325, 0.3 * 0.4 / 0.325]
    )
    # Nichol & Dhariwal: a_t = f(t/T)/f(0), the last beta capped at 0.999
    f = [math.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1 / 3, 2 / 3)]
    cosine = NoiseSchedule("cosine", 3)
    close(cosine.alphas_cumprod64[:2], [f[1] / f[0], f[2] / f[0]])
    close(cosine.betas[2:], [0.999])


@pytest.mark.parametrize(
    ("name", "terminal", "last_above_one"),
    [
        ("linear", 4.0e-5, 258),
        ("scaled_linear", 7.3e-4, 417),
        ("cosine_ramp", 6.2e-4, 431),
        ("cosine", 2.4e-9, 495),
        ("gamma", 3.1e-4, 372),
    ],
)
def test_the_docstrings_table(name: str, terminal: float, last_above_one: int) -> None:
    a = NoiseSchedule(name).alphas_cumprod64
    assert a[-1].item() == pytest.approx(terminal, rel=0.02)
    assert int((a > 0.5).sum()) - 1 == last_above_one


def test_gamma_normalised_keeps_the_terminal_snr() -> None:
    assert NoiseSchedule("gamma", normalise="sum").alphas_cumprod64[-1].item() == pytest.approx(4.0e-5, rel=0.02)
    assert torch.equal(NoiseSchedule("gamma", gamma=0.0).betas, NoiseSchedule("linear").betas)


def test_zero_terminal_snr_by_hand() -> None:
    # betas 0.19, 0.51...: roots of alphas_cumprod 0.9, 0.63, shifted by 0.63 and scaled by 0.9/0.27 to 0.9, 0
    betas = torch.tensor([0.19, 1 - 0.63**2 / 0.81], dtype=torch.float64)
    close(rescale_zero_terminal_snr(betas), [0.19, 1.0])
    a = NoiseSchedule(zero_terminal_snr=True).alphas_cumprod64
    assert a[-1] == 0
    torch.testing.assert_close(a[0], NoiseSchedule().alphas_cumprod64[0])


def test_float32_table_is_the_float64_table_rounded() -> None:
    s = NoiseSchedule()
    assert torch.equal(s.alphas_cumprod, s.alphas_cumprod64.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sqrt"}, "name: got 'sqrt'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: got 1"),
        ({"beta_start": 0.0}, "beta_start, beta_end: got 0.0"),
        ({"beta_end": 1.0}, "beta_start, beta_end"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"normalise": "max"}, "normalise: got 'max'"),
    ],
)
def test_bad_schedule_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**arguments)
