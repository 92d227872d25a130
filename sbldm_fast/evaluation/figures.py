"""The figures of 001, and those of where the documents contradict themselves.

Dark ink on white: they are read in print, and as a card on a dark page. Each says how many, of which seed, and that it
is synthetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from sbldm_fast.diffusion import NoiseSchedule
from sbldm_fast.files import whole_file
from sbldm_fast.images import NOTICE

from ..errors import MissingExtra

P = ParamSpec("P")
BESIDE = "real slices and what a network made of them; not for diagnosis"
INKS = {"real": "#1c2430", "samples": "#0b7a75", "reconstructions": "#c2410c", "training": "#6b7484"}
INKS |= {"reconstructed": "#c2410c", "together": "#0b7a75", "noise alone": "#8a63b8", "independent": "#6b7484"}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same letters on every machine
    "svg.hashsalt": "sbldm_fast",  # the same picture is the same file
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def _styled(draw: Callable[P, Any]) -> Callable[P, Any]:
    """The function, in our style; matplotlib's own settings stay as they are."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            import matplotlib as mpl
        except ImportError:
            raise MissingExtra("a figure", "matplotlib", "eval") from None
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return run


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes `[rows, columns]`, drawn with no window and no state of pyplot's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@_styled
def save_figure(figure: Any, folder: Path, name: str, note: str, notice: str = NOTICE) -> None:
    """Write `NAME.svg` and `NAME.png` with the note below the picture."""
    figure.supxlabel(f"{note}; {notice}", fontsize=7, color="#6b7484", x=0.01, ha="left")
    said = {"Description": notice}
    ways: dict[str, dict[str, Any]] = {
        "svg": {"metadata": said | {"Date": None}},
        "png": {"dpi": 130, "metadata": said},
    }
    for kind, how in ways.items():
        with whole_file(folder / f"{name}.{kind}") as aside:
            figure.savefig(aside, format=kind, facecolor="white", **how)


def _picture(ax: Any, image: Tensor, title: str = "", **how: Any) -> Any:
    ax.set_axis_off()
    ax.set_title(title, fontsize=7, pad=2)
    return ax.imshow(image.numpy(), **({"vmin": -1, "vmax": 1} | how))


def _name_row(ax: Any, name: str) -> None:
    ax.text(-0.06, 0.5, name, transform=ax.transAxes, rotation=90, va="center", ha="right", fontsize=8)


@_styled
def draw_curves(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Figure 1: of each stage the training and validation loss by step, and boxes of the training loss by quarter."""
    figure, axes = _figure(len(stages), 2, 8, 2.6 * len(stages))
    for (left, right), (name, rows) in zip(axes, stages.items(), strict=True):
        trained = [(r["step"], r["loss"]) for r in rows if "loss" in r]
        checked = [(r["step"], r["val"]) for r in rows if "val" in r]
        steps, losses = (np.array(v) for v in zip(*trained, strict=True))
        left.semilogy(steps, losses, color=INKS["training"], lw=0.8, label="training")
        if checked:
            left.semilogy(*zip(*checked, strict=True), "o-", ms=3, color=INKS["samples"], label="validation")
        left.set(xlabel="step", ylabel=f"{name}: loss")
        left.legend()
        right.boxplot([part for part in np.array_split(losses, 4) if len(part)], showfliers=False)
        right.set(yscale="log", xlabel="quarter of the run", ylabel="training loss")
    return figure


@_styled
def draw_grid(rows: Mapping[str, Tensor]) -> Any:
    """Figure 2 and others: rows of images with a name each."""
    columns = max(len(images) for images in rows.values())
    figure, axes = _figure(len(rows), columns, 0.95 * columns + 0.6, 1.1 * len(rows) + 0.3)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set_axis_off()
        for ax, image in zip(line, images, strict=False):
            _picture(ax, image[0])
        _name_row(line[0], name)
    return figure


@_styled
def draw_reconstructions(images: Tensor, back: Tensor, found: Tensor) -> Any:
    """Figure 3: slices, their reconstructions, and the error as a heatmap with its colours."""
    figure, axes = _figure(3, len(images), 1.1 * len(images) + 1, 4)
    error = (back - images).abs()
    for column, image, made, wrong, value in zip(axes.T, images, back, error, found.tolist(), strict=True):
        _picture(column[0], image[0])
        _picture(column[1], made[0], f"SSIM {value:.3f}")
        shown = _picture(column[2], wrong[0], cmap="inferno", vmin=0, vmax=float(error.quantile(0.999)))
    figure.colorbar(shown, ax=list(axes[2]), shrink=0.9, label="|error|, of 2")
    for ax, name in zip(axes[:, 0], ("slices", "reconstructed", "error"), strict=True):
        _name_row(ax, name)
    return figure


@_styled
def draw_trajectory(latents: Tensor, images: Tensor, times: Sequence[int]) -> Any:
    """Figure 4: of one sample the latent (its first channel) and what it decodes to, on its way from t = T to 0."""
    figure, axes = _figure(2, len(times), 1.15 * len(times) + 0.4, 2.7)
    for column, latent, image, t in zip(axes.T, latents, images, times, strict=True):
        _picture(column[0], latent[0], f"t = {t}", vmin=-3, vmax=3)
        _picture(column[1], image[0])
    for ax, name in zip(axes[:, 0], ("latent, channel 0", "decoded"), strict=True):
        _name_row(ax, name)
    return figure


@_styled
def draw_latents(channels: Tensor, spatial: Tensor, kl: Tensor, components: Tensor, share: Tensor) -> Any:
    """Figure 5: values by channel `[C, values]`, variance by place `[h, w]`, KL `[N]`, and the first two principal
    components `[N, 2]` with all shares of the variance."""
    figure, axes = _figure(2, 2, 8, 5.4)
    (left, right), (below, last) = axes
    left.boxplot([c.numpy() for c in channels], showfliers=False)
    left.set(xlabel="channel", ylabel="scaled latent")
    shown = right.imshow(spatial.numpy(), cmap="viridis")
    right.set_axis_off()
    figure.colorbar(shown, ax=right, label="variance over slices")
    below.hist(kl.numpy(), bins=24, color=INKS["real"])
    below.set(xlabel="KL to N(0, 1), nats a slice", ylabel="slices")
    last.scatter(*components.T.numpy(), s=6, color=INKS["samples"])
    last.set(xlabel=f"PC 1, {100 * share[0]:.0f} % of the variance", ylabel=f"PC 2, {100 * share[1]:.0f} %")
    return figure


@_styled
def draw_spectra(spectra: Mapping[str, Tensor], bands: Mapping[str, tuple[int, int]]) -> Any:
    """Figure 6: mean power by radius of each set `[N, radii]`, from its tenth to its ninetieth in a hundred, and the
    bands."""
    figure, axes = _figure(1, 1, 7, 3.6)
    ax = axes[0, 0]
    for name, power in spectra.items():
        k = np.arange(1, power.shape[1])
        ax.loglog(k, power.mean(0)[1:].numpy(), color=INKS[name], label=name)
        low, high = (power.quantile(q, 0)[1:].numpy() for q in (0.1, 0.9))
        ax.fill_between(k, low, high, color=INKS[name], alpha=0.15, lw=0)
    for name, (start, stop) in bands.items():
        ax.axvline(stop, color="#d9dde3", lw=0.8)
        ax.text(max(1, start) * 1.05, ax.get_ylim()[0] * 1.5, name, fontsize=7, color="#6b7484")
    ax.set(xlabel="cycles a side", ylabel="|FFT|² / pixels")
    ax.legend()
    return figure


@_styled
def draw_reformats(volumes: Mapping[str, Tensor], tall: float) -> Any:
    """A coronal and a sagittal plane through the middle of each volume `[D, 1, H, W]`, whose slices are `tall` pixels
    apart."""
    depth, _, _, width = next(iter(volumes.values())).shape
    figure, axes = _figure(2, len(volumes), 2.1 * len(volumes), 4.2 * depth * tall / width + 0.6)
    for (upper, lower), (name, volume) in zip(axes.T, volumes.items(), strict=True):
        up = volume[:, 0].flip(0)
        _picture(upper, up[:, up.shape[1] // 2], name, aspect=tall)
        _picture(lower, up[:, :, up.shape[2] // 2], aspect=tall)
    for ax, name in zip(axes[:, 0], ("coronal", "sagittal, front left"), strict=True):
        _name_row(ax, name)
    return figure


@_styled
def draw_axis_spectra(spectra: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> Any:
    """Power along z of each volume of each set, at its frequencies, and the mean of the set."""
    figure, axes = _figure(1, 1, 7, 3.6)
    ax = axes[0, 0]
    for name, volumes in spectra.items():
        least = min((f for f, _ in volumes), key=len).numpy()
        each = np.stack([np.interp(least, f.numpy(), power.numpy()) for f, power in volumes])
        ax.semilogy(least[1:], np.nanmean(each, 0)[1:], color=INKS[name], label=name)
        ax.semilogy(least[1:], each[:, 1:].T, color=INKS[name], lw=0.4, alpha=0.3)
    ax.set(xlabel="cycles a mm along z", ylabel="power, mm")
    ax.legend()
    return figure


@_styled
def draw_histograms(measures: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Figure 7: of each measure the distribution over pairs, of each set."""
    figure, axes = _figure(1, len(measures), 3.4 * len(measures), 2.8)
    for ax, (name, sets) in zip(axes[0], measures.items(), strict=True):
        low, high = (float(f(torch.cat(list(sets.values())))) for f in (torch.min, torch.max))
        for who, values in sets.items():
            ax.hist(
                values.numpy(), bins=np.linspace(low, high, 30), color=INKS[who], alpha=0.55, label=who, density=True
            )
        ax.set(xlabel=name, yticks=[])
    axes[0, 0].legend()
    return figure


@_styled
def draw_rescaling(points: Sequence[tuple[float, float]], height: int, width: int) -> Any:
    """001 equation 4 against the mean squared error, at many timesteps: a line of slope H W."""
    figure, axes = _figure(1, 1, 4.2, 3.4)
    ax = axes[0, 0]
    x, y = (np.array(v) for v in zip(*points, strict=True))
    ax.loglog(x, y, "o", ms=4, color=INKS["samples"], label="predictions of this model, by timestep")
    ends = np.array([x.min(), x.max()])
    ax.loglog(ends, height * width * ends, color=INKS["real"], lw=0.8, label=f"{height} × {width} times the error")
    ax.set(xlabel="mean |ε - ε̂|²", ylabel="mean |FFT(ε) - FFT(ε̂)|²")
    ax.legend(fontsize=7)
    return figure


@_styled
def draw_gamma() -> Any:
    """000 section 3.5: beta and its factor for several gamma: none above 1, so no late noise is raised."""
    figure, axes = _figure(1, 2, 8, 3)
    linear = NoiseSchedule("linear").betas
    for gamma, colour in ((0.5, INKS["samples"]), (0.75, INKS["reconstructions"]), (1.0, INKS["training"])):
        schedule = NoiseSchedule("gamma", gamma=gamma)
        axes[0, 0].plot(schedule.betas / linear, color=colour, label=f"γ = {gamma}")
        end = float(schedule.alphas_cumprod64[-1])
        axes[0, 1].semilogy(schedule.alphas_cumprod64, color=colour, label=f"γ = {gamma}: ā_T = {end:.1e}")
    flat = NoiseSchedule("linear").alphas_cumprod64
    axes[0, 1].semilogy(flat, color=INKS["real"], label=f"linear: ā_T = {float(flat[-1]):.1e}")
    axes[0, 0].axhline(1, color=INKS["real"], lw=0.8)
    axes[0, 0].set(xlabel="t", ylabel="β over linear β")
    axes[0, 1].set(xlabel="t", ylabel="ā")
    for ax in axes[0]:
        ax.legend(fontsize=7)
    return figure


@_styled
def draw_stopping(times: Sequence[float], rms: Tensor, threshold: float) -> Any:
    """001's criterion: the RMS of ε̂ of each sample `[steps, N]` on its way, and the threshold below which it stops."""
    figure, axes = _figure(1, 1, 5.4, 3.2)
    ax = axes[0, 0]
    ax.plot(times, rms.numpy(), color=INKS["samples"], lw=0.6, alpha=0.6)
    ax.axhline(threshold, color=INKS["reconstructions"], label=f"threshold {threshold}")
    ax.invert_xaxis()
    ax.set(xlabel="t", ylabel="RMS of ε̂", ylim=(0, None))
    ax.legend()
    return figure
