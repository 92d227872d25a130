"""Steps against error: how far each solver is from the converged image, and what it costs; the bundled weights.

Beside the solvers: the bundled student, DDIM that stops early by each criterion, a solver that chooses its steps by an
estimate of its error, and the loops of diffusers in DDIM's 50 steps on a network of the same size. All are timed to
images, by the same autoencoder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbldm_fast import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FastSampler,
    Pipeline,
    SchedulerConfig,
    UniPCMultistepScheduler,
)
from sbldm_fast.errors import UserError
from sbldm_fast.machine import default_device
from sbldm_fast.sampling.noise import draw
from sbldm_fast.sampling.requests import draw_requests

from .harness import Case, Timing, measure
from .providers import FLOAT, Diffusers, Provider, Runtime
from .rows import Row, head
from .setup import SamplingSetup
from .suite_sampling import per_image

CONVERGED = 1000  # steps of DDIM, all that the models were trained on: the limit of every solver here
PEER_STEPS = 50  # of diffusers' loops
TRAILING = {"timestep_spacing": "trailing"}
ORDER_3 = TRAILING | {"solver_order": 3}
SOLVERS: dict[str, Callable[[SchedulerConfig], Any]] = {
    "ddim": lambda c: DDIMScheduler.from_config(c, timestep_spacing="leading"),
    "ddim trailing": lambda c: DDIMScheduler.from_config(c, **TRAILING, prev="lookup"),
    "dpm": lambda c: DPMSolverMultistepScheduler.from_config(c, **TRAILING),
    "unipc": lambda c: UniPCMultistepScheduler.from_config(c, **ORDER_3),
    "unipc order 2": lambda c: UniPCMultistepScheduler.from_config(c, **TRAILING, solver_order=2),
    "unipc linspace": lambda c: UniPCMultistepScheduler.from_config(c, timestep_spacing="linspace", solver_order=3),
    "unipc Karras": lambda c: _of_diffusers(c, use_karras_sigmas=True),
    "unipc last sigma": lambda c: _of_diffusers(c, final_sigmas_type="sigma_min"),
}
STOPS = {"eps_norm": (0.05, 0.5), "convergence": (1e-3, 1e-4), "x0_delta": (1e-2, 1e-3)}  # the default, another
TOLERANCES = (0.3, 0.1, 0.03)  # of the solver that chooses its steps, of x in units of its noise
FIRST_STEP, SAFETY = 0.5, 0.9  # in log(alpha / sigma); of the next step that an estimate allows


class Judged(NamedTuple):
    """What errors are taken on: images asked for by values spread over what the model knows, and images not asked."""

    n: int
    cond: dict[str, list[Any]]
    wanted: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, pipe: Pipeline, n: int) -> Judged:
        """n of each, converged."""
        cond = draw_requests(pipe.unet.config.covariates, n, 0)
        sampler = pipe.sampler(CONVERGED, scheduler="ddim")
        return cls(n, cond, (sampler(n, seed=0, cond=cond), sampler(n, seed=1)))

    def errors(self, run: Callable[..., Tensor]) -> dict[str, float]:
        """The root mean square differences of the images that `run(n, seed=, cond=)` makes."""
        made = run(self.n, seed=0, cond=self.cond), run(self.n, seed=1, cond=None)
        values = [float((a - b).square().mean().sqrt()) for a, b in zip(made, self.wanted, strict=True)]
        return dict(zip(("rms", "rms_unasked"), values, strict=True))


def bench_solvers(
    *,
    batch: int = 4,
    steps: Sequence[int] = (4, 6, 8, 10, 12, 15, 20, 50, 100),
    rounds: int = 6,
    judged: int = 32,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """One row for each way and number of model calls: seconds for `batch` images; `rms`, the root mean square
    difference of `judged` images in [-1, 1] from those of DDIM with 1000 steps and the same noise, asked for by values
    drawn over what the model knows, and `rms_unasked`, of as many that are asked for nothing.

    Raises:
        ValueError: batch, steps, rounds or judged below 1.
    """
    if min(batch, rounds, judged, *steps) < 1:
        raise UserError(
            f"batch, steps, rounds, judged: got {batch}, {list(steps)}, {rounds}, {judged}, allowed is 1 or more"
        )
    device = default_device()
    pipe = Pipeline.from_pretrained("demo").to(device)
    say(f"the converged images: {CONVERGED} steps")
    among = Judged.of(pipe, judged)
    ways = _ways(pipe, steps)
    cond = {name: values[:batch] for name, values in draw_requests(pipe.unet.config.covariates, batch, 2).items()}
    found: dict[str, dict[str, Any]] = {}

    def build(name: str) -> Callable[[], Any]:
        run, calls = ways[name].build()
        found[name] = among.errors(run) | {"calls": calls()}
        return lambda: run(batch, seed=2, cond=cond)

    cases = {name: Case(partial(build, name), None, 0.0) for name in ways}
    setup = SamplingSetup("demo", PEER_STEPS, batch, device)
    peers: list[Provider] = [Diffusers(FLOAT), Runtime(FLOAT), Runtime(FLOAT, runtime="OpenVINO")]
    cases |= {p.name: Case(partial(_peer, p, setup, pipe), None, 0.0, about={"family": "peer"}) for p in peers}
    shape = [batch, *among.wanted[0].shape[1:]]
    common = head("solvers", preset="demo", batch=batch, judged=judged, shape=shape, device=str(device))
    for row in measure(cases, Timing(rounds), base="", device=device, say=say):
        name = row["provider"]
        solver, count = ways[name][:2] if name in ways else (f"{name} ddim", PEER_STEPS)
        yield common | {"solver": solver, "steps": count} | row | found.get(name, {}) | per_image(row, count, batch)


Run = Callable[..., Tensor]


class Way(NamedTuple):
    """A way to sample: its solver, its model calls at most, and what makes a run and, after that, says its calls."""

    solver: str
    steps: int
    build: Callable[[], tuple[Run, Callable[[], float]]]


def _ways(pipe: Pipeline, steps: Sequence[int]) -> dict[str, Way]:
    config, ways = pipe.scheduler.config, {}
    for (solver, of), n in product(SOLVERS.items(), steps):
        ways[f"{solver} {n}"] = Way(solver, n, partial(_fixed, pipe, of, config, n))
    student = Pipeline.from_pretrained("demo-student").to(next(pipe.unet.parameters()).device)
    n = student.default_steps()
    ways[f"student {n}"] = Way("student", n, partial(_fixed, student, lambda c: student.scheduler, config, n))
    for stop, thresholds in STOPS.items():
        for threshold in thresholds:
            name = f"ddim {PEER_STEPS}, {stop} {threshold}"
            ways[name] = Way(f"ddim, {stop}", PEER_STEPS, partial(_stopped, pipe, config, stop, threshold))
    for tolerance in TOLERANCES:
        ways[f"adaptive {tolerance}"] = Way("adaptive", PEER_STEPS, partial(_adaptive, pipe, tolerance))
    return ways


def _peer(provider: Provider, setup: SamplingSetup, pipe: Pipeline) -> Callable[[], Tensor]:
    """A peer's loop, to images by the autoencoder of the others."""
    run = provider.build(setup)
    return lambda: pipe.decode(run())


def _fixed(
    pipe: Pipeline, of: Callable[[SchedulerConfig], Any], config: SchedulerConfig, steps: int
) -> tuple[Run, Callable[[], float]]:
    sampler = pipe.sampler(steps, "eager", scheduler=of(config))
    return sampler, lambda: sampler.steps


def _of_diffusers(config: SchedulerConfig, **options: Any) -> Any:
    """diffusers' UniPC, for what ours has not."""
    betas = DDPMScheduler.from_config(config).betas.numpy()
    theirs = importlib.import_module("diffusers").UniPCMultistepScheduler  # absent without
    return theirs(trained_betas=betas, prediction_type=config.prediction_type, **ORDER_3, **options)


def _stopped(pipe: Pipeline, config: SchedulerConfig, stop: str, threshold: float) -> tuple[Run, Callable[[], float]]:
    sampler = FastSampler(
        pipe.unet,
        SOLVERS["ddim"](config),
        shape=pipe.latent_shape,
        steps=PEER_STEPS,
        mode="eager",
        decode=pipe.decode,
        stop=stop,
        threshold=threshold,
        check_every=1,
    )

    def run(n: int, *, seed: int, cond: Any) -> Tensor:
        made: Tensor = sampler(n, seed=seed, cond=cond, batch_size=1)  # or a batch would go on for its slowest
        return made

    def calls() -> float:
        stats = sampler.stats()
        return PEER_STEPS - stats.get("steps_saved", 0) / stats["samples"]

    return run, calls


def _adaptive(pipe: Pipeline, tolerance: float) -> tuple[Run, Callable[[], float]]:
    """DPM-Solver-12: each step twice, at first and second order, and as long as their difference allows; each sample by
    itself. Source: Lu et al. 2022, arXiv:2206.00927, appendix C.2, in the data prediction of arXiv:2211.01095."""
    unet, c = pipe.unet, pipe.scheduler.config
    device = next(unet.parameters()).device
    a = DDPMScheduler.from_config(c).alphas_cumprod.double().to(device)
    places = 0.5 * (a / (1 - a)).log().flip(0)  # rising, of t = T - 1 to 0
    made, asked = [0], [0]

    def x0_of(x: Tensor, place: Tensor, values: Tensor) -> Tensor:
        i = torch.searchsorted(places, place).clamp(1, len(places) - 1)
        t = len(places) - 1 - (i - 1 + (place - places[i - 1]) / (places[i] - places[i - 1]))
        alpha, sigma = _levels(place)
        made[0] += len(x)
        x0: Tensor = alpha * x - sigma * unet(x, t.float(), values).float()
        return x0

    def move(x: Tensor, at: Tensor, to: Tensor, x0: Tensor) -> Tensor:
        (_, sigma), (alpha, sigma_to) = _levels(at), _levels(to)
        return sigma_to / sigma * x - alpha * torch.expm1(at - to).float()[:, None, None, None] * x0

    @torch.no_grad()
    def run(n: int, *, seed: int, cond: Any) -> Tensor:
        read = unet.read_condition(cond or {unet.config.covariates[0].name: None}, n)
        values = torch.stack([read[v.name] for v in unet.config.covariates], 1).to(device)
        x = draw(torch.tensor([[seed, i] for i in range(n)]), pipe.latent_shape, device)
        at, h = places[:1].repeat(n), torch.full((n,), FIRST_STEP, dtype=torch.float64, device=device)
        asked[0] += n
        while len(going := (at < places[-1]).nonzero().flatten()):
            place, to = at[going], torch.minimum(at + h, places[-1])[going]
            middle, told = (place + to) / 2, values[going]
            first = x0_of(x[going], place, told)
            near = move(x[going], place, to, first)
            second = x0_of(move(x[going], place, middle, first), middle, told)
            far = move(x[going], place, to, second)
            error = (far - near).square().mean((1, 2, 3)).sqrt().double() / tolerance
            good = error <= 1
            x[going[good]], at[going[good]] = far[good], to[good]
            h[going] = (to - place) * (SAFETY * error.clamp(min=1e-3).rsqrt()).clamp(0.2, 4)
        return pipe.decode(x0_of(x, at, values))

    return run, lambda: made[0] / asked[0]


def _levels(place: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at log(alpha / sigma) `[N]`."""
    alpha, sigma = torch.sigmoid(2 * place).sqrt(), torch.sigmoid(-2 * place).sqrt()
    return alpha.float()[:, None, None, None], sigma.float()[:, None, None, None]
