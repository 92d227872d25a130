"""From checkpoint to images."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from sbldm_fast.diffusion import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from sbldm_fast.diffusion.schedulers import FILE
from sbldm_fast.files import read_json, whole_folder, write_json
from sbldm_fast.models import AutoencoderKL, SchedulerConfig, UNet2D

from ..errors import UserError
from .content import fingerprint
from .request import whole_number
from .sampler import MAX_LOOPS, FastSampler
from .volume import find_positions, sample_volume

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}
OWN: dict[str, Any] = {kind.__name__: kind for name, kind in SCHEDULERS.items() if name != "dpm"}
UNIPC: dict[str, Any] = {"timestep_spacing": "trailing", "solver_order": 3}  # the best of benchmarks/LOG.md 39
FEW, MANY = 12, 50  # model calls: by 12 UniPC's RMS from the converged images is below DDIM's by 50 (the same entry)
DEMO = Path(__file__).parents[1] / "assets" / "demo"
BUNDLED = {"demo": DEMO, "demo-student": DEMO / "student"}


class Pipeline:
    """An autoencoder, a UNet and a noise schedule: what makes images.

    Saved as a folder in diffusers' layout: `model_index.json`, `vae/`, `unet/`, `scheduler/`. The three are attributes
    that may be changed or replaced: the next call samples with what is there. Threads may share a pipeline.

    `scheduler` is one of ours, or the configuration of a noise schedule: then UniPC, but DDIM where x0 is clipped, or
    on the timesteps that a distilled network knows.

    Raises:
        ValueError: a part of another library; `FastSampler` takes those.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet2D, scheduler: Any) -> None:
        for name, part, kind in (
            ("vae", vae, AutoencoderKL),
            ("unet", unet, UNet2D),
            ("scheduler", scheduler, SchedulerConfig),
        ):
            if not isinstance(part, kind) and not (name == "scheduler" and type(part) in OWN.values()):
                got = f"{type(part).__module__.partition('.')[0]}'s {type(part).__name__}"
                raise UserError(
                    f"{name}: got {got}, allowed is sbldm_fast's {kind.__name__}; FastSampler(unet, scheduler,"
                    " shape=...) takes others"
                )
        self.vae, self.unet = vae, unet
        self.scheduler = _default_scheduler(scheduler, unet) if isinstance(scheduler, SchedulerConfig) else scheduler
        self._samplers: dict[tuple[object, ...], FastSampler] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_samplers": {}, "_lock": None}  # a copy has models of its own, and no samplers yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> Self:
        """The bundled weights `"demo"`, their student of few calls `"demo-student"`, or a folder that `save` wrote; one
        without `vae/` has that of the folder that it lies in.

        Raises:
            ValueError: no such folder, or a file in it that is missing, pickled or does not fit its config.
        """
        folder = find_folder(name_or_folder)
        shared = (folder if (folder / "vae").exists() else folder.parent) / "vae"
        vae, unet = AutoencoderKL.from_pretrained(shared), UNet2D.from_pretrained(folder / "unet")
        content = read_json(folder / "scheduler" / FILE)
        kind = OWN.get(str(content.get("_class_name")))
        if kind is None:  # of diffusers: its noise schedule is read
            return cls(vae, unet, DDIMScheduler.from_config(content).config)
        return cls(vae, unet, kind.from_config(content))

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder, whole or not at all; weights in `dtype` if one is given.

        Raises:
            ValueError: a folder that holds something else than a pipeline that `save` wrote, or a scheduler that
                `from_pretrained` would not give back.
        """
        if type(self.scheduler) not in OWN.values():
            got = type(self.scheduler).__name__
            raise UserError(f"scheduler: got {got}, allowed to be saved are ours: {', '.join(OWN)}")
        there, path = sorted(p.name for p in Path(folder).glob("*")), Path(folder) / "model_index.json"
        if there and (not path.is_file() or read_json(path).get("_class_name") != "Pipeline"):
            raise UserError(
                f"{folder} holds {there[0]}, which would be lost; allowed is a new folder or one that save wrote"
            )
        with whole_folder(folder) as aside:
            self.vae.save_pretrained(aside / "vae", dtype)
            self.unet.save_pretrained(aside / "unet", dtype)
            self.scheduler.save_pretrained(aside / "scheduler")
            parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
            index = {name: ["sbldm_fast", type(part).__name__] for name, part in parts.items()}
            write_json(aside / "model_index.json", {"_class_name": "Pipeline", **index})

    def to(self, device: torch.device | str) -> Self:
        """Move the models; samplers are built anew."""
        self.vae.to(device)
        self.unet.to(device)
        self._samplers.clear()
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of one latent."""
        return self.unet.config.shape

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `[N, C, h, w]` to images in [-1, 1]."""
        return self.vae.decode(z / self.vae.config.scaling_factor)

    @property
    def scheduler_name(self) -> str:
        """The name under which `sampler` would make the pipeline's own solver; that of its class where there is
        none."""
        kind, config = type(self.scheduler), self.scheduler.config
        same = (n for n, of in SCHEDULERS.items() if of is kind and self.named_scheduler(n).config == config)
        return next(same, kind.__name__)

    def default_steps(self, scheduler: Any = None) -> int:
        """The steps of a run where none are asked for: those that a distilled network knows, 12 of UniPC, 50 of any
        other solver."""
        scheduler = self.scheduler if scheduler is None else scheduler
        few = scheduler == "unipc" or type(scheduler).__name__ == UniPCMultistepScheduler.__name__  # or diffusers'
        return self.unet.config.distilled_steps or (FEW if few else MANY)

    def sampler(
        self,
        steps: int | None = None,
        mode: str = "auto",
        *,
        scheduler: Any = None,
        eta: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> FastSampler:
        """The sampler from noise to images; kept, so that a second call neither compiles nor captures again.

        `steps`: None is `default_steps`. `scheduler`: `ddim`, `ddpm`, `dpm` or `unipc` on the pipeline's schedule,
        `flow` of a model that predicts it, or any scheduler object; None: the pipeline's own. `dpm` and `unipc` begin
        at t = T - 1: begun where `leading` begins, more steps are no better.

        Raises:
            ValueError: an unknown name, and as `FastSampler`.
        """
        # a sampler that is kept keeps it: the id is not given again
        who: object = id(self.scheduler if scheduler is None else scheduler)
        if isinstance(scheduler, str):
            if scheduler not in SCHEDULERS:
                raise UserError(f"scheduler: got {scheduler!r}, allowed are {', '.join(SCHEDULERS)}")
            scheduler, name = self.named_scheduler(scheduler), scheduler
            who = name, fingerprint(scheduler)
        steps = self.default_steps(scheduler) if steps is None else steps
        key = self.unet, steps, mode, who, eta, dtype
        with self._lock:
            if key not in self._samplers:
                if len(self._samplers) == MAX_LOOPS:
                    self._samplers.pop(next(iter(self._samplers)))
                self._samplers[key] = FastSampler(
                    self.unet,
                    self.scheduler if scheduler is None else scheduler,
                    shape=self.latent_shape,
                    steps=steps,
                    mode=mode,
                    dtype=dtype,
                    eta=eta,
                    decode=self.decode,
                )
            return self._samplers[key]

    def named_scheduler(self, name: str) -> Any:
        """The solver of a name on the pipeline's schedule; of a distilled network `ddim` is its own."""
        c = self.scheduler.config
        if self.unet.config.distilled_steps and name == "ddim":
            return _default_scheduler(c, self.unet)
        options = UNIPC if name == "unipc" else {"timestep_spacing": "trailing"} if name == "dpm" else {}
        if not options and isinstance(self.scheduler, UniPCMultistepScheduler):  # whose spacing is not theirs
            options = {"timestep_spacing": "leading"}
        return SCHEDULERS[name].from_config(c, **options)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        mode: str = "auto",
        scheduler: Any = None,
        eta: float | None = None,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        extrapolate: bool = False,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Tensor:
        """Images `[n, 1, H, W]` in [-1, 1], on the CPU. Synthetic, not for diagnosis.

        Image i depends on `seed`, i and its condition alone, to rounding, whatever the batch size or the device.
        `cond={"age": 70, "modality": ["T1", "T2"]}` names covariates of `unet.config`, a value for all images or one
        for each; it and the arguments after it are those of `FastSampler`.

        Raises:
            ValueError: as `FastSampler`, or a batch size below 1.
        """
        n, batch_size = whole_number("n", n, 1), whole_number("batch_size", batch_size, 1)
        sampler, size = self.sampler(steps, mode, scheduler=scheduler, eta=eta, dtype=dtype), even_batch(n, batch_size)
        batches = tqdm(
            sampler.stream(
                n,
                seed=seed,
                cond=cond,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                extrapolate=extrapolate,
                batch_size=size,
            ),
            desc="sample",
            unit="batch",
            total=math.ceil(n / size),
            disable=not progress,
        )
        return torch.cat([batch.cpu() for batch in batches])[:n]

    def sample_volume(
        self,
        slices: int | None = None,
        *,
        positions: Sequence[float] | Tensor | None = None,
        seed: int = 0,
        steps: int | None = None,
        mode: str = "auto",
        scheduler: Any = None,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        extrapolate: bool = False,
        window: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The slices `[D, 1, H, W]` of one volume from the bottom up, in [-1, 1], on the CPU. Synthetic, not for
        diagnosis.

        Neighbours begin from noise that is much the same, one field along z for a seed; a network with `slice_mixing`
        also lets them see each other at every step. Without, each is still the slice that the network would make.

        Args:
            slices: how many.
            positions: where they lie, mm; None: all over the range that the model knows of `position`, `slices` of
                them, or one every 2 mm.
            window: slices at a time; None: all. A longer volume is made in overlapping windows of one field.
            seed, steps, mode, scheduler, dtype, cond, guidance_scale, guidance_interval, extrapolate: as of `sample`.
            progress: whether a bar is shown.

        Raises:
            ValueError: positions that do not rise by one distance; a scheduler with noise in its steps; as `sample`.
            MemoryError: out of memory, with the largest window that fits.
        """
        found = find_positions(self.unet.config.covariates, slices, positions)
        given: dict[str, Any] = {"cond": cond, "guidance_scale": guidance_scale, "extrapolate": extrapolate}
        given["guidance_interval"] = guidance_interval
        sampler = self.sampler(steps, mode, scheduler=scheduler, dtype=dtype)
        bar = partial(tqdm, desc="sample", unit="window", disable=not progress)
        return sample_volume(sampler, found, whole_number("seed", seed, 0), window, given, bar)


def _default_scheduler(config: SchedulerConfig, unet: UNet2D) -> Any:
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if unet.config.distilled_steps:
        return DDIMScheduler.from_config(config, timestep_spacing="trailing", prev="lookup")
    if config.clip_sample:  # UniPC, here and in diffusers, would not
        return DDIMScheduler.from_config(config)
    return UniPCMultistepScheduler.from_config(config, **UNIPC)


def find_folder(name_or_folder: str | Path) -> Path:
    """The folder of a pipeline; refuses, as `UserError`, what is none."""
    folder = BUNDLED.get(str(name_or_folder), Path(name_or_folder))
    if folder.is_file():
        raise UserError(f"{folder} is a file, allowed is a pipeline folder (safetensors only, no pickle is ever read)")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is not a pipeline folder: it has no model_index.json; allowed are {', '.join(BUNDLED)} or a"
            " folder"
        )
    return folder


def even_batch(n: int, batch_size: int) -> int:
    """The size of as many batches as `batch_size` asks for, but equal ones: 17 by 16 are two of 9, with one padded, not
    16 and 1."""
    return math.ceil(n / math.ceil(n / batch_size))
