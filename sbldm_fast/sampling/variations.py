"""What a plan does beside sampling: an arc between two noises, samples near a latent, and the way back to the noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotFinite, UserError
from .loop import broken
from .model import TensorDict
from .noise import draw
from .plan import Plan
from .precision import float32_precision

INVERSIONS = 3  # fixed-point iterations of a step backwards; one is the usual DDIM inversion


def noise_arc(seeds: tuple[int, int], n: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """n noises `[n, *shape]` from that of one seed to that of another, along the arc between them.

    `z(p) = (sin((1 - p) w) z_a + sin(p w) z_b) / sin w`, w the angle between z_a and z_b, p from 0 to 1.
    Source: Shoemake 1985, doi:10.1145/325334.325242.
    """
    a, b = (draw(torch.tensor([[seed, 0]]), shape, device) for seed in seeds)
    w = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    p = torch.linspace(0, 1, n, device=device).reshape(-1, *[1] * len(shape))
    arc = (torch.sin((1 - p) * w) * a + torch.sin(p * w) * b) / torch.sin(w)
    return arc if w > 1e-3 else a.expand(n, *shape)


def noise_latents(plan: Plan, z: Tensor, seeds: Tensor) -> Tensor:
    """`alpha z + sigma noise` at the first step of the plan, as noise of unit variance `[n, *shape]`."""
    table = plan.table
    noise = draw(seeds, tuple(z.shape[1:]), plan.network.device)
    return (table.alpha[0].item() * z + table.sigma[0].item() * noise) / table.init_noise_sigma


def invert(plan: Plan, x: Tensor, cond: TensorDict) -> Tensor:
    """The noise of unit variance from which the plan's run would have come to `x`, both `[n, *shape]`.

    Step i backwards solves `x' = a_0 x + b_0 model(x, t_i)` for x by fixed-point iteration from x = x'. Source: Song et
    al. 2021, arXiv:2010.02502, section 4.3; Pan et al. 2023, arXiv:2309.04907 for the iteration.

    Raises:
        ValueError: a solver with history, noise or clipping, or with a step that forgets x.
        FloatingPointError: NaN or infinity, with the samples.
    """
    network, table = plan.network, plan.table
    if table.history or table.stochastic:
        raise UserError(
            "scheduler: got one with history or noise, allowed is a deterministic first-order one, such as DDIM"
        )
    if table.clip_range is not None:
        raise UserError(
            "scheduler: got one that clips x0, which nothing leads back from, allowed is one with clip_sample=False"
        )
    if bool((table.rows[:, 4].abs() < 1e-6).any()):
        raise UserError(
            "scheduler: got one with a step that forgets x, as x0 prediction does, allowed is one that can be led back"
        )
    with torch.no_grad(), float32_precision(network.device, plan.options.tf32):
        for i in reversed(range(len(plan.timesteps))):
            a, b = table.rows[i, 4:6].tolist()
            after = x
            for _ in range(INVERSIONS):
                h = x if plan.input_scale is None else x * plan.input_scale[i]
                x = (after - b * network.predict(h.to(network.dtype), plan.time_rows[i : i + 1], cond).float()) / a
    if not x.isfinite().all():
        raise NotFinite(f"model: NaN or infinity while inverting samples {broken(x)}")
    return x / table.init_noise_sigma
