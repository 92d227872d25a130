"""A rectified flow from data to samples: trained, gone on with, sampled."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import FlowMatchEulerDiscreteScheduler, Pipeline, SchedulerConfig
from sbldm_fast.training import Objective, train_pipeline
from sbldm_fast.training.stages import prediction_error, unet_loss

from .test_stages import SMALL, config, curve, same_run

FLOW = SMALL._replace(scheduler=replace(SMALL.scheduler, prediction_type="flow_prediction"))


class ToAPoint(nn.Module):
    """The exact field of data that are one point."""

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(point)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.point) / (t / 1000)[:, None, None, None]


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_exact_field_has_no_loss(snr_gamma: float | None) -> None:
    """So the noise, the target and the time that the model is told belong together."""
    point, scheduler = torch.randn(4, 8, 8), SchedulerConfig(prediction_type="flow_prediction")
    latents, model = point.repeat(64, 1, 1, 1), ToAPoint(point)
    loss = unet_loss(latents, scheduler, Objective(snr_gamma=snr_gamma), 0)(model, torch.arange(64), torch.tensor(1))[0]
    assert float(loss.detach()) < 1e-6
    assert prediction_error(model, latents, scheduler, 0) < 1e-6
    with torch.no_grad():
        model.point += 1
    assert prediction_error(model, latents, scheduler, 0) > 1


def test_a_flow_is_trained_gone_on_with_and_sampled(told: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"vae": config(1), "unet": config(4, ema_decay=0.5), "views": 1, "progress": False}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_pipeline(FLOW, told, whole, **arguments)
    shutil.copytree(whole, cut)
    for last in ("checkpoint-unet-00000004", "pipeline"):
        shutil.rmtree(cut / last)
    train_pipeline(FLOW, told, cut, **arguments, resume=True)
    assert {row["stage"] for row in curve(cut)} == {"vae", "unet"}
    same_run(whole, cut)

    pipe = Pipeline.from_pretrained(whole / "pipeline")
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    images = pipe.sample(1, steps=2, mode="eager")
    assert images.isfinite().all()
    assert torch.equal(images, pipe.sample(1, steps=2, mode="eager", scheduler="flow"))
    for name in ("ddim", "ddpm", "dpm", "unipc"):
        with pytest.raises(ValueError, match=r"prediction_type: got 'flow_prediction', allowed for .*; FlowMatch"):
            pipe.sample(1, steps=3, scheduler=name)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.save(tmp_path / "shifted")
    shifted = Pipeline.from_pretrained(tmp_path / "shifted")
    assert torch.equal(shifted.sample(1, steps=2, mode="eager"), pipe.sample(1, steps=2, mode="eager"))
    assert not torch.equal(shifted.sample(1, steps=2, mode="eager"), images)
