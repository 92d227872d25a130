"""One step of training: objective, learning rate, augmentation, and what it leaves on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sbldm_fast import UNet2D
from sbldm_fast.training import Objective, TrainConfig
from sbldm_fast.training.config import amp_dtype
from sbldm_fast.training.run import batches
from sbldm_fast.training.stages import unet_loss
from sbldm_fast.training.step import Step

from .test_stages import SMALL, config


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_min_snr_weights(kind: str) -> None:
    a = torch.tensor([0.99, 0.5, 0.1, 0.0])
    got = Objective(snr_gamma=5.0).weights(a, kind).tolist()
    # by hand: snr is 99, 1, 1/9, 0, and that of a flow 99^2, 1, 1/81, 0
    by_hand = {
        "epsilon": [5 / 99, 1, 1, 1],
        "sample": [5, 1, 1 / 9, 0],
        "v_prediction": [5 / 100, 1 / 2, (1 / 9) / (10 / 9), 0],
        "flow_prediction": [5 * 0.01**2, 0.25, 0.9**2 / 81, 0],
    }
    assert got == pytest.approx(by_hand[kind], rel=1e-5)
    assert Objective().weights(a, kind).tolist() == [1, 1, 1, 1]


def test_the_objective_is_its_formula() -> None:
    pred, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    w = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    weighted = w[:, None, None, None].sqrt() * (pred - target)
    plain = float((pred - target).square().mean())

    def loss(objective: Objective) -> float:
        return float(objective.loss(pred.float(), target.float(), w.float()))

    assert loss(Objective()) == pytest.approx(plain, rel=1e-5)
    assert loss(Objective(snr_gamma=5.0)) == pytest.approx(float(weighted.square().mean()), rel=1e-5)
    assert loss(Objective(spectral_weight=0.1)) == pytest.approx((1 + 0.1 * 64) * plain, rel=1e-5)
    power = torch.fft.fft2(pred - target, norm="ortho").abs().square()
    f = torch.fft.fftfreq(8, dtype=torch.float64)
    low = (f[:, None] ** 2 + f[None] ** 2).sqrt() <= 0.25
    bands = float((power * torch.where(low, 2.0, 0.5)).mean())
    assert loss(Objective(low_weight=2.0, high_weight=0.5)) == pytest.approx(bands, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cutmix_prob": 1.5}, "cutmix_prob: got 1.5, allowed is 0 to 1"),
        ({"low_weight": -1.0}, "low_weight: got -1.0, allowed is 0 or more"),
        ({"cutoff": math.nan}, "cutoff: got nan"),
        ({"cutoff": 1.5}, "cutoff: got 1.5, allowed is 0 to 1"),
        ({"high_weight": math.inf}, "high_weight: got inf"),
        ({"snr_gamma": 0.0}, "snr_gamma: got 0.0, allowed is above 0, or none"),
        ({"snr_gamma": math.inf}, "snr_gamma: got inf"),
        ({"low_weight": 0.0, "high_weight": 0.0}, "low_weight, high_weight, spectral_weight: got 0 three times"),
    ],
)
def test_bad_objective_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**values)


def unet_step(device: torch.device, amp: str, ema_decay: float = 0.9) -> Step:
    torch.manual_seed(0)
    model = UNet2D(SMALL.unet).to(device)
    latents = torch.randn(16, 8, 16, 16, device=device)
    objective = Objective(snr_gamma=5.0, low_weight=2.0, cutmix_prob=0.25)
    settings = config(100, amp=amp, ema_decay=ema_decay)
    step = Step(model, unet_loss(latents, SMALL.scheduler, objective, settings.seed), settings)
    model.train()
    return step


class Reads(TorchDispatchMode):
    """Counts how often a number is brought from a tensor to Python: on a GPU each is a wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_brings_no_number_to_the_host(amp: str) -> None:
    step = unet_step(torch.device("cpu"), amp, ema_decay=0.0)  # the EMA has a scalar on a CPU, a tensor elsewhere
    index = torch.arange(4)
    step(0, index)
    with Reads() as reads:
        step(1, index)
    assert reads.count == 0
    with Reads() as reads:
        step.read(2)
    assert reads.count > 0, "the count counts"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["off", "fp16", "auto"])
def test_a_captured_step_is_the_step_and_waits_for_nothing(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with kernels that add in one order: AdamW makes steps of the rounding of gradients that are zero."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    captured, eager = unet_step(device, amp), unet_step(device, amp)
    eager.run = eager._work
    index = torch.arange(8, device=device).split(4)
    for i in range(8):
        if i == 5:  # captured after three
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with sdpa_kernel(SDPBackend.MATH):
            try:
                captured(i, index[i % 2])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            eager(i, index[i % 2])
    assert captured.read(8)["loss"] == eager.read(8)["loss"]
    for a, b in zip(captured.trained.parameters(), eager.trained.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_epoch_meets_every_item_once_from_any_start() -> None:
    order = batches(10, 3, 7, 0)
    first = [next(order) for _ in range(7)]
    assert len(set(torch.cat(first[:3]).tolist())) == 9
    assert not torch.equal(torch.cat(first[:3]), torch.cat(first[3:6]))
    again = batches(10, 3, 7, 4)
    for expected in first[4:]:
        assert torch.equal(next(again), expected)
    assert len(next(batches(2, 5, 0, 0))) == 2


def test_learning_rate() -> None:
    config = TrainConfig(steps=110, batch_size=1, lr=1.0, warmup=10)
    assert [config.lr_at(s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert config.lr_at(109) < 0.001


def test_amp_dtype_by_name() -> None:
    cpu = torch.device("cpu")
    assert amp_dtype("off", cpu) is None
    assert amp_dtype("fp16", cpu) is torch.float16
    assert amp_dtype("bf16", cpu) is torch.bfloat16
    assert amp_dtype("auto", cpu) in (None, torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"amp": "tf32"}, "amp: got 'tf32'"),
        ({"keep": 0}, "keep: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"seed": 10**14}, "seed: got 100000000000000, allowed is 0 to 1099511627775"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_config_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"steps": 1, "batch_size": 1, "lr": 1.0} | values))
