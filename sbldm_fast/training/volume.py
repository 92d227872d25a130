"""The third stage: layers that mix the slices of a volume, trained alone on windows of consecutive slices.

The 2-D network stays as it is, so that without its neighbours a slice is what it was, to the bit. The noise of a window
is that of a volume in sampling (`sampling.field`). Source: Zhu et al. 2023, arXiv:2307.10094, section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbldm_fast.data import Slices
from sbldm_fast.diffusion import SchedulerConfig
from sbldm_fast.errors import UserError
from sbldm_fast.models import UNet2D
from sbldm_fast.models.slices import MIXING
from sbldm_fast.models.weights import digest_weights
from sbldm_fast.sampling.field import node_weights, to_slices
from sbldm_fast.sampling.pipeline import Pipeline

from . import checkpoint, conditions
from .autoencoder import encode_splits, refuse_misfits
from .config import TrainConfig
from .ranks import Ranks
from .run import Context, Stage, train
from .stages import Told, condition_values, digest_data, find_splits, noise_levels, refuse_a_run
from .step import LossOf

LENGTHS = (32, 16, 8, 8)  # slices of the windows in each part of a batch
PART = sum(LENGTHS)
JUDGED = 16 * PART  # slices that the validation loss is taken on


@dataclass(frozen=True)
class Windows:
    """Volumes of which windows are cut: scaled latents and what is told of them, and of each slice how many of its
    volume follow on it, itself counted, and lie below it, `[N]`, and the distance of its volume's slices, mm."""

    told: Told
    after: Tensor
    before: Tensor
    spacing: Tensor

    @classmethod
    def of(cls, told: Told, volumes: Sequence[tuple[Tensor, float]]) -> Windows:
        """Those of volumes, each with its slices' places in `told`, from the bottom up, and their distance.

        Raises:
            UserError: none has as many slices as the longest window.
        """
        kept = [(index, mm) for index, mm in volumes if len(index) >= max(LENGTHS)]
        if not kept:
            longest = max((len(index) for index, _ in volumes), default=0)
            raise UserError(
                f"data: its longest volume has {longest} slices that follow on one another, allowed is one of"
                f" {max(LENGTHS)} or more"
            )
        order = torch.cat([index for index, _ in kept])
        values = None if told.values is None else told.values[order]
        after = torch.cat([torch.arange(len(index), 0, -1) for index, _ in kept])
        before = torch.cat([torch.arange(len(index)) for index, _ in kept])
        spacing = torch.cat([torch.full((len(index),), mm) for index, mm in kept])
        return cls(Told(told.latents[order], values), after, before, spacing)

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        values = None if self.told.values is None else self.told.values.to(device)
        told = Told(self.told.latents.to(device), values)
        return Windows(told, self.after.to(device), self.before.to(device), self.spacing.to(device))

    def cut(self, starts: Tensor) -> Tensor:
        """The slices of windows that begin at `starts` `[4 n]`, or as near before as the volume is long enough:
        `[64 n]`."""
        of, number, lengths = places(len(starts), starts.device)
        return (starts - (lengths - self.after[starts]).clamp(min=0))[of] + number


@functools.cache  # what is made on a CPU cannot be captured
def places(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slice of `count` windows, the window and the number in it, `[N]`; and the windows' lengths."""
    lengths = LENGTHS * (count // len(LENGTHS))
    of = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    number = torch.cat([torch.arange(n) for n in lengths])
    return of.to(device), number.to(device), torch.tensor(lengths, device=device)


def volume_loss(windows: Windows, scheduler: SchedulerConfig, ranks: Ranks, mixed: bool = True) -> LossOf:
    """The squared error of the prediction on windows of consecutive slices, each at one time and under one noise field.

    An item is a slice: with the first four of 64 begin windows that have 64 slices together.
    """
    device = windows.told.latents.device
    alphas_cumprod, first = noise_levels(scheduler, device)
    T = scheduler.num_train_timesteps
    spacings = windows.spacing.unique()
    table = mixtures(spacings.tolist()).to(device)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        starts = index[: len(index) // PART * len(LENGTHS)] % len(windows.spacing)
        count = len(starts)
        t = torch.randint(T, (count,), device=device)
        normals = torch.randn(count, 1 + table.shape[2], *windows.told.latents.shape[1:], device=device)
        draws = None
        if windows.told.values is not None:
            draws = torch.rand(count, 1 + windows.told.values.shape[1], device=device)
        starts, t, normals = ranks.own(starts), ranks.own(t), ranks.own(normals)
        at = windows.cut(starts)
        of, number, _ = places(len(starts), device)
        made_of = table.index_select(0, (windows.spacing[starts][:, None] == spacings).int().argmax(1))
        own = (made_of[of, number][:, None] @ normals[of, 1:].flatten(2)).view(len(of), *normals.shape[2:])
        e = to_slices(normals[of, 0], own)
        cond: tuple[Any, ...] = (None,)
        if draws is not None and windows.told.values is not None:
            cond = (conditions.drop(windows.told.values[at], ranks.own(draws)[of]),)
        t = t[of]
        z_t, target = noised(windows.told.latents[at], e, alphas_cumprod[t], scheduler.prediction_type)
        made = model(z_t, t + first if first else t, *cond, number.float() if mixed else None).float()
        return (made - target).square().mean(), {}

    return loss_of


def mixtures(spacings: Sequence[float]) -> Tensor:
    """How the slices of the longest window are made of normals, at each distance in mm: `[len(spacings), 32, J]`."""
    found = [node_weights([mm * i for i in range(max(LENGTHS))])[0] for mm in spacings]
    most = max(w.shape[1] for w in found)
    return torch.stack([F.pad(w, (0, most - w.shape[1])) for w in found])


def noised(z0: Tensor, e: Tensor, a: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """z_t and the target for noise `e` at levels `a` `[N]`, as `diffuse` defines them for noise that it draws."""
    a = a[:, None, None, None]
    if prediction_type == "flow_prediction":
        return a * z0 + (1 - a) * e, e - z0
    root_a, root_b = a.sqrt(), (1 - a).sqrt()
    targets = {"epsilon": e, "sample": z0, "v_prediction": root_a * e - root_b * z0}
    return root_a * z0 + root_b * e, targets[prediction_type]


def train_layers(
    unet: UNet2D, windows: dict[str, Windows], scheduler: SchedulerConfig, config: TrainConfig, context: Context
) -> UNet2D:
    """Train the mixing layers in place, nothing else; return the EMA."""
    for name, p in unet.named_parameters():
        p.requires_grad_(bool(MIXING.search(name)))
    held_out = windows.get("val")

    def validate(model: nn.Module) -> float:
        assert held_out is not None
        return windows_error(model, held_out, scheduler)

    stage = Stage(
        "volume",
        unet,
        volume_loss(windows["train"], scheduler, context.ranks),
        max(len(windows["train"].spacing), config.batch_size),  # of few slices some begin two windows of a batch
        validate=None if held_out is None else validate,
        settings={"unet": unet.config.to_dict(), "scheduler": scheduler.to_dict()},
    )
    trained = train(stage, config, context)
    assert isinstance(trained, UNet2D)
    return trained


@torch.no_grad()
def windows_error(model: nn.Module, windows: Windows, scheduler: SchedulerConfig, mixed: bool = True) -> float:
    """The loss on windows that are spread over the volumes, the same noise each time; or without mixing."""
    model.eval()
    loss_of, device = volume_loss(windows, scheduler, Ranks(), mixed), windows.spacing.device
    torch.manual_seed(0)
    index = torch.linspace(0, len(windows.spacing) - 1, JUDGED, device=device).long()
    return float(torch.stack([loss_of(model, part, part[:1])[0] for part in index.split(PART)]).mean())


def train_volume(
    pipeline: Pipeline,
    data: str | Path,
    folder: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Give a pipeline's UNet layers that mix slices along z, train them on the volumes of a prepared folder, and save
    the pipeline to `folder/pipeline`.

    Args:
        pipeline: on the device to train on; all but the layers stays as it is, those that are there are trained on.
        data: a folder that `prepare` wrote, of scans; their slices without a gap are volumes.
        folder: for the log, the checkpoints, the latents and the pipeline.
        config: how the layers are trained; a batch is a multiple of 64 slices, windows of 32, 16, 8 and 8.
        resume: go on with the run in `folder`, if there is one; the result is that of an uninterrupted run.
        progress: whether bars are shown.

    Returns:
        The volumes and slices that were trained on, and the error of the prediction on windows of the validation split
        (of the training split where there is none), `error`, and of the same without their neighbours, `error_2d`.

    Raises:
        UserError: a distilled network, which knows no other timesteps than its own; a batch that is no multiple; no
            volume of 32 slices; an autoencoder that does not fit the slices or the UNet; as `train_pipeline`.
        NotFinite: a loss or gradient that is not finite.
        Stopped: on a signal.
    """
    folder, ranks = Path(folder), Ranks.of_torchrun()
    _check(pipeline, config, ranks)
    refuse_a_run(folder, resume)
    slices = find_splits(data)
    refuse_misfits(pipeline.vae.config, slices["train"])
    volumes = {split: _volumes(one) for split, one in slices.items()}
    Windows.of(Told(torch.empty(len(slices["train"]))), volumes["train"])  # refuses before anything is encoded
    made_of = {"data": digest_data(data), "pipeline": digest_weights(pipeline.vae, pipeline.unet)}
    context = Context(folder, ranks, made_of, progress)
    device = next(pipeline.unet.parameters()).device
    with checkpoint.name_last_checkpoint(folder):
        windows = {k: w.to(device) for k, w in _encode_windows(pipeline, slices, config.seed, context).items()}
        unet = UNet2D(replace(pipeline.unet.config, slice_mixing=True)).to(device)
        unet.load_state_dict(pipeline.unet.state_dict(), strict=pipeline.unet.config.slice_mixing)
        scheduler, judged = pipeline.scheduler.config, windows.get("val", windows["train"])
        trained = train_layers(unet, windows, scheduler, config, context)
        if ranks.rank == 0:
            Pipeline(pipeline.vae, trained, pipeline.scheduler).save(folder / "pipeline")
    return {
        "volumes": int((windows["train"].before == 0).sum()),
        "slices": len(windows["train"].before),
        "error": windows_error(trained, judged, scheduler),
        "error_2d": windows_error(trained, judged, scheduler, mixed=False),
    }


def _encode_windows(pipeline: Pipeline, slices: dict[str, Slices], seed: int, context: Context) -> dict[str, Windows]:
    """The windows of each split; of a validation split without a long volume there are none."""
    latents = encode_splits(pipeline.vae, slices, 1, seed, context)
    values = condition_values(pipeline.unet.config.covariates, slices, latents)
    windows = {}
    for split, one in slices.items():
        told, volumes = Told(latents[split] * pipeline.vae.config.scaling_factor, values.get(split)), _volumes(one)
        with suppress(UserError):
            windows[split] = Windows.of(told, volumes)
    return windows


def _volumes(slices: Slices) -> list[tuple[Tensor, float]]:
    """The volumes of a split, and the distance of the slices of each, mm."""
    found = []
    for index in slices.volumes:
        low, high = (float(slices.rows[int(i)]["position_mm"]) for i in (index[0], index[-1]))
        found.append((index, round((high - low) / (len(index) - 1), 2)))
    return found


def _check(pipeline: Pipeline, config: TrainConfig, ranks: Ranks) -> None:
    """Refuse, as `UserError`, what would be found out after the slices are encoded."""
    if not isinstance(pipeline.scheduler.config, SchedulerConfig):
        got = type(pipeline.scheduler).__name__
        raise UserError(f"scheduler: got another library's {got}, allowed is one of ours")
    if steps := pipeline.unet.config.distilled_steps:
        raise UserError(
            f"pipeline: got a network that was distilled for {steps} calls, allowed is its teacher: the layers learn"
            " at all timesteps"
        )
    if config.batch_size % (PART * ranks.size):
        raise UserError(
            f"batch_size: got {config.batch_size}, allowed are multiples of {PART * ranks.size}: {PART} slices for each"
            " process"
        )
