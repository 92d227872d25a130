"""The ablations that 000 leaves blank: settings times seeds, each trained, sampled and compared with unseen slices.

Within a table all have the same budget: the schedules and losses the same steps on the same latents, the methods of
section 4.5 the seconds that ours took. A row is written when its run ends; the same command makes the missing rows, and
begins anew with the one that was cut off. torchrun gives each process seeds of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sbldm_fast.data import Slices
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.diffusion import DDIMScheduler, SchedulerConfig
from sbldm_fast.files import read_json, whole_file, write_json
from sbldm_fast.images import save_grid, to_uint8
from sbldm_fast.machine import default_device, environment, native_half, torchrun_number
from sbldm_fast.models import AutoencoderKL, UNet2D
from sbldm_fast.models.presets import Preset
from sbldm_fast.sampling import FastSampler
from sbldm_fast.training import Objective, TrainConfig
from sbldm_fast.training.autoencoder import encode, train_vae
from sbldm_fast.training.run import Context
from sbldm_fast.training.stages import Told, train_unet

from ..errors import MissingExtra, UserError
from .ablation_tables import render_tables
from .distribution import compare
from .features import DEFAULT, extract
from .gan import train_gan
from .metrics import mean_and_std, pairs_of, psnr, ssim
from .settings import BOTH, LEAST_SEEDS, STEPS, TABLES, Budget, Setting

SHOWN = 24  # samples of a row that are kept as a picture
TRIED = 8  # steps that a method's pace is measured by


class _Reduced(Slices):
    """Slices of another side, as means of areas, in memory."""

    def __init__(self, folder: str | Path, split: str, side: int) -> None:
        super().__init__(folder, split)
        if self.size[0] != self.size[1]:
            raise UserError(f"data: got slices of {self.size[1]} x {self.size[0]} pixels, allowed are squares")
        if self.array.shape[-1] % side:
            raise UserError(f"size: got {side}, allowed are divisors of {self.array.shape[-1]}")
        self.size, self.spacing = (side, side), self.spacing * (self.size[0] // side)
        chunks = [F.adaptive_avg_pool2d(self[i], side)[:, 0] for i in torch.arange(len(self)).split(256)]
        self.array, self.index = torch.cat(chunks).half(), torch.arange(len(self))


def ablate(
    preset: Preset,
    data: str | Path,
    out: str | Path,
    budget: Budget,
    *,
    tables: Sequence[str] = tuple(TABLES),
    seeds: int = LEAST_SEEDS,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Make the missing rows of the tables in `out/rows/`, then `out/tables.md` of all; return the rows.

    Raises:
        ValueError: an unknown table, fewer than 3 seeds, a conditional preset, data without unseen slices, or rows in
            `out` of another budget or of other data.
    """
    if unknown := [t for t in tables if t not in TABLES]:
        raise UserError(f"tables: got {unknown[0]!r}, allowed are {', '.join(TABLES)}")
    if seeds < LEAST_SEEDS:
        raise UserError(f"seeds: got {seeds}, allowed is {LEAST_SEEDS} or more: fewer have no spread to speak of")
    if preset.unet.covariates:
        raise UserError("preset: got a conditional one, allowed are unconditional ones: 000 conditions on nothing")
    if budget.prediction_type == "flow_prediction":
        raise UserError("prediction_type: got flow_prediction, allowed are those with betas, which the tables compare")
    read_manifest(data)
    digest = hashlib.sha256((Path(data) / "manifest.json").read_bytes()).hexdigest()[:12]
    if "4.5" in tables and importlib.util.find_spec("monai") is None:  # now, and not after hours
        raise MissingExtra("the GAN of table 4.5", "monai", "bench")
    budget = replace(budget, data=digest)
    rows_folder, kept = Path(out) / "rows", Path(out) / "budget.json"
    if kept.exists() and (there := read_json(kept)) != asdict(budget):
        name = next(k for k, v in asdict(budget).items() if there.get(k) != v)
        raise UserError(
            f"{out} was made with {name} {there.get(name)!r}, got {asdict(budget)[name]!r}; allowed is another folder"
        )
    bench = _Bench(preset, data, Path(out), budget)
    write_json(kept, asdict(budget))
    # ours before the methods that get its seconds
    first = [BOTH] if "4.5" in tables else []
    wanted = list(dict.fromkeys([*first, *(s for t in tables for s in TABLES[t].values())]))
    size = torchrun_number("WORLD_SIZE", 1, 1, 4096)
    rank = torchrun_number("RANK", 0, 0, size - 1)
    todo = [(seed, setting) for seed in range(rank, seeds, size) for setting in wanted]
    for seed, setting in tqdm(todo, "ablate", unit="run", disable=not progress):
        path = rows_folder / f"{_name(setting)}-{seed}.json"
        if not path.exists():
            write_json(path, bench.run(setting, seed))
    rows = [read_json(path) for path in sorted(rows_folder.glob("*.json"))]
    with whole_file(Path(out) / "tables.md") as aside:
        aside.write_text(render_tables(rows))
    with whole_file(Path(out) / "rows.jsonl") as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _name(setting: Setting) -> str:
    return hashlib.sha256(json.dumps(asdict(setting)).encode()).hexdigest()[:10]


class _Bench:
    """What the runs share: slices, the autoencoder of each seed, the features of unseen slices."""

    def __init__(self, preset: Preset, data: str | Path, out: Path, budget: Budget) -> None:
        self.budget, self.out, self.device = budget, out, default_device()
        self.train = _Reduced(data, "train", budget.side)
        unseen = _unseen(data, budget.side, 2 * budget.samples)
        if len(unseen) < budget.samples:
            raise UserError(f"samples: got {budget.samples}, allowed are as many as unseen slices, {len(unseen)}")
        self.real = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))[: budget.samples]]
        self.features = extract(DEFAULT, self.real)
        some = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1))[: budget.samples]
        near = compare(extract(DEFAULT, self.train[some]), self.features)
        keys = ("samples", "kid", "frechet_distance", "precision", "recall")
        self.floor = {k: near[k] for k in keys} | self._unpaired(self.train[some], 0)
        vae = replace(preset.vae, sample_size=budget.side)
        shrink = preset.vae.size[0] // vae.size[0]
        sides = tuple(max(1, r // shrink) for r in preset.unet.attention_resolutions)
        widths = tuple(w // budget.narrow for w in preset.unet.block_out_channels)
        if any(
            w % budget.narrow or w // budget.narrow % preset.unet.norm_num_groups
            for w in preset.unet.block_out_channels
        ):
            raise UserError(
                f"narrow: got {budget.narrow}, allowed is what leaves of the widths {preset.unet.block_out_channels}"
                f" multiples of {preset.unet.norm_num_groups}"
            )
        head = min(preset.unet.attention_head_dim, *widths)
        unet = replace(
            preset.unet,
            sample_size=vae.latent_size,
            attention_resolutions=sides,
            block_out_channels=widths,
            attention_head_dim=head,
        )
        self.preset = preset._replace(vae=vae, unet=unet)
        self.vaes: dict[int, tuple[AutoencoderKL, Tensor, float]] = {}

    def clock(self) -> float:
        """Seconds of work: those of the processor, which other work beside it does not lengthen, or those of a CUDA
        device."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.monotonic()

    def autoencoder(self, seed: int) -> tuple[AutoencoderKL, Tensor, float]:
        """The trained autoencoder of a seed, its scaled latents and the seconds that both took."""
        if seed not in self.vaes:
            folder = self.out / f"vae-{seed}"
            spent = folder / "seconds.json"
            if not spent.exists():  # one that was cut off would have the seconds of its last part
                shutil.rmtree(folder, ignore_errors=True)
            start = self.clock()
            torch.manual_seed(seed)
            vae = AutoencoderKL(self.preset.vae).to(self.device)
            config = TrainConfig(self.budget.vae_steps, self.budget.batch_size, 1e-3, warmup=50, seed=seed)
            train_vae(vae, self.train, config, Context(folder, progress=False), recon="l1")
            latents, _ = encode(vae, self.train, 1, seed, progress=False)
            factor = float(1 / latents.std())
            vae.config = replace(vae.config, scaling_factor=factor)
            if not spent.exists():
                write_json(spent, {"seconds": self.clock() - start})
            self.vaes = {seed: (vae, (latents * factor).contiguous(), read_json(spent)["seconds"])}
        return self.vaes[seed]

    def run(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Train, sample, compare: a row."""
        folder = self.out / f"run-{_name(setting)}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # cut off, it begins again, so that its seconds are all of them
        make = {"ours": self._latent, "vae": self._prior, "gan": self._gan, "pixels": self._pixels}[setting.method]
        images, told = make(setting, seed, folder)
        shutil.rmtree(folder, ignore_errors=True)
        found = compare(extract(DEFAULT, images), self.features)
        save_grid(to_uint8(images[:SHOWN]), self.out / "samples" / f"{_name(setting)}-{seed}.png", columns=8)
        return {
            "setting": asdict(setting),
            "seed": seed,
            **told,
            **found,
            **self._unpaired(images, seed),
            "floor": self.floor,
            "budget": asdict(self.budget),
            "machine": environment()["cpu"],
            "threads": torch.get_num_threads(),
            "arithmetic": str(native_half(self.device) or torch.float32).removeprefix("torch."),
        }

    def _unpaired(self, images: Tensor, seed: int) -> dict[str, float]:
        """What 001 and 000 print of samples, which have no originals: each beside some unseen slice."""
        first, second = pairs_of(len(images), seed)
        real = self.real[: len(images)]
        return {
            "ssim_unpaired": mean_and_std(ssim(images, real))["mean"],
            "psnr_unpaired": mean_and_std(psnr(images, real))["mean"],
            "rms_between_samples": float((images[first] - images[second]).square().mean((1, 2, 3)).sqrt().mean()),
        }

    def _scheduler(self, setting: Setting) -> SchedulerConfig:
        of: dict[str, Any] = {"beta_schedule": setting.beta_schedule, "gamma": setting.gamma}
        clip = setting.method == "pixels"  # pixels are in [-1, 1], latents are not
        return SchedulerConfig(**of, clip_sample=clip, prediction_type=self.budget.prediction_type)

    def _train(self, unet: UNet2D, z: Tensor, setting: Setting, seed: int, steps: int, folder: Path) -> UNet2D:
        config = TrainConfig(
            steps, self.budget.batch_size, 5e-4, warmup=min(200, steps // 10), ema_decay=0.999, seed=seed
        )
        objective = Objective(setting.low_weight, setting.high_weight, setting.cutoff)
        return train_unet(
            unet, Told(z), self._scheduler(setting), config, Context(folder, progress=False), objective=objective
        )

    def _sample(self, unet: UNet2D, setting: Setting, seed: int, vae: AutoencoderKL | None) -> tuple[Tensor, float]:
        """The images and seconds an image."""
        scheduler = DDIMScheduler.from_config(self._scheduler(setting))
        sampler = FastSampler(unet, scheduler, shape=unet.config.shape, steps=STEPS, mode="eager")
        start = self.clock()
        z = sampler(self.budget.samples, seed=seed, batch_size=50)
        with torch.no_grad():
            images = z if vae is None else torch.cat([vae.decode(p / vae.config.scaling_factor) for p in z.split(50)])
        return images.clamp(-1, 1).cpu(), (self.clock() - start) / len(images)

    def _latent(self, setting: Setting, seed: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
        vae, z, before = self.autoencoder(seed)
        torch.manual_seed(seed)
        unet, start = UNet2D(self.preset.unet).to(self.device), self.clock()
        unet = self._train(unet, z, setting, seed, self.budget.steps, folder)
        seconds = self.clock() - start
        images, each = self._sample(unet, setting, seed, vae)
        told = {"parameters": _count(vae) + _count(unet), "steps": self.budget.steps, "seconds_an_image": each}
        return images, told | {"training_seconds": before + seconds}

    def _prior(self, setting: Setting, seed: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
        """The decoder under a Gaussian fitted to each value of the latents: at beta 1e-5 they are not N(0, 1)."""
        vae, z, seconds = self.autoencoder(seed)
        generator, start = torch.Generator().manual_seed(seed), self.clock()
        noise = torch.randn(self.budget.samples, *z.shape[1:], generator=generator).to(z.device)
        drawn = z.mean(0) + z.std(0) * noise
        with torch.no_grad():
            images = torch.cat([vae.decode(p / vae.config.scaling_factor) for p in drawn.split(50)]).cpu()
            each = (self.clock() - start) / len(images)
            back = torch.cat([vae.decode(vae.encode(p.to(self.device)).mean) for p in self.real.split(50)]).cpu()
        told = {"parameters": _count(vae), "steps": self.budget.vae_steps, "seconds_an_image": each}
        made = {
            "ssim_reconstruction": float(ssim(back, self.real).mean()),
            "psnr_reconstruction": float(psnr(back, self.real).mean()),
        }
        return images, told | made | {"training_seconds": seconds}

    def _seconds(self, seed: int) -> float:
        """What ours took with this seed."""
        return float(read_json(self.out / "rows" / f"{_name(BOTH)}-{seed}.json")["training_seconds"])

    def _gan(self, setting: Setting, seed: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
        made = train_gan(self.train, self._seconds(seed), self.budget.batch_size, seed, self.clock, self.device)
        start = self.clock()
        images = made.sample(self.budget.samples, seed)
        each = (self.clock() - start) / len(images)
        told = {"parameters": made.parameters, "steps": made.steps, "seconds_an_image": each}
        return images, told | {"training_seconds": made.seconds}

    def _pixels(self, setting: Setting, seed: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
        """The UNet with two levels more and one layer a block, without attention but in the middle, on pixels, for the
        seconds of ours."""
        side = self.budget.side
        narrow = self.preset.unet.block_out_channels[0]
        unet_config = replace(
            self.preset.unet,
            sample_size=side,
            in_channels=1,
            out_channels=1,
            block_out_channels=(narrow, narrow, *self.preset.unet.block_out_channels),
            layers_per_block=1,
            attention_resolutions=(),
        )
        images = self.train[torch.arange(len(self.train))]

        def start() -> UNet2D:
            torch.manual_seed(seed)
            return UNet2D(unet_config).to(self.device)

        spent = []
        for tried in (TRIED, 3 * TRIED):  # their difference leaves out what a run begins and ends with
            begun = self.clock()
            self._train(start(), images, setting, seed, tried, folder / f"tried-{tried}")
            spent.append(self.clock() - begun)
        steps = max(TRIED, int(self._seconds(seed) * 2 * TRIED / (spent[1] - spent[0])))
        unet, begun = start(), self.clock()
        unet = self._train(unet, images, setting, seed, steps, folder / "run")
        seconds = self.clock() - begun
        made, each = self._sample(unet, setting, seed, None)
        told = {"parameters": _count(unet), "steps": steps, "seconds_an_image": each}
        return made, told | {"training_seconds": seconds}


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _unseen(data: str | Path, side: int, most: int) -> Tensor:
    """Validation and test slices, at most so many of each."""
    found = []
    for split in ("val", "test"):
        try:
            held = _Reduced(data, split, side)
        except UserError as error:
            if "is empty" not in str(error):
                raise
            continue
        found.append(held[torch.linspace(0, len(held) - 1, min(most, len(held))).long()])
    if not found:
        raise UserError(f"{data} has neither validation nor test slices: nothing to compare samples with")
    return torch.cat(found)
