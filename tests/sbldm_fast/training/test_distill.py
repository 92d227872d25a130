"""Distillation: where the teacher lands, what a student knows, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, FastSampler, Pipeline, SolverTable, UNet2D
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.sampling.noise import draw
from sbldm_fast.training import distill_pipeline
from sbldm_fast.training.distill import Judge, Predict, Segments, distill_loss, walk
from sbldm_fast.training.ranks import Ranks
from sbldm_fast.training.stages import Told

from .test_stages import SMALL, config, curve, same_run

CPU = torch.device("cpu")
V = replace(SMALL.scheduler, prediction_type="v_prediction")
TOLD = (Covariate("age", low=20.0, high=39.0), Covariate("modality", ("T1", "T2")))


def teacher(covariates: tuple[Covariate, ...] = (), **options: Any) -> Pipeline:
    """A small pipeline of random weights whose prediction is not zero."""
    torch.manual_seed(0)
    unet = UNet2D(replace(SMALL.unet, covariates=covariates, **options))
    with torch.no_grad():
        unet.conv_out.weight.normal_(0, 0.02)
    return Pipeline(AutoencoderKL(SMALL.vae).eval(), unet.eval(), V)


@pytest.fixture(autouse=True)
def judged_by_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbldm_fast.training.distill.JUDGED", 4)
    monkeypatch.setattr("sbldm_fast.training.distill.CONVERGED", 32)


class Constant(nn.Module):
    """Says the same x0 of everything, as a v-prediction."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0, self.alphas = x0, DDIMScheduler.from_config(V).alphas_cumprod

    def forward(self, x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        a = self.alphas[t][:, None, None, None]
        return (a.sqrt() * x - self.x0) / (1 - a).sqrt()


@pytest.mark.parametrize("substeps", [1, 4])
def test_a_teacher_of_one_answer_lands_on_the_line_between(substeps: int) -> None:
    """x stays alpha x0 + sigma e, in steps of either order and to the end of any segment."""
    segments, x0 = Segments.of(V, 4, substeps, first_order=substeps == 1), torch.randn(8, 16, 16)
    k = torch.tensor([0, 1, 2, 3])
    alpha, sigma, alpha_end, sigma_end = segments.levels.T[:, :, None, None, None]
    e = torch.randn(4, 8, 16, 16)
    landed = walk(Constant(x0), Predict(V, CPU), alpha * x0 + sigma * e, k, segments, None)
    torch.testing.assert_close(landed, alpha_end * x0 + sigma_end * e, rtol=1e-4, atol=1e-4)
    assert segments.timesteps[:, 0].tolist() == [999, 749, 499, 249]
    assert float(segments.levels[-1, 2]) == 1, "the last ends in the image"


def test_the_judges_run_is_that_of_the_sampler() -> None:
    """A student's steps are DDIM on a trailing grid that looks up where it goes; a converged teacher's are near its
    own."""
    pipe = teacher()
    told = Told(torch.randn(5, *pipe.latent_shape))
    judge = Judge(pipe.unet, Predict(V, CPU), V, 4, told)
    seeds = torch.tensor([[0, i] for i in range(4)])
    assert torch.equal(judge.noise, draw(seeds, pipe.latent_shape, CPU))
    ddim = DDIMScheduler.from_config(V, timestep_spacing="trailing", prev="lookup")
    made = FastSampler(pipe.unet, ddim, shape=pipe.latent_shape, steps=4)(4, seed=0)
    assert judge(pipe.unet) == pytest.approx(float((made - judge.wanted).square().mean().sqrt()), rel=1e-4)
    by_steps = [Judge(pipe.unet, Predict(V, CPU), V, n, told)(pipe.unet) for n in (2, 8, 50)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_steps[-1] < by_steps[0] / 10
    unipc = judge.of_unipc(pipe, None)
    assert unipc is not None
    assert 0 < unipc < judge(pipe.unet)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_student_that_says_what_the_teacher_reaches_has_no_loss(kind: str) -> None:
    scheduler = replace(V, prediction_type=kind)
    x0 = torch.randn(8, 16, 16)
    a = DDIMScheduler.from_config(V).alphas_cumprod

    class Says(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = a[t].sqrt()[:, None, None, None], (1 - a[t]).sqrt()[:, None, None, None]
            said = {"epsilon": (x - alpha * x0) / sigma, "sample": x0 + 0 * x}
            return said.get(kind, (alpha * x - x0) / sigma)

    told = Told(torch.randn(6, 8, 16, 16))
    predict, segments = Predict(scheduler, CPU), Segments.of(scheduler, 4, 4)
    loss_of = distill_loss(Says(), told, scheduler, segments, predict, 0, Ranks())
    assert float(loss_of(Says(), torch.arange(6), torch.tensor(1))[0]) < 1e-5
    other = distill_loss(Constant(x0 + 1), told, V, segments, Predict(V, CPU), 0, Ranks())
    assert float(other(Constant(x0), torch.arange(6), torch.tensor(1))[0]) == pytest.approx(1, rel=1e-3)


def test_guidance_is_two_passes_of_the_teacher() -> None:
    pipe = teacher(TOLD)
    x, t, values = torch.randn(2, *pipe.latent_shape), torch.tensor([900, 20]), torch.tensor([[30.0, 1.0], [22.0, 0.0]])
    without = Predict(V, CPU)(pipe.unet, x, t, torch.full_like(values, math.nan))
    told = Predict(V, CPU)(pipe.unet, x, t, values)
    guided = Predict(V, CPU, 2.5)(pipe.unet, x, t, values)
    torch.testing.assert_close(guided, without + 2.5 * (told - without), rtol=1e-4, atol=1e-4)


def test_a_student_is_trained_gone_on_with_and_halved(told: Path, tmp_path: Path) -> None:
    pipe = teacher(TOLD, slice_mixing=True)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    whole, cut, half = tmp_path / "whole", tmp_path / "cut", tmp_path / "half"
    options: dict[str, Any] = {"views": 1, "progress": False}
    result = distill_pipeline(pipe, told, whole, 4, config(4, ema_decay=0.5), guidance_scale=1.5, **options)
    assert result["steps"] == 4
    assert 0 < result["rms"] < 10
    assert 0 < result["unipc_rms"] < 10
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items()), "the teacher stays as it is"
    shutil.copytree(whole, cut)
    for last in ("checkpoint-student4-00000004", "pipeline"):
        shutil.rmtree(cut / last)
    again = distill_pipeline(pipe, told, cut, 4, config(4, ema_decay=0.5), guidance_scale=1.5, resume=True, **options)
    assert again == result
    assert [row["stage"] for row in curve(cut) if "val" in row] == ["student4", "student4"]
    same_run(whole, cut)

    student = Pipeline.from_pretrained(whole / "pipeline")
    assert (student.unet.config.distilled_steps, student.unet.config.distilled_guidance) == (4, 1.5)
    assert student.sampler().timesteps == [999, 749, 499, 249]
    assert not student.unet.config.slice_mixing, "layers along z are of the teacher's timesteps"
    cond = {"age": 30, "modality": "T2"}
    images = student.sample(2, cond=cond)
    assert torch.equal(images, student.sample(2, cond=cond, scheduler="ddim", steps=4))
    for steps, scheduler in ((8, None), (3, "ddim"), (12, "unipc")):
        with pytest.raises(ValueError, match=rf"steps: got {steps} model calls, allowed for this network is 4"):
            student.sample(1, steps=steps, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"guidance_scale: got 2, allowed is None: .* guidance 1.5 folded in"):
        student.sample(1, cond=cond, guidance_scale=2)
    with pytest.raises(ValueError, match=r"guidance_scale: got 2.0, allowed is None: the teacher was distilled"):
        distill_pipeline(student, told, half, 2, config(2), guidance_scale=2.0, **options)
    with pytest.raises(ValueError, match=r"steps: got 3, allowed for a teacher of 4 steps are 1, 2"):
        distill_pipeline(student, told, half, 3, config(2), **options)
    halved = distill_pipeline(student, told, half, 2, config(2), **options)
    assert halved["unipc_rms"] is None
    of = Pipeline.from_pretrained(half / "pipeline").unet.config
    assert (of.distilled_steps, of.distilled_guidance) == (2, 1.5)
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-student2-.*\); allowed is a new folder"):
        distill_pipeline(student, told, half, 2, config(2), **options)
    with torch.no_grad():
        student.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match=r"teacher: got \w+, but .* was made with"):
        distill_pipeline(student, told, half, 2, config(2), resume=True, **options)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda p: p, {"steps": 0}, "steps: got 0, allowed is 1 to 250"),
        (lambda p: p, {"steps": 4.0}, r"steps: got 4\.0, allowed is a whole number"),
        (
            lambda p: Pipeline(p.vae, p.unet, replace(V, rescale_betas_zero_snr=True)),
            {},
            "rescale_betas_zero_snr: got True, allowed for a teacher is a schedule that ends above 0",
        ),
        (
            lambda p: Pipeline(p.vae, p.unet, replace(V, prediction_type="flow_prediction")),
            {},
            "prediction_type: got flow_prediction, allowed for a teacher are epsilon",
        ),
        (lambda p: p, {"guidance_scale": 2.0}, "guidance_scale: got 2.0, allowed are finite numbers, for a model with"),
        (lambda p: teacher(TOLD), {"guidance_scale": math.nan}, "guidance_scale: got nan, allowed are finite numbers"),
        (
            lambda p: Pipeline(AutoencoderKL(replace(SMALL.vae, block_out_channels=(8, 8, 8))), p.unet, V),
            {},
            r"its autoencoder makes latents \(8, 32, 32\), allowed are \(8, 16, 16\)",
        ),
    ],
)
def test_what_cannot_be_distilled_is_named(
    told: Path, tmp_path: Path, change: Callable[[Pipeline], Pipeline], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distill_pipeline(
            change(teacher()), told, tmp_path / "s", **{"steps": 4, "config": config(2)} | arguments, views=1
        )
    assert not (tmp_path / "s").exists()


def test_a_teacher_with_a_scheduler_of_another_library_is_refused_before_anything_is_made(
    told: Path, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this scheduler")
    pipe = teacher()
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(
        ValueError, match="scheduler: got another library's DDIMScheduler, allowed for a teacher is one"
    ):
        distill_pipeline(pipe, told, tmp_path / "s", 4, config(2), views=1)
    assert not (tmp_path / "s").exists()


def test_a_broken_teacher_ends_the_run_before_its_first_checkpoint(told: Path, tmp_path: Path) -> None:
    pipe = teacher()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"student4: the loss or its gradient is not finite at step 0, items"):
        distill_pipeline(pipe, told, tmp_path, 4, config(2), views=1, progress=False)
    assert not (tmp_path / "pipeline").exists()


def test_the_table_of_a_student_is_its_segments() -> None:
    ddim = DDIMScheduler.from_config(V, timestep_spacing="trailing", prev="lookup")
    table, segments = SolverTable.from_scheduler(ddim, 4), Segments.of(V, 4, 1, first_order=True)
    x, m = torch.randn(2, 3, 3, dtype=torch.float64)
    for i in range(4):
        c = Predict(V, CPU).c[table.timesteps[i]]
        shrink, x0, back = segments.rows[i, 0].double()
        torch.testing.assert_close(
            table.step(i, [x], [m]), shrink * x + x0 * (c[0] * x + c[1] * m), rtol=1e-5, atol=1e-5
        )
        assert back == 0
