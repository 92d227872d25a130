"""Seconds a volume: a three-dimensional network in its own library's loop and, untouched, under `FastSampler`.

`monai-brain` is the network of MONAI's bundle `brain_image_synthesis_latent_diffusion_model` (Pinaya et al. 2022,
arXiv:2209.07162) by its published configuration, with random weights: a latent of 3 x 20 x 28 x 20 for 160 x 224 x 160
voxels of 1 mm, four numbers beside it as planes and as a token of cross-attention, DDIM. MONAI's loop is its
`DiffusionInferer`, in half precision under autocast, as its tutorials have it.

`demo-80` and `brain-160` are volumes as `sample_volume` makes them, one batch whose rows are mixed along z: 80
slices of 128 x 128 by preset `demo`, and 160 of 160 x 224 by preset `brain`, as many voxels as `monai-brain` makes,
both with random weights. Decoding has a row of its own: by few steps it is a large part.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import philox_normal
from sbldm_fast.kernels._backend import obstacle
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, FastSampler, Pipeline, UNet2D, preset
from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device, native_half
from sbldm_fast.models.presets import COVARIATES
from sbldm_fast.sampling.field import draw_field
from sbldm_fast.sampling.loop import compilation

from .harness import Absent, Case, Timing, interrupted, measure
from .providers import FLOAT, TOLERANCE, half_suffix
from .rows import Row, head
from .suite_sampling import DTYPES, per_image
from .timing import Output

MONAI = "MONAI DiffusionInferer"
ASKED = (1.0, 0.63, 0.2, 0.5)  # sex, age, ventricles, brain, each in 0 to 1
BUNDLE: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 7,
    "out_channels": 3,
    "num_res_blocks": 2,
    "channels": (256, 512, 768),
    "attention_levels": (False, True, True),
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "resblock_updown": True,
    "num_head_channels": (0, 512, 768),
    "with_conditioning": True,
    "transformer_num_layers": 1,
    "cross_attention_dim": 4,
    "upcast_attention": True,
}
BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205, "clip_sample": False}
# of the same build, for tests
NARROW = {"channels": (32, 64, 64), "num_head_channels": (0, 64, 64), "num_res_blocks": 1}
LATENT, NARROW_LATENT = (3, 20, 28, 20), (3, 8, 8, 4)


class Problem(NamedTuple):
    """What is sampled.

    Attributes:
        shape: of the batch.
        cases: who samples it.
        base: the case that speed-ups are over.
        parameters: of each network.
    """

    shape: tuple[int, ...]
    cases: dict[str, Case]
    base: str
    parameters: dict[str, int]


class Asked(NamedTuple):
    """What a problem is made for: steps of the solver, device, precisions, whether to compile, whether narrow."""

    steps: int
    device: torch.device
    dtypes: Sequence[torch.dtype]
    compiled: bool
    small: bool


class Planes(nn.Module):
    """A network that takes its context beside x, too, as the bundle's own sampler concatenates it at each step."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        planes = context.mT[..., None, None].expand(-1, -1, *x.shape[2:])  # [N, 4, D, H, W] of [N, 1, 4]
        out: Tensor = self.unet(torch.cat([x, planes], dim=1), timesteps, context=context)
        return out


class Bundle:
    """MONAI's network, scheduler and inferer with the noise and the request that all start from."""

    def __init__(self, asked: Asked) -> None:
        nets, schedulers, inferers = (
            importlib.import_module(f"monai.{name}") for name in ("networks.nets", "networks.schedulers", "inferers")
        )
        torch.manual_seed(0)
        unet = nets.DiffusionModelUNet(**BUNDLE | (NARROW if asked.small else {}))
        for module in unet.modules():  # it begins with zeros in its last layers, and would predict zero
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.asked, self.model = asked, Planes(unet).to(asked.device).eval()
        self.scheduler = schedulers.DDIMScheduler(**BETAS)
        self.inferer = inferers.DiffusionInferer(self.scheduler)
        self.noise = philox_normal((1, *(NARROW_LATENT if asked.small else LATENT)), 0, device=asked.device)
        self.context = torch.tensor([[ASKED]], device=asked.device)

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Output:
        """MONAI's loop."""
        device, model = self.asked.device, self.model
        network: Any = torch.compile(model, dynamic=False) if compiled else model
        self.scheduler.set_timesteps(self.asked.steps, device=device)

        def run() -> Tensor:
            with compilation(device), torch.autocast(device.type, dtype, enabled=dtype != FLOAT):
                out: Tensor = self.inferer.sample(self.noise, network, conditioning=self.context, verbose=False)
            return out.float()

        return run

    def ours(self, dtype: torch.dtype, mode: str, fuse: bool) -> Output:
        """The same objects under `FastSampler`."""
        if fuse and (why := obstacle(self.asked.device)):
            raise Absent(why)
        sampler = FastSampler(
            self.model,
            self.scheduler,
            shape=self.noise.shape[1:],
            steps=self.asked.steps,
            mode=mode,
            dtype=dtype,
            fuse=fuse,
        )
        return lambda: sampler(noise=self.noise, cond=self.context)


def brain_of_monai(asked: Asked) -> Problem:
    """The bundle's network in MONAI's loop and in ours."""
    made, cases = Bundle(asked), dict[str, Case]()
    modes = ["eager", *["compile"] * asked.compiled] if asked.device.type == "cpu" else ["eager", "loop-graph"]
    for dtype in asked.dtypes:
        theirs = f"{MONAI}{half_suffix(dtype)}"

        def case(build: Callable[[], Output], family: str, prepares: bool, dtype: torch.dtype = dtype) -> Case:
            about = {"family": family, "decodes": False, "prepares": prepares}
            return Case(build, MONAI, TOLERANCE, f"{MONAI}{half_suffix(dtype)}", dtype=str(dtype)[6:], about=about)

        for compiled in (False, *[True] * asked.compiled):
            cases[f"{theirs}{' torch.compile' * compiled}"] = case(
                partial(made.theirs, dtype, compiled), "peer", compiled
            )
        for mode, fuse in product(modes, (False, True)):
            name = f"MONAI{half_suffix(dtype)} under FastSampler {mode}{' fused norms' * fuse}"
            cases[name] = case(partial(made.ours, dtype, mode, fuse), "drop-in", mode != "eager")
    parameters = {"MONAI": sum(p.numel() for p in made.model.parameters())}
    return Problem(tuple(made.noise.shape), cases, MONAI, parameters)


def slices_of(name: str, count: int, asked: Asked) -> Problem:
    """A volume of slices by the network of a preset, random weights: in one batch mixed along z, the same slices each
    for itself, and decoding."""
    p, device = preset(name), asked.device
    torch.manual_seed(0)
    unet = UNet2D(replace(p.unet, slice_mixing=True, covariates=COVARIATES))
    for parameter in unet.parameters():
        if not parameter.any():  # what begins with zeros would predict zero, or mix nothing
            nn.init.normal_(parameter, std=0.02)
    pipe = Pipeline(AutoencoderKL(p.vae).eval(), unet.eval(), p.scheduler).to(device)
    heights = [2.0 * (i - count / 2) for i in range(4 if asked.small else count)]
    noise = draw_field(heights, 0, pipe.latent_shape, device)
    told = {"age": 60.0, "modality": "T1", "position": [max(-75.0, min(75.0, z)) for z in heights]}
    mixed = told | {"slice": range(len(heights))}
    cases = dict[str, Case]()

    def run(mode: str, dtype: torch.dtype, cond: dict[str, Any]) -> Output:
        sampler = FastSampler(
            pipe.unet,
            pipe.named_scheduler("ddim"),
            shape=pipe.latent_shape,
            steps=asked.steps,
            mode=mode,
            dtype=dtype,
        )
        return lambda: sampler(noise=noise, cond=cond)

    def decode() -> Output:
        vae = pipe.vae

        @torch.no_grad()
        def call() -> Tensor:
            return vae.decode(noise)

        return call

    base = "slices mixed eager"
    modes = ["eager", *["compile"] * asked.compiled] if device.type == "cpu" else ["eager", "loop-graph"]
    for dtype, mode in product(asked.dtypes, modes):
        about = {"family": "ours", "decodes": False, "prepares": mode != "eager"}
        plain = f"{base}{half_suffix(dtype)}"
        cases[f"slices mixed {mode}{half_suffix(dtype)}"] = Case(
            partial(run, mode, dtype, mixed), base, TOLERANCE, plain, dtype=str(dtype)[6:], about=about
        )
        cases[f"slices each for itself {mode}{half_suffix(dtype)}"] = Case(
            partial(run, mode, dtype, told), None, TOLERANCE, dtype=str(dtype)[6:], about=about
        )
    cases["decoding, once"] = Case(
        decode, None, TOLERANCE, about={"family": "ours", "decodes": True, "prepares": False}
    )
    parameters = {"UNet2D": sum(p.numel() for p in unet.parameters())}
    return Problem(tuple(noise.shape), cases, base, parameters)


PROBLEMS: dict[str, Callable[[Asked], Problem]] = {
    "monai-brain": brain_of_monai,
    "demo-80": partial(slices_of, "demo", 80),
    "brain-160": partial(slices_of, "brain", 160),
}


def bench_volumes(
    *,
    preset_name: str | None = None,
    steps: Sequence[int] = (2,),
    rounds: int = 3,
    seconds: float = math.inf,
    compiled: bool = True,
    dtypes: Sequence[str] = (),
    small: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each provider of each of `PROBLEMS` (or of `preset_name`) and number of steps: seconds from noise to
    the latent of a volume, and whether it is the latent of the network's own library.

    `dtypes`: none is float32 and the machine's native half precision; `small`: narrow networks, for tests; the others
    as in `bench_sampling`. A step costs the same whatever their number is, so a few tell what fifty cost.

    Raises:
        ValueError: steps or rounds below 1, an unknown dtype or problem.
    """
    if set(dtypes) - set(DTYPES):
        raise UserError(f"dtypes: got {', '.join(dtypes)}, allowed are {', '.join(DTYPES)}")
    if min(rounds, *steps) < 1:
        raise UserError(f"steps, rounds: got {list(steps)}, {rounds}, allowed is 1 or more")
    if preset_name not in (None, *PROBLEMS):
        raise UserError(f"preset: got {preset_name!r}, allowed are {', '.join(PROBLEMS)}")
    device = default_device()
    half = native_half(device)
    precisions = list(dict.fromkeys((FLOAT, *([DTYPES[name] for name in dtypes] or ([half] if half else [])))))
    for name, count in product([preset_name] if preset_name else PROBLEMS, steps):
        torch.compiler.reset()
        say(f"{name}: {count} steps")
        problem = PROBLEMS[name](Asked(count, device, precisions, compiled, small))
        shape, called = list(problem.shape), f"{name}{'-small' * small}"
        common = head("volumes", preset=called, steps=count, batch=shape[0], shape=shape, device=str(device))
        common["parameters"] = problem.parameters
        rows = measure(problem.cases, Timing(rounds, seconds), base=problem.base, device=device, say=say)
        # decoding counts as one step
        yield from (common | row | per_image(row, 1 if row["decodes"] else count, shape[0]) for row in rows)
        if interrupted(rows):
            return
