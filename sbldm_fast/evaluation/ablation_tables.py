"""The tables of 000 from measured rows: mean ± standard deviation over seeds, and what the differences are worth.

A line says `-` where no row holds a value; nothing is typed. Settings of one seed share an autoencoder, so they are
compared seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from .settings import BANDS, BOTH, GAMMA, LEAST_SEEDS, SIMPLE, STEPS, TABLES, Setting

Rows = Sequence[Mapping[str, Any]]
TITLES = {
    "4.4.1": "4.4.1 Noise schedules",
    "4.4.2": "4.4.2 Losses",
    "4.4.3": "4.4.3 Combined contributions",
    "4.5": "4.5 Other methods",
    "B": "Appendix B: sensitivity",
}
# heading, key, digits, factor
COLUMNS: tuple[tuple[str, str, int, float], ...] = (
    ("KID ×1000 ↓", "kid", 1, 1e3),
    ("Fréchet distance ↓", "frechet_distance", 1, 1),
    ("precision ↑", "precision", 3, 1),
    ("recall ↑", "recall", 3, 1),
    ("SSIM, unpaired", "ssim_unpaired", 3, 1),
    ("PSNR, unpaired, dB", "psnr_unpaired", 2, 1),
    ("RMS between samples", "rms_between_samples", 3, 1),
)
TIMES = (("training, s", "training_seconds", 0, 1.0),)
SIZES = (
    ("parameters, M", "parameters", 2, 1e-6),
    ("steps", "steps", 0, 1.0),
    *TIMES,
    ("ms an image", "seconds_an_image", 1, 1e3),
)
EXTRA = {"4.4.3": TIMES, "4.5": SIZES}
# in appendix B, by what its lines begin with: the parameter as 000 has it
PARAMETERS = {
    "γ": ("Gamma (schedule)", "0.5-1.0"),
    "low": ("Low freq weight", "0.5-2.0"),
    "high": ("High freq weight", "0.1-1.0"),
    "cutoff": ("Cutoff ratio", "0.1-0.5"),
}


def rows_of(rows: Rows, setting: Setting) -> list[Mapping[str, Any]]:
    """Those of one setting, by seed."""
    return sorted((row for row in rows if row["setting"] == asdict(setting)), key=lambda row: int(row["seed"]))


def spread(rows: Rows, key: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds; None below 3 seeds."""
    values = [row[key] for row in rows]
    return (mean(values), stdev(values)) if len(values) >= LEAST_SEEDS else None


def render_tables(rows: Rows) -> str:
    """Markdown of all tables that the rows have a line of, below what they were made with."""
    if not rows:
        return "No rows.\n"
    parts = [_about(rows)]
    for name, settings in TABLES.items():
        if any(rows_of(rows, s) for s in settings.values()):
            parts.append(f"### {TITLES[name]}\n\n{_table(name, settings, rows)}\n\n{_worth(name, settings, rows)}")
    return "\n\n".join(parts) + "\n"


def _about(rows: Rows) -> str:
    budget, first = rows[0]["budget"], rows[0]
    seeds = {int(row["seed"]) for row in rows}
    machines = sorted({f"{row['machine']}, {row['arithmetic']}, threads: {row['threads']}" for row in rows})
    biased = first["real"] < first["dimensions"]
    return " ".join(
        [
            f"Slices of {budget['side']} x {budget['side']} pixels, preset `{budget['preset']}` with its widths over"
            f" {budget['narrow']}, {len(seeds)} seeds, each with an autoencoder of its own; {budget['vae_steps']} steps"
            f" of the autoencoder and {budget['steps']} of the UNet (`{budget['prediction_type']}`) in batches"
            f" of {budget['batch_size']}.",
            f"{budget['samples']} samples in {STEPS} DDIM steps against {first['real']} unseen slices, by features of"
            f" {first['extractor']}{'; of so few images the Fréchet distance is mostly bias' if biased else ''}.",
            f"The first line is of {first['floor']['samples']} training slices: as near as a sample could come. The"
            f" least KID ×1000 of a run is {1e3 * min(row['kid'] for row in rows):.0f}.",
            f"{'; '.join(machines)}. Synthetic, not for diagnosis.",
        ]
    )


def _table(name: str, settings: Mapping[str, Setting], rows: Rows) -> str:
    columns = (*COLUMNS, *EXTRA.get(name, ()))
    lines = ["| | " + " | ".join(c[0] for c in columns) + " |", "|---|" + "---|" * len(columns)]
    floor = rows[0]["floor"]
    real = [f"{floor[key] * factor:.{digits}f}" if key in floor else "" for _, key, digits, factor in columns]
    lines.append("| *training slices* | " + " | ".join(real) + " |")
    for label, setting in settings.items():
        cells = []
        for _, key, digits, factor in columns:
            found = spread([row for row in rows_of(rows, setting) if key in row], key)
            cells.append("-" if found is None else " ± ".join(f"{v * factor:.{digits}f}" for v in found))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _worth(name: str, settings: Mapping[str, Setting], rows: Rows) -> str:
    """What the differences of KID are worth, as a sentence for each group of lines that are compared."""
    groups: dict[str, dict[str, Setting]] = {}
    for label, setting in settings.items():
        groups.setdefault(label.split(" ")[0] if name == "B" else "", {})[label] = setting
    sentences = []
    for key, group in groups.items():
        usual = [BOTH] if name == "4.5" else [SIMPLE, GAMMA, BANDS] if name != "B" else [GAMMA, BANDS]
        base = next(label for label, setting in group.items() if setting in usual)
        found = [
            f"{label}: {1e3 * d[0]:+.1f} ± {1e3 * d[1]:.1f} ({'told apart' if d[2] else 'not told apart'})"
            for label, setting in group.items()
            if label != base and (d := paired(rows_of(rows, setting), rows_of(rows, group[base])))
        ]
        about = f"{PARAMETERS[key][0]}, tested {PARAMETERS[key][1]}: " if key else ""
        if found:
            sentences.append(f"{about}KID ×1000 above that of {base}, seed by seed: {'; '.join(found)}.")
    if sentences:
        sentences.append(
            "Told apart is a paired t-test at 5 % of each line; what these seeds cannot tell apart may differ."
        )
    alone = rows_of(rows, settings["VAE only"]) if name == "4.5" else []
    back, level = (
        spread([r for r in alone if key in r], key) for key in ("ssim_reconstruction", "psnr_reconstruction")
    )
    if back and level:
        sentences.append(
            f"The autoencoder gives unseen slices back with SSIM {back[0]:.3f} ± {back[1]:.3f} and PSNR {level[0]:.2f}"
            f" ± {level[1]:.2f} dB; those of samples are against slices that they have nothing to do with."
        )
    return " ".join(sentences)


def paired(of: Rows, base: Rows) -> tuple[float, float, bool] | None:
    """Mean and standard deviation over seeds of how much more KID the first have, and whether a paired t-test tells
    them apart at 5 %; None below 3 seeds."""
    from scipy.stats import t

    there = {int(row["seed"]): float(row["kid"]) for row in base}
    more = [float(row["kid"]) - there[int(row["seed"])] for row in of if int(row["seed"]) in there]
    if (n := len(more)) < LEAST_SEEDS:
        return None
    middle, apart = mean(more), stdev(more)
    return middle, apart, bool(abs(middle) > t.ppf(0.975, n - 1) * apart / n**0.5)
