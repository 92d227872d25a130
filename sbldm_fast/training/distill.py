"""Distillation: a network that goes in one call where its teacher takes several.

The run from noise to image is cut into K segments of equal time. The student's one DDIM step over a segment learns to
land where the teacher's smaller steps do, from noised latents of slices. Nothing is drawn in a step, so that a seed
still means an image, and the student is a pipeline like any other: the same network, plain DDIM.
Source: Salimans & Ho 2022, arXiv:2202.00512, algorithm 2; the teacher's steps here are of second order (Lu et al. 2022,
arXiv:2211.01095), four in a segment, or, where it is a student itself, its own.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbldm_fast.diffusion import DDIMScheduler, DDPMScheduler, SchedulerConfig, UniPCMultistepScheduler
from sbldm_fast.errors import UserError
from sbldm_fast.kernels import diffuse
from sbldm_fast.models import UNet2D
from sbldm_fast.models.slices import MIXING
from sbldm_fast.models.weights import digest_weights
from sbldm_fast.sampling import FastSampler
from sbldm_fast.sampling.noise import draw
from sbldm_fast.sampling.pipeline import UNIPC, Pipeline
from sbldm_fast.sampling.request import whole_number

from . import checkpoint, conditions
from .autoencoder import encode_splits, refuse_misfits
from .config import TrainConfig
from .ranks import Ranks
from .run import Context, Stage, train
from .stages import Told, condition_values, digest_data, find_splits, refuse_a_run
from .step import LossOf

SUBSTEPS = 4  # of a teacher that is no student, in a segment
JUDGED = 64  # held-out conditions, and as many noises, that a student is judged by
CONVERGED = 64  # the teacher's steps to the image that is judged against


@dataclass(frozen=True)
class Segments:
    """K segments, and n steps of the teacher in each: timesteps `[K, n]`, levels (alpha, sigma at the start, then at
    the end) `[K, 4]`, and rows `[K, n, 3]`, `x' = r_0 x + r_1 x0 + r_2 x0 of the step before`."""

    timesteps: Tensor
    levels: Tensor
    rows: Tensor

    @classmethod
    def of(cls, scheduler: SchedulerConfig, count: int, substeps: int, first_order: bool = False) -> Segments:
        """`count` segments of a schedule, in each so many steps of DPM-Solver++(2M), begun anew, or of DDIM."""
        ddim = DDIMScheduler.from_config(scheduler, timestep_spacing="trailing")
        ddim.set_timesteps(count * substeps)
        ends = torch.cat([ddim.timesteps, torch.tensor([-1])])
        a = torch.cat([ddim.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])[ends]
        at = torch.stack([a.sqrt(), (1 - a).sqrt()], 1).unfold(0, substeps + 1, substeps).mT.tolist()
        levels = torch.tensor([[*inside[0], *inside[-1]] for inside in at])
        return cls(
            ends[:-1].reshape(count, substeps), levels, torch.tensor([_rows(inside, first_order) for inside in at])
        )

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        return Segments(self.timesteps.to(device), self.levels.to(device), self.rows.to(device))


def _rows(at: list[list[float]], first_order: bool) -> list[list[float]]:
    """The rows of steps through levels (alpha, sigma): DPM-Solver++(2M), begun anew, or DDIM."""
    rows, h_before = [], 0.0
    for (alpha, sigma), (alpha_next, sigma_next) in pairwise(at):
        shrink, x0 = sigma_next / sigma, alpha_next - sigma_next / sigma * alpha
        h = math.log(alpha_next / alpha) - math.log(shrink) if sigma_next else math.inf
        back = 0.0 if first_order or not h_before or not sigma_next else h / h_before / 2
        rows.append([shrink, x0 * (1 + back), -x0 * back])
        h_before = h
    return rows


def _column(v: Tensor) -> Tensor:
    return v[:, None, None, None]


class Predict:
    """x0 as a network predicts it, by one pass, or by two with guidance."""

    def __init__(self, scheduler: SchedulerConfig, device: torch.device, guidance_scale: float = 1.0) -> None:
        a = DDPMScheduler.from_config(scheduler).alphas_cumprod.double()
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        by_kind = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (0 * alpha, 1 + 0 * alpha),
            "v_prediction": (alpha, -sigma),
        }
        self.c = torch.stack(by_kind[scheduler.prediction_type], 1).to(device, torch.float32)
        self.guidance_scale = guidance_scale

    def __call__(self, model: nn.Module, x: Tensor, t: Tensor, values: Tensor | None) -> Tensor:
        """x0 `[N, C, h, w]` in float32, of x at timesteps `[N]` under `values` `[N, K]`."""
        w = self.guidance_scale
        if values is None:
            m = model(x, t).float()
        elif w == 1:
            m = model(x, t, values).float()
        else:
            both = torch.cat([torch.full_like(values, math.nan), values])
            without, told = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
            m = without + w * (told - without)
        x0: Tensor = _column(self.c[t, 0]) * x + _column(self.c[t, 1]) * m
        return x0


def walk(model: nn.Module, predict: Predict, x: Tensor, k: Tensor, segments: Segments, values: Tensor | None) -> Tensor:
    """x at the end of each sample's segment `k` `[N]`, by the teacher's steps from its start."""
    before = torch.zeros_like(x)
    for j in range(segments.timesteps.shape[1]):
        x0 = predict(model, x, segments.timesteps[k, j], values)
        r = segments.rows[k, j]
        x, before = _column(r[:, 0]) * x + _column(r[:, 1]) * x0 + _column(r[:, 2]) * before, x0
    return x


def distill_loss(
    teacher: nn.Module,
    data: Told,
    scheduler: SchedulerConfig,
    segments: Segments,
    predict: Predict,
    seed: int,
    ranks: Ranks,
) -> LossOf:
    """`|x0 - x0*|^2`, x0* that from which one DDIM step lands where the teacher does.

    Every segment weighs the same: with `max(alpha^2 / sigma^2, 1)`, its authors' weight, a student of four calls was
    nearly all of its error from the first two, which weigh least there (benchmarks/LOG.md 40).
    """
    alphas_cumprod = DDPMScheduler.from_config(scheduler).alphas_cumprod.to(data.latents.device)
    plain = Predict(scheduler, data.latents.device)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        k = ranks.own(torch.randint(len(segments.levels), (len(index),), device=index.device))
        values = None
        if data.values is not None:
            draws = torch.rand(len(index), 1 + data.values.shape[1], device=index.device)
            values = conditions.drop(data.values[ranks.own(index)], ranks.own(draws))
        z0, t = data.latents[ranks.own(index)], segments.timesteps[k, 0]
        x, _ = diffuse(z0, t, alphas_cumprod, seed, first_index=ranks.rank * len(z0), stream=step)
        alpha, sigma, alpha_end, sigma_end = (_column(v) for v in segments.levels[k].T)
        with torch.no_grad():
            landed = walk(teacher, predict, x, k, segments, values)
            wanted = (landed - sigma_end / sigma * x) / (alpha_end - sigma_end / sigma * alpha)
        return (plain(model, x, t, values) - wanted).square().mean(), {}

    return loss_of


class Judge:
    """How far a student's latents are from those that its teacher converges to: the root mean square, for the same
    noises and conditions."""

    def __init__(self, teacher: UNet2D, predict: Predict, scheduler: SchedulerConfig, steps: int, told: Told) -> None:
        device, own = told.latents.device, teacher.config.distilled_steps
        shown = torch.linspace(0, len(told.latents) - 1, JUDGED, device=device).long()
        self.values = None if told.values is None else told.values[shown]
        seeds = torch.stack([torch.zeros(JUDGED), torch.arange(JUDGED)], 1).long()
        self.noise = draw(seeds, tuple(told.latents.shape[1:]), device)
        self.segments, self.plain = Segments.of(scheduler, 1, steps, True).to(device), Predict(scheduler, device)
        self.wanted = self._run(teacher, predict, Segments.of(scheduler, 1, own or CONVERGED, bool(own)).to(device))

    def __call__(self, student: nn.Module) -> float:
        """The distance of a student."""
        return float((self._run(student, self.plain, self.segments) - self.wanted).square().mean().sqrt())

    def of_unipc(self, pipeline: Pipeline, guidance_scale: float | None) -> float | None:
        """The distance of UniPC by as many calls of the teacher; None of one that is a student: it knows its own."""
        if pipeline.unet.config.distilled_steps:
            return None
        solver = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, **UNIPC)
        steps = self.segments.timesteps.shape[1]
        sampler = FastSampler(pipeline.unet, solver, shape=pipeline.latent_shape, steps=steps, mode="eager")
        names = [c.name for c in pipeline.unet.config.covariates]
        columns = [] if self.values is None else [[None if v != v else v for v in c] for c in self.values.T.tolist()]
        cond = dict(zip(names, columns, strict=True)) or None
        made = sampler(noise=self.noise, cond=cond, guidance_scale=guidance_scale, extrapolate=bool(cond))
        return float((made - self.wanted).square().mean().sqrt())

    @torch.no_grad()
    def _run(self, model: nn.Module, predict: Predict, segments: Segments) -> Tensor:
        model.eval()
        return walk(model, predict, self.noise, torch.zeros_like(self.noise[:, 0, 0, 0]).long(), segments, self.values)


def distill_pipeline(
    pipeline: Pipeline,
    data: str | Path,
    folder: str | Path,
    steps: int,
    config: TrainConfig,
    *,
    guidance_scale: float | None = None,
    views: int = 4,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a student that samples in `steps` calls, on a prepared folder, and save it to `folder/pipeline`.

    Args:
        pipeline: the teacher, on the device to train on; its autoencoder is the student's.
        data: a folder that `prepare` wrote.
        folder: for the log, the checkpoints, the latents and the pipeline.
        steps: what the student knows; of a teacher that is a student itself, a part of its own.
        config: how the student is trained.
        guidance_scale: of the teacher, folded into the student, which samples by one pass; None: without guidance.
        views: the latents of each slice and of `views - 1` augmented copies of it are trained on.
        resume: go on with the run in `folder`, if there is one; the result is that of an uninterrupted run.
        progress: whether bars are shown.

    Returns:
        The steps; `rms`, the student's distance in latents from the images that its teacher converges to, and
        `unipc_rms`, that of UniPC by as many calls of the teacher, both on the slices of the validation split
        (of the training split where there is none).

    Raises:
        UserError: steps that the teacher's are no multiple of; guidance of a model without covariates, or asked for
            twice; an autoencoder that does not fit the slices or the UNet; as `train_pipeline`.
        NotFinite: a loss or gradient that is not finite.
        Stopped: on a signal.
    """
    folder, ranks = Path(folder), Ranks.of_torchrun()
    _check(pipeline, steps, guidance_scale)
    ranks.check_batch_size(config.batch_size)
    refuse_a_run(folder, resume)
    slices = find_splits(data)
    refuse_misfits(pipeline.vae.config, slices["train"])
    made_of = {"data": digest_data(data), "teacher": digest_weights(pipeline.vae, pipeline.unet)}
    context = Context(folder, ranks, made_of, progress)
    with checkpoint.name_last_checkpoint(folder):
        latents = encode_splits(pipeline.vae, slices, views, config.seed, context)
        values = condition_values(pipeline.unet.config.covariates, slices, latents)
        factor, device = pipeline.vae.config.scaling_factor, next(pipeline.unet.parameters()).device
        told = {k: Told(latents[k].to(device) * factor, values[k].to(device) if k in values else None) for k in slices}
        student, result = _train(pipeline, told, steps, config, context, guidance_scale)
        if ranks.rank == 0:
            of = DDIMScheduler.from_config(pipeline.scheduler.config).config
            Pipeline(pipeline.vae, student, of).save(folder / "pipeline")
    return result


def _train(
    pipeline: Pipeline, told: dict[str, Told], steps: int, config: TrainConfig, context: Context, guidance: float | None
) -> tuple[UNet2D, dict[str, Any]]:
    """The student, and how it is judged."""
    teacher = copy.deepcopy(pipeline.unet).eval().requires_grad_(False)
    scheduler, of, device = pipeline.scheduler.config, teacher.config, told["train"].latents.device
    predict = Predict(scheduler, device, 1.0 if guidance is None else guidance)
    own = of.distilled_steps
    segments = Segments.of(scheduler, steps, own // steps or SUBSTEPS, first_order=bool(own)).to(device)
    folded = of.distilled_guidance if guidance is None else guidance
    # layers along z were trained around the teacher and its timesteps
    student = UNet2D(replace(of, dropout=0.0, slice_mixing=False, distilled_steps=steps, distilled_guidance=folded)).to(
        device
    )
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if not MIXING.search(k)})
    judge = Judge(teacher, predict, scheduler, steps, told.get("val", told["train"]))
    stage = Stage(
        f"student{steps}",
        student,
        distill_loss(teacher, told["train"], scheduler, segments, predict, config.seed, context.ranks),
        len(told["train"].latents),
        validate=judge,
        settings={"unet": student.config.to_dict(), "scheduler": scheduler.to_dict()},
    )
    trained = train(stage, config, context)
    assert isinstance(trained, UNet2D)
    return trained, {"steps": steps, "rms": judge(trained), "unipc_rms": judge.of_unipc(pipeline, guidance)}


def _check(pipeline: Pipeline, steps: int, guidance_scale: float | None) -> None:
    """Refuse, as `UserError`, what would be found out after the slices are encoded."""
    whole_number("steps", steps)
    if not isinstance(pipeline.scheduler.config, SchedulerConfig):
        got = type(pipeline.scheduler).__name__
        raise UserError(f"scheduler: got another library's {got}, allowed for a teacher is one of ours")
    if (kind := pipeline.scheduler.config.prediction_type) == "flow_prediction":
        raise UserError(f"prediction_type: got {kind}, allowed for a teacher are epsilon, sample, v_prediction")
    of, own = pipeline.unet.config, pipeline.unet.config.distilled_steps
    if not float(pipeline.scheduler.alphas_cumprod[-1]) > 0:
        raise UserError("rescale_betas_zero_snr: got True, allowed for a teacher is a schedule that ends above 0")
    T = pipeline.scheduler.config.num_train_timesteps
    if own and (steps < 1 or own % steps or own == steps):
        allowed = [k for k in range(1, own) if own % k == 0]
        raise UserError(
            f"steps: got {steps}, allowed for a teacher of {own} steps are {', '.join(map(str, allowed)) or 'none'}"
        )
    if not 1 <= steps <= T // SUBSTEPS:
        raise UserError(f"steps: got {steps}, allowed is 1 to {T // SUBSTEPS}")
    if guidance_scale is not None and of.distilled_guidance != 1:
        raise UserError(
            f"guidance_scale: got {guidance_scale}, allowed is None: the teacher was distilled with guidance"
            f" {of.distilled_guidance:g} folded in"
        )
    if guidance_scale is not None and not (of.covariates and math.isfinite(guidance_scale)):
        raise UserError(
            f"guidance_scale: got {guidance_scale}, allowed are finite numbers, for a model with covariates"
        )
    vae = pipeline.vae.config
    if vae.latent_shape != pipeline.latent_shape:
        raise UserError(
            f"pipeline: its autoencoder makes latents {vae.latent_shape}, allowed are {pipeline.latent_shape}, as its"
            " UNet takes"
        )
