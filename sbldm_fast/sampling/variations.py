"""What a sampler does beside sampling: paths, arcs between seeds, samples near a latent, and the way back to the noise.

The methods of `FastSampler` by these names say what comes out; a sampler is used here as its own class uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NotFinite, UserError
from .loop import broken, float32_precision
from .model import Cond, named, ours
from .noise import draw, numbered, whole

if TYPE_CHECKING:
    from .sampler import FastSampler

INVERSIONS = 3  # fixed-point iterations of a step backwards; one is the usual DDIM inversion


def trajectory(sampler: FastSampler, n: int, arguments: dict[str, Any]) -> Tensor:
    """See `FastSampler.trajectory`."""
    for name, why in (("batch_size", "a trajectory is of one batch"), ("callback", "a trajectory has one of its own")):
        if arguments.get(name) is not None:
            raise UserError(f"{name}: got {arguments[name]}, allowed is None: {why}")
    seen: list[Tensor] = []
    sampler(n, **arguments | {"callback": lambda i, t, x: seen.append(x.clone())})
    return torch.stack(seen)


def interpolate(sampler: FastSampler, seeds: tuple[int, int], n: int, arguments: dict[str, Any]) -> Tensor:
    """See `FastSampler.interpolate`."""
    if len(seeds) != 2:
        raise UserError(f"seeds: got {len(seeds)}, allowed are two")
    with sampler.at_work():  # the scheduler as it is now
        noisy = not sampler.linear or sampler.table.stochastic
    if noisy:
        raise UserError(
            "scheduler: got one with noise in its steps, allowed is a deterministic one, such as DDIM with eta 0"
        )
    shape, device = sampler.shape, sampler.device
    a, b = (draw(torch.tensor([[whole("seeds", s, 0), 0]]), shape, device) for s in seeds)
    w = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    p = torch.linspace(0, 1, whole("n", n, 2), device=device).reshape(-1, *[1] * len(shape))
    arc = (torch.sin((1 - p) * w) * a + torch.sin(p * w) * b) / torch.sin(w)
    return sampler(noise=arc if w > 1e-3 else a.expand(n, *shape), **arguments)


def from_latents(
    sampler: FastSampler,
    z: Tensor,
    strength: float,
    seed: int | Sequence[int],
    indices: Sequence[int] | None,
    arguments: dict[str, Any],
) -> Tensor:
    """See `FastSampler.from_latents`."""
    if not 0 < strength <= 1:
        raise UserError(f"strength: got {strength}, allowed is above 0 up to 1")
    x, seeds = numbered(sampler.shape, sampler.device, None, seed, z, indices)
    assert x is not None
    tail = sampler.tail(strength)
    noised = tail.table.alpha[0].item() * x + tail.table.sigma[0].item() * draw(seeds, sampler.shape, sampler.device)
    return tail(noise=noised / tail.init_noise_sigma, seed=seed, indices=indices, **arguments)


def invert(sampler: FastSampler, z: Tensor, cond: Cond) -> Tensor:
    """See `FastSampler.invert`."""
    s = sampler
    with s.at_work(), torch.no_grad(), float32_precision(s.device, s.tf32):
        if not s.linear or s.table.history or s.table.stochastic:
            raise UserError(
                "scheduler: got one with history or noise, allowed is a deterministic first-order one, such as DDIM"
            )
        if s.table.clip_range is not None:
            raise UserError(
                "scheduler: got one that clips x0, which nothing leads back from, allowed is one with clip_sample=False"
            )
        if bool((s.table.rows[:, 4].abs() < 1e-6).any()):
            raise UserError(
                "scheduler: got one with a step that forgets x, as x0 prediction does, allowed is one that can be led"
                " back"
            )
        x, _ = numbered(s.shape, s.device, None, 0, z, None)
        assert x is not None
        given = s.cast(named(cond))
        if given and ours(s.model):
            raise UserError("cond: got a value, allowed is None: this model is unconditional")
        for i in reversed(range(s.steps)):
            a, b = s.table.rows[i, 4:6].tolist()
            after = x
            for _ in range(INVERSIONS):
                h = x if s.input_scale is None else x * s.input_scale[i]
                x = (after - b * s.predict(h.to(s.dtype), s.rows[i : i + 1], given).float()) / a
    if not x.isfinite().all():
        raise NotFinite(f"model: NaN or infinity while inverting samples {broken(x)}")
    return x / s.init_noise_sigma
