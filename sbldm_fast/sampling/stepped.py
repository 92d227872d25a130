"""The loop of a scheduler that no table describes: stepped as it is, model call by model call."""

from __future__ import annotations

import copy
import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor

from sbldm_fast.diffusion.probe import copy_with_timesteps, scaled_input, scheduler_step

from ..errors import NotFinite, UserError
from .loop import Callback
from .noise import draw
from .plan import Network
from .request import Batch


def seed_of(seed: int, index: int) -> int:
    """One number from a sample's two, spread over all its bits: a generator on a CPU takes the lower half alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:7])


def step_through(
    network: Network,
    scheduler: Any,
    steps: int,
    eta: float | None,
    batch: Batch,
    callback: Callback | None,
) -> Tensor:
    """x after the scheduler's own steps; the loop is the caller's `no_grad`.

    Noise is each sample's own: a step that takes it, as `variance_noise`, gets ours; where it draws, each sample is
    stepped by a copy of the scheduler with a generator of its seed and index.

    Raises:
        ValueError: the scheduler's step fails on this model's output.
        FloatingPointError: the scheduler makes NaN or infinity of finite numbers.
    """

    def predict(h: Tensor, t: Tensor) -> Tensor:
        return network.predict(h.to(network.dtype), network.time_rows(t), batch.cond).float()

    x, guidance = batch.x, batch.guidance
    name, shape, own = type(scheduler).__name__, tuple(x.shape[1:]), copy_with_timesteps(scheduler, steps, eta)
    takes = inspect.signature(own.step).parameters
    size = 1 if "generator" in takes and "variance_noise" not in takes else len(x)
    copies = [copy.deepcopy(own) for _ in range(len(x) // size)]
    generators = [torch.Generator(x.device).manual_seed(seed_of(*pair)) for pair in batch.seeds.tolist()]
    times = own.timesteps.to(x.device)
    for i, t in enumerate(own.timesteps):
        h = torch.cat([scaled_input(one, part, t) for one, part in zip(copies, x.split(size), strict=True)])
        if guidance is None:
            m = predict(h, times[i : i + 1])
        else:
            m_u, m_c = predict(torch.cat([h, h]), times[i : i + 1]).chunk(2)
            w = guidance.to(x.device).reshape(-1, *[1] * len(shape)) if batch.guides(float(t)) else 1.0
            m = m_u + w * (m_c - m_u)
        noise: list[Any] = (
            [draw(batch.seeds.cpu(), shape, x.device, i + 1)] if "variance_noise" in takes else generators
        )
        try:
            after = torch.cat(
                [
                    scheduler_step(one, outputs, i, samples, eta, source)[0]
                    for one, outputs, samples, source in zip(copies, m.split(size), x.split(size), noise, strict=False)
                ]
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as failure:  # whatever another library raises
            where = f"step {i} of {len(times)} on what this model gives: {type(failure).__name__}: {failure}"
            raise UserError(f"scheduler: {name} failed at {where}") from failure
        if not after.isfinite().all() and m.isfinite().all() and x.isfinite().all():
            raise NotFinite(
                f"scheduler: {name} makes NaN or infinity of finite numbers at step {i} (timestep {float(t):g})"
            )
        x = after
        if callback is not None:
            callback(i, float(t), x)
    return x
