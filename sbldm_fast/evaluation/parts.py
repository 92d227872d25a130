"""The parts of an evaluation: each looks at the material and gives its `figures` (numbers), `pictures` (files in the
folder) and `sentences` (what the numbers are worth).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbldm_fast.kernels import diffuse
from sbldm_fast.kernels.spectral_mse import spectral_mse_reference
from sbldm_fast.sampling.noise import draw

from . import figures, metrics
from .coherence import coherence
from .distribution import compare
from .features import extract
from .figures import BESIDE
from .material import Material, Part, read_stages
from .memorisation import memorisation
from .metrics import mean_and_std

SHOWN = 10  # images beside one another
TIMES = (1000, 800, 600, 400, 200, 100, 50, 0)  # 001's figure 4
MEMORISED = 64  # samples whose neighbours are looked for
FOLLOWED, PREDICTED = 32, 64  # samples whose way is followed, latents that predictions are made of
THRESHOLD = 0.05  # 001's, of adaptive stopping
PAIRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ssim": metrics.ssim,
    "psnr_db": metrics.psnr,
    "nrmse": metrics.nrmse,
    "ms_ssim": metrics.ms_ssim,
    "4-g-r-ssim": metrics.four_g_r_ssim,
}


def _part(numbers: dict[str, Any], pictures: list[str], *sentences: str) -> dict[str, Any]:
    return {"figures": numbers, "pictures": pictures, "sentences": list(sentences)}


def curves(m: Material) -> dict[str, Any]:
    """Figure 1."""
    if m.settings.log is None:
        return {"skipped": "no training log beside the pipeline; --log names one"}
    stages = read_stages(m.settings.log)
    figures.save_figure(figures.draw_curves(stages), m.out, "curves", f"losses of {Path(m.settings.log).name}")
    best = {
        f"{name}: least validation loss": min(r["val"] for r in of if "val" in r)
        for name, of in stages.items()
        if any("val" in r for r in of)
    }
    return _part(best, ["curves.svg"])


def samples(m: Material) -> dict[str, Any]:
    """Figure 2."""
    some = torch.linspace(0, len(m.unseen) - 1, SHOWN).long()
    name = "samples, asked alike" if m.cond else "samples"
    rows = {"unseen slices": m.unseen[some], "reconstructed": m.reconstructions[some], name: m.samples[some]}
    figures.save_figure(figures.draw_grid(rows), m.out, "samples", m.note(f"{SHOWN} of {len(m.unseen)} slices"), BESIDE)
    return _part({}, ["samples.svg"])


def reconstruction(m: Material) -> dict[str, Any]:
    """Figure 3 and the metrics of pairs."""
    found = {name: metric(m.reconstructions, m.unseen) for name, metric in PAIRED.items()}
    error = (m.reconstructions - m.unseen).abs().mean((1, 2, 3))
    numbers = {name: mean_and_std(values) for name, values in found.items()} | {"l1": mean_and_std(error)}
    by = found["ssim"].argsort()[torch.linspace(0, len(error) - 1, 7).long()]
    drawn = figures.draw_reconstructions(m.unseen[by], m.reconstructions[by], found["ssim"][by])
    note = m.note(f"7 of {len(error)} unseen slices, from the least SSIM to the most")
    figures.save_figure(drawn, m.out, "reconstruction", note, BESIDE)
    return _part(
        numbers,
        ["reconstruction.svg"],
        "What the autoencoder loses, no sample gets back: these are a sample's ceiling. Range of values: 2.",
    )


def _way(m: Material, n: int) -> tuple[Tensor, list[int]]:
    """x of n samples from noise to the end, `[steps + 1, n, C, h, w]`, and the t that each is at."""
    sampler = m.pipeline.sampler(m.settings.steps, "eager")
    cond = None if m.cond is None else {name: values[:n] for name, values in m.cond.items()}
    extra = {} if cond is None else {"cond": cond, "extrapolate": True}
    path = sampler.trajectory(n, seed=m.settings.seed, **extra).cpu()
    pairs = torch.tensor([[m.settings.seed, i] for i in range(n)])
    start = draw(pairs, tuple(path.shape[2:]), torch.device("cpu"))
    return torch.cat([start[None], path]), [*(int(t) for t in sampler.timesteps), 0]


def trajectory(m: Material) -> dict[str, Any]:
    """Figure 4."""
    x, times = _way(m, 1)
    T = int(m.pipeline.scheduler.config.num_train_timesteps)
    nearest = [min(range(len(times)), key=lambda i, t=t: abs(times[i] - t * T / 1000)) for t in TIMES]  # type: ignore[misc]
    at = list(dict.fromkeys(nearest))  # few steps come near to fewer times
    device = next(m.pipeline.vae.parameters()).device
    with torch.no_grad():
        images = m.pipeline.decode(x[at, 0].to(device)).cpu()
    shown = [times[i] for i in at]
    figures.save_figure(figures.draw_trajectory(x[at, 0], images, shown), m.out, "trajectory", m.note("1 sample"))
    return _part({}, ["trajectory.svg"])


def latents(m: Material) -> dict[str, Any]:
    """Figure 5."""
    mean, logvar = m.posterior
    z = mean * m.pipeline.vae.config.scaling_factor
    kl = 0.5 * (mean**2 + logvar.clamp(-30, 20).exp() - 1 - logvar.clamp(-30, 20)).flatten(1).sum(1)
    flat = z.flatten(1).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    share = s.square() / s.square().sum()
    drawn = figures.draw_latents(z.transpose(0, 1).flatten(1), z.var(0).mean(0), kl, u[:, :2] * s[:2], share)
    figures.save_figure(drawn, m.out, "latents", m.note(f"{len(z)} unseen slices"))
    of_channels = z.transpose(0, 1).flatten(1).std(1)
    numbers = {
        "kl_nats_a_slice": mean_and_std(kl),
        "std_of_channels_least": float(of_channels.min()),
        "std_of_channels_most": float(of_channels.max()),
        "variance_by_place_least": float(z.var(0).mean(0).min()),
        "variance_by_place_most": float(z.var(0).mean(0).max()),
        "components_for_nine_tenths": int((share.cumsum(0) < 0.9).sum()) + 1,
    }
    return _part(numbers, ["latents.svg"])


def spectra(m: Material) -> dict[str, Any]:
    """Figure 6: bands end at an eighth, a quarter and a half of the sampling rate."""
    sets = {"real": m.unseen, "reconstructions": m.reconstructions, "samples": m.samples}
    found = {name: metrics.radial_spectrum(x) for name, x in sets.items()}
    side = min(m.unseen.shape[2:])
    bands = {"low": (1, side // 8), "middle": (side // 8, side // 4), "high": (side // 4, side // 2)}
    figures.save_figure(figures.draw_spectra(found, bands), m.out, "spectra", m.note(f"{len(m.samples)} of each"))
    numbers = {
        f"{band}_power_of_{name}_over_real": float(found[name][:, a:b].mean() / found["real"][:, a:b].mean())
        for band, (a, b) in bands.items()
        for name in ("reconstructions", "samples")
    }
    return _part(numbers, ["spectra.svg"])


def diversity(m: Material) -> dict[str, Any]:
    """Figure 7."""
    found = {who: metrics.diversity(x, m.settings.seed) for who, x in (("real", m.unseen), ("samples", m.samples))}
    measures = {name: {who: found[who][name] for who in found} for name in found["real"]}
    pairs = len(found["real"]["rms"])
    figures.save_figure(figures.draw_histograms(measures), m.out, "diversity", m.note(f"{pairs} pairs of each set"))
    numbers = {
        f"{name} between {who}": mean_and_std(values) for name, of in measures.items() for who, values in of.items()
    }
    return _part(numbers, ["diversity.svg"], "Samples are as diverse as brains where both rows agree.")


def distribution(m: Material) -> dict[str, Any]:
    """KID, the Fréchet distance, precision and recall, with what real slices would have."""
    how: dict[str, Any] = {"weights": m.settings.weights}
    if m.settings.extractor == "vae":
        how["vae"] = m.pipeline.vae
    real = extract(m.settings.extractor, m.unseen, groups=m.groups("unseen"), **how)
    sets = {"samples": m.samples, "reconstructions": m.reconstructions, "training": m.real_train}
    found = {
        name: compare(extract(m.settings.extractor, x, groups=m.groups(name), **how), real) for name, x in sets.items()
    }
    keys = ("kid", "kid_standard_error", "frechet_distance", "precision", "recall")
    numbers = {f"{key} of {name}": of[key] for name, of in found.items() for key in keys}
    alone = {name: metrics.ssim(sets[name], m.unseen) for name in ("samples", "training")}
    level = {name: metrics.psnr(sets[name], m.unseen) for name in ("samples", "training")}
    numbers |= {f"unpaired ssim of {name}": mean_and_std(v) for name, v in alone.items()}
    numbers |= {f"unpaired psnr_db of {name}": mean_and_std(v) for name, v in level.items()}
    one = found["samples"]
    about = {"extractor": one["extractor"], "dimensions": one["dimensions"]}
    return _part(
        about | numbers,
        [],
        f"All distances are to {one['real']} unseen slices, by {one['extractor']}. Training slices"
        f"{' of the same contrasts and heights' if m.cond else ''} are as near to them as samples could come; the"
        " distance of reconstructions is what the autoencoder alone costs.",
        f"Beside unseen slices that are not their originals, samples have SSIM {float(alone['samples'].mean()):.3f} and"
        f" real training slices {float(alone['training'].mean()):.3f}: such figures, 001's among them, are no quality.",
        *one["warnings"],
    )


def sharpness(m: Material) -> dict[str, Any]:
    """002's two metrics, beside a picture that fools them."""
    blocks = F.interpolate(F.avg_pool2d(m.unseen, 4), scale_factor=4, mode="nearest")
    sets = {"real": m.unseen, "reconstructions": m.reconstructions, "samples": m.samples, "real, 4 x 4 blocks": blocks}
    numbers: dict[str, Any] = {}
    for name, of in (("laplacian_variance", metrics.laplacian_variance), ("fft_sharpness", metrics.fft_sharpness)):
        numbers |= {f"{name} of {who}": mean_and_std(of(x)) for who, x in sets.items()}
    real, fooled = (numbers[f"laplacian_variance of {who}"]["mean"] for who in ("real", "real, 4 x 4 blocks"))
    return _part(
        numbers,
        [],
        f"Sharpness is no quality: real slices have a Laplacian variance of {real:.0f}, the same in blocks of 4 x 4"
        f" pixels, a sixteenth of the information, {fooled:.0f}.",
    )


def neighbours(m: Material) -> dict[str, Any]:
    """The nearest training slices of samples."""
    s = m.settings
    n = min(MEMORISED, s.n)
    found = memorisation(m.pipeline, m.data, m.out / "neighbours", n=n, seed=s.seed, steps=s.steps, progress=False)
    numbers = {
        f"{by}: {who}, {name}": found[by][who][name]
        for by in ("pixels", "latents")
        for who in ("samples", "asked", "unseen")
        if who in found[by]
        for name in ("min", "median")
    }
    kinds = [who for who in ("samples", "asked") if who in found["pixels"]]
    near = {by: sum(found[by][f"{who}_nearer_than_unseen_p1"] for who in kinds) for by in ("pixels", "latents")}
    numbers |= {"samples": len(kinds) * n} | {f"nearer than 99 of 100 unseen, by {by}": v for by, v in near.items()}
    chance = len(kinds) * n / 100
    many = max(near.values()) > chance + 3 * chance**0.5
    return _part(
        numbers,
        ["neighbours/neighbours.png"],
        f"{near['pixels']} by pixels and {near['latents']} by latents of {len(kinds) * n} samples lie nearer to one of"
        f" {found['training_slices']} training slices than 99 of 100 unseen slices do; by chance it were about"
        f" {chance:.1f}: {'look at these for copies' if many else 'nothing speaks for copies'}.",
    )


def epsilon_of(x: Tensor, output: Tensor, alpha: Tensor, kind: str) -> Tensor:
    """The noise that a prediction means: epsilon itself, `(x - sqrt(a) x0) / sqrt(1 - a)`, or `sqrt(a) v + sqrt(1 - a)
    x`."""
    alpha = alpha.reshape(-1, *[1] * (x.ndim - 1))
    if kind == "epsilon":
        return output
    if kind == "sample":
        return (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x


def findings(m: Material) -> dict[str, Any]:
    """Where the documents contradict themselves, in figures of this model."""
    if m.pipeline.scheduler.config.prediction_type == "flow_prediction":
        return {"skipped": "the model is a flow; the documents speak of schedules of betas"}
    unet, c = m.pipeline.unet.eval(), m.pipeline.scheduler.config
    device = next(unet.parameters()).device
    alphas = m.pipeline.scheduler.alphas_cumprod.to(device)
    kind = c.prediction_type
    z = (m.posterior[0][:PREDICTED] * m.pipeline.vae.config.scaling_factor).to(device).contiguous()
    points = []
    with torch.no_grad():
        for t in torch.linspace(0, len(alphas) - 1, 16, device=device).long():
            at = t.expand(len(z)).contiguous()
            x, noise = diffuse(z, at, alphas, m.settings.seed, stream=int(t), prediction_type="epsilon")
            error = epsilon_of(x, unet(x, at), alphas[at], kind) - noise
            zero = torch.zeros_like(error)
            points.append((float(error.square().mean()), float(spectral_mse_reference(error, zero))))
        path, times = _way(m, min(FOLLOWED, len(m.unseen)))
        asked = () if m.values is None else (m.values[: path.shape[1]].to(device),)
        rms = []
        for x, t in zip(path[:-1].to(device), times[:-1], strict=True):
            at = torch.full((len(x),), t, device=device)
            rms.append(epsilon_of(x, unet(x, at, *asked), alphas[at], kind).square().mean((1, 2, 3)).sqrt().cpu())
    height, width = z.shape[2:]
    ratio = [y / x / (height * width) for x, y in points]
    way = torch.stack(rms)
    stopped = int((way < THRESHOLD).any(0).sum())
    figures.save_figure(
        figures.draw_rescaling(points, height, width), m.out, "rescaling", m.note(f"{len(z)} latents a point")
    )
    figures.save_figure(figures.draw_gamma(), m.out, "gamma", "schedules of 1000 steps")
    figures.save_figure(
        figures.draw_stopping(times[:-1], way, THRESHOLD), m.out, "stopping", m.note(f"{way.shape[1]} samples")
    )
    return _part(
        {
            "equation 4 over H W times the error, least": min(ratio),
            "equation 4 over H W times the error, most": max(ratio),
            "least RMS of predicted noise": float(way.min()),
            f"samples of {way.shape[1]} that fall below {THRESHOLD}": stopped,
        },
        ["rescaling.svg", "gamma.svg", "stopping.svg"],
        f"001 equation 4 is {height} x {width} times the mean squared error at every timestep: it rescales the loss and"
        " weighs no frequency (Parseval).",
        "000's gamma factor is never above 1: it lowers early noise, raises none, and leaves more signal at the end.",
        f"The RMS of the predicted noise of {stopped} of {way.shape[1]} samples falls below 001's threshold of"
        f" {THRESHOLD}.",
    )


PARTS: dict[str, Part] = {
    "curves": curves,
    "samples": samples,
    "reconstruction": reconstruction,
    "trajectory": trajectory,
    "latents": latents,
    "spectra": spectra,
    "diversity": diversity,
    "distribution": distribution,
    "sharpness": sharpness,
    "memorisation": neighbours,
    "coherence": coherence,
    "findings": findings,
}
TITLES = {
    "curves": "Training (001, figure 1)",
    "samples": "Samples beside unseen slices (001, figure 2)",
    "reconstruction": "Reconstruction (001, figure 3)",
    "trajectory": "From noise to image (001, figure 4)",
    "latents": "Latents (001, figure 5)",
    "spectra": "Power spectra (001, figure 6)",
    "diversity": "Diversity (001, figure 7)",
    "distribution": "Distance to unseen slices",
    "sharpness": "Sharpness (002)",
    "memorisation": "Nearest training slices",
    "coherence": "Coherence of volumes",
    "findings": "What the documents say and what is measured",
}
