"""Which schedulers a `SolverTable` describes, and how exactly: each against its own loop, through `FastSampler` in
float32.

python tests/sbldm_fast/diffusion/schedulers.py > benchmarks/SCHEDULERS.md
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor

from sbldm_fast import FastSampler
from sbldm_fast.diffusion.probe import copy_with_timesteps, scaled_input, scheduler_step

STEPS, SHAPE = 20, (4, 6, 6)
NO_CLIP = {"clip_sample": False}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("diffusers", name, config)
        for name, config in (
            ("DDIMScheduler", NO_CLIP),
            ("DDIMScheduler", {}),
            ("DDIMScheduler", NO_CLIP | {"prediction_type": "sample"}),
            (
                "DDIMScheduler",
                NO_CLIP
                | {
                    "prediction_type": "v_prediction",
                    "rescale_betas_zero_snr": True,
                    "timestep_spacing": "trailing",
                },
            ),
            ("DDIMScheduler", NO_CLIP | {"thresholding": True, "sample_max_value": 3.0}),
            ("DDPMScheduler", NO_CLIP),
            ("DDPMScheduler", {}),
            ("PNDMScheduler", {}),
            ("PNDMScheduler", {"skip_prk_steps": True}),
            ("DEISMultistepScheduler", {}),
            ("DPMSolverMultistepScheduler", {}),
            ("DPMSolverMultistepScheduler", {"solver_order": 3}),
            ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
            ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
            ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}),
            ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
            ("DPMSolverSinglestepScheduler", {}),
            ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
            ("UniPCMultistepScheduler", {}),
            ("UniPCMultistepScheduler", {"solver_order": 3}),
            ("EulerDiscreteScheduler", {}),
            ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
            ("EulerAncestralDiscreteScheduler", {}),
            ("HeunDiscreteScheduler", {}),
            ("LMSDiscreteScheduler", {}),
            ("KDPM2DiscreteScheduler", {}),
            ("SASolverScheduler", {}),
            ("FlowMatchEulerDiscreteScheduler", {}),
            ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        )
    ),
    *(
        ("monai.networks.schedulers", name, config)
        for name, config in (
            ("DDIMScheduler", NO_CLIP),
            ("DDIMScheduler", {}),
            ("DDPMScheduler", NO_CLIP),
            ("PNDMScheduler", {}),
            ("PNDMScheduler", {"skip_prk_steps": True}),
            ("RFlowScheduler", {}),
            ("RFlowScheduler", {"use_discrete_timesteps": False}),
        )
    ),
    ("sbldm_fast", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("sbldm_fast", "RFlowScheduler", {"use_discrete_timesteps": False}),
]
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A model that is not linear and knows the time."""
    return torch.tanh(x @ WEIGHT.to(x.dtype)) + torch.sin(t.to(x.dtype) / 100) * x.abs().sqrt() * 0.1


def own_loop(
    scheduler: Any,
    steps: int,
    noise: Tensor,
    draw: Callable[[int], Tensor] | None = None,
    model: Callable[..., Tensor] = bent,
) -> Tensor:
    """The scheduler's own loop from noise of unit variance; what it draws at step i is `draw(i)`."""
    own = copy_with_timesteps(scheduler, steps)
    x = noise * float(getattr(own, "init_noise_sigma", 1.0))
    randn = torch.randn
    for i, t in enumerate(own.timesteps):
        m = model(scaled_input(own, x, t), t)
        if draw is not None:
            torch.randn = lambda *_, i=i, **k: draw(i).to(k.get("dtype") or torch.float32)  # every library draws by it
        try:
            x = scheduler_step(own, m, i, x, 0.0, torch.Generator())[0]
        finally:
            torch.randn = randn
    return x


def measure(library: str, name: str, config: dict[str, Any]) -> tuple[bool, bool, int, int, float]:
    """Linear or not, stochastic or not, model calls, history, and the largest relative error of 20 steps."""
    scheduler = getattr(importlib.import_module(library), name)(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = FastSampler(bent, scheduler, shape=SHAPE, steps=STEPS, mode="eager")
    got = sampler(2, seed=3)
    expected = own_loop(
        scheduler, STEPS, philox_normal((2, *SHAPE), 3), lambda i: philox_normal((2, *SHAPE), 3, stream=i + 1)
    )
    linear = "fallbacks" not in sampler.stats()
    error = float((got - expected).abs().max() / expected.abs().max())
    return linear, linear and sampler.table.stochastic, sampler.steps, sampler.table.history if linear else 0, error


def row(library: str, name: str, config: dict[str, Any], measured: tuple[bool, bool, int, int, float]) -> str:
    """A line of the table."""
    linear, stochastic, calls, history, error = measured
    options = "".join(f", {k}={v}" for k, v in config.items())
    title = f"{library.partition('.')[0]} `{name}`{options}"
    return (
        f"| {title} | {'yes' if linear else 'no: stepped'} | {'yes' if stochastic else ''} | {calls} | {history} |"
        f" {error:.1e} |"
    )


def main() -> None:
    """Print the table."""
    print("# Schedulers as tables\n")
    print(
        f"`python tests/sbldm_fast/diffusion/schedulers.py`: {STEPS} steps through `FastSampler`, float32, against the"
        " scheduler's own loop"
    )
    print(
        "in float32, on a model that is not linear, from the same noise. Largest error relative to the largest value.\n"
    )
    print(
        "| scheduler | a table? | noise | model calls | history K | max relative error |\n|---|---|---|---:|---:|---:|"
    )
    for case in CASES:
        print(row(*case, measure(*case)))


if __name__ == "__main__":
    main()
