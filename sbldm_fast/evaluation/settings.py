"""The settings of 000's ablations, table by table."""

from __future__ import annotations

from dataclasses import dataclass, replace

STEPS = 50  # of DDIM, in every run that has a sampler
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Setting:
    """One line of a table: a method with its noise schedule and its loss."""

    method: str = "ours"
    beta_schedule: str = "linear"
    gamma: float = 0.5
    low_weight: float = 1.0
    high_weight: float = 1.0
    cutoff: float = 0.25


SIMPLE = Setting()
# of the ranges that appendix B names, about their middle: 000 leaves its own choice blank
BANDS = Setting(low_weight=1.0, high_weight=0.5)
GAMMA = replace(SIMPLE, beta_schedule="gamma")
BOTH = replace(BANDS, beta_schedule="gamma")
TABLES: dict[str, dict[str, Setting]] = {
    "4.4.1": {"linear": SIMPLE, "cosine": replace(SIMPLE, beta_schedule="cosine"), "gamma-rebalanced, γ = 0.5": GAMMA},
    "4.4.2": {"simple (L2)": SIMPLE, "two bands, 1 and 0.5": BANDS},
    "4.4.3": {"baseline": SIMPLE, "+ gamma schedule": GAMMA, "+ two bands": BANDS, "+ both": BOTH},
    "4.5": {
        "VAE only": replace(SIMPLE, method="vae"),
        "GAN": replace(SIMPLE, method="gan"),
        "DDPM in pixels": replace(SIMPLE, method="pixels"),
        "ours, + both": BOTH,
    },
    "B": {
        **{f"γ = {g}": replace(GAMMA, gamma=g) for g in (0.5, 0.75, 1.0)},
        **{f"low weight {w}": replace(BANDS, low_weight=w) for w in (0.5, 1.0, 2.0)},
        **{f"high weight {w}": replace(BANDS, high_weight=w) for w in (0.1, 0.5, 1.0)},
        **{f"cutoff {c}": replace(BANDS, cutoff=c) for c in (0.1, 0.25, 0.5)},
    },
}


@dataclass(frozen=True)
class Budget:
    """What every run of an ablation has: `side` pixels, the preset's UNet with its widths divided by `narrow`,
    `vae_steps` and `steps` of batches of `batch_size`, `samples` compared with as many unseen slices, what the networks
    predict, the names of the `preset` and of the data."""

    side: int = 64
    narrow: int = 1
    vae_steps: int = 1000
    steps: int = 2000
    batch_size: int = 32
    samples: int = 200
    prediction_type: str = "v_prediction"
    preset: str = "demo"
    data: str = ""
