"""The pictures of the report: SVG drawn by matplotlib, in colours that the page's theme decides, each mark linked to
its row.

python -m sbldm_fast.benchmarks.charts ROWS benchmarks/waterfall.svg     of sampling; a test fails when both differ
python -m sbldm_fast.benchmarks.charts ROWS benchmarks/pareto.svg        of solvers
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, ScalarFormatter

from sbldm_fast.errors import UserError
from sbldm_fast.files import whole_file

from .rows import Row, latest, read_rows
from .t4 import Ceilings
from .table import fastest, groups, missing, pareto

# stand-ins for the page's variables
INK, GRID, OURS, PEER, FAINT = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
THEME = {INK: "currentColor", GRID: "var(--grid)", OURS: "var(--ours)", PEER: "var(--peer)", FAINT: "var(--faint)"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
CROWDED = ("ddim trailing", "dpm", "unipc order 2", "unipc linspace", "unipc Karras", "unipc last sigma")
MARKS = "osD^vP*X<>hdp8"
Link = Callable[[Row], str]

# from the textbook's loop to one graph: what each stage is called, and the provider that is it
WATERFALL = (
    ("eager, step by step", "reference{half}"),
    ("+ channels_last", "reference channels_last"),
    ("+ torch.compile", "reference channels_last{half} torch.compile"),
    ("+ fused norms", "reference channels_last{half} torch.compile fused norms"),
    ("+ time hoisted, solver fused", "FastSampler compile {dtype}"),
    ("+ step graph", "FastSampler step-graph+compile {dtype}"),
    ("+ loop graph", "FastSampler loop-graph+compile {dtype}"),
)


def waterfall(rows: Sequence[Row], dtype: str, link: Link) -> str | None:
    """ms a latent, stage by stage, of the smallest batch; a stage that this machine lacks says why."""
    chosen = [r for r in rows if r["batch"] == min(r["batch"] for r in rows)]
    by_name = {r["provider"]: r for r in chosen}
    half = "" if dtype == "float32" else f" {dtype}"
    # a model in half precision is channels_last from the start
    chain = [stage for stage in WATERFALL if not (half and stage[0] == "+ channels_last")]
    stages = [(label, by_name.get(name.format(half=half, dtype=dtype))) for label, name in chain]
    stages = [(label, r) for label, r in stages if r is not None]
    if sum("median_s" in r for _, r in stages if r) < 2:
        return None
    own, peer = fastest(chosen, dtype)
    if own is not None and own not in [r for _, r in stages]:
        stages.append((f"fastest of ours: {own['provider']}", own))
    if peer is not None:
        stages.append((f"fastest peer: {peer['provider']}", peer))
    fig, ax = _figure(0.34 * len(stages) + 0.7)
    first = next(r for _, r in stages if r and "median_s" in r)
    longest = max(1e3 * max(r["p90_s"], r["median_s"]) / r["batch"] for _, r in stages if r and "median_s" in r)
    for i, (_, r) in enumerate(stages):
        assert r is not None  # filtered above
        if missing(r):
            ax.text(0, i, f" not here: {missing(r).split(' (')[0]}", va="center", color=FAINT, fontsize=8)
            continue
        bar = ax.barh(
            i,
            r["ms_per_image"],
            color=OURS if r.get("family") in ("ours", "reference") else PEER,
            height=0.62,
        )[0]
        bar.set_url(link(r))
        ax.plot([1e3 * r["p10_s"] / r["batch"], 1e3 * r["p90_s"] / r["batch"]], [i, i], color=INK, lw=1)
        ax.text(
            longest * 1.03,
            i,
            f"{r['ms_per_image']:.0f} ms  {first['median_s'] / r['median_s']:.2f}×",
            va="center",
            ha="left",
        )
    ax.set_yticks(range(len(stages)), [label for label, _ in stages])
    ax.invert_yaxis()
    ax.set_xlim(0, longest * 1.55)
    ax.set_xlabel(f"ms a latent, {dtype}; line: p10 to p90")
    return _svg(fig, "waterfall" + dtype)


def by_batch(rows: Sequence[Row], link: Link) -> str | None:
    """Latency of a batch and images/s against the batch, of what people would choose: ours and the peers, in each
    precision the two that are fastest at the largest batch."""
    found: dict[str, list[Row]] = {}
    for r in sorted((r for r in rows if "median_s" in r), key=lambda r: int(r["batch"])):
        found.setdefault(r["provider"], []).append(r)
    of_kind: dict[tuple[str, str], list[str]] = {}
    for name, rs in sorted(found.items(), key=lambda item: item[1][-1]["median_s"] / item[1][-1]["batch"]):
        if len(rs) > 1 and rs[0].get("family") in ("ours", "peer") and not rs[0].get("decodes"):
            of_kind.setdefault((rs[0]["family"], rs[0]["dtype"]), []).append(name)
    chosen = {name for names in of_kind.values() for name in names[:2]}
    lines = {name: rs for name, rs in found.items() if name in chosen}
    if not lines:
        return None
    fig, (left, right) = _figure(3.4, 2)
    for mark, (name, rs) in zip(MARKS * 2, lines.items(), strict=False):
        color = OURS if rs[0]["family"] == "ours" else PEER
        for ax, key in ((left, "median_s"), (right, "images_per_s")):
            y = [1e3 * r["median_s"] if key == "median_s" else r["batch"] / r["median_s"] for r in rs]
            points = list(zip((r["batch"] for r in rs), y, rs, strict=True))
            style = "-" if rs[0]["dtype"] == "float32" else "--"
            ax.plot([x for x, _, _ in points], y, color=color, lw=0.8, ls=style)
            _points(ax, points, link, mark, color, name)
    for ax, what in ((left, "ms a batch"), (right, "images/s")):
        ax.set(xscale="log", xlabel="batch", ylabel=what)
        ax.set_ylim(bottom=0)
        ax.set_xticks(sorted({r["batch"] for rs in lines.values() for r in rs}), minor=False)
        ax.get_xaxis().set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.grid(lw=0.5)
    _legend(fig, left, 2)
    return _svg(fig, "batch")


def roofline_chart(rows: Sequence[Row], on: Ceilings, link: Link) -> str | None:
    """Operations/s against operations per byte of our ops and steps, below the ceilings that were measured here."""
    points: dict[str, list[tuple[float, float, Row]]] = {}
    for r in rows:
        if "median_s" not in r:
            continue
        if r["target"] == "kernels" and r.get("flops") and r.get("family") in ("ours", "reference"):
            points.setdefault(f"ops, {r['provider']}", []).append(
                (r["flops"] / r["moved"], r["flops"] / r["median_s"], r)
            )
        elif r["target"] == "sampling" and "work" in r:
            work, took = r["work"], r["median_s"] / r["steps"]
            points.setdefault("a step of FastSampler", []).append(
                (work["flops"] / work["bytes"], work["flops"] / took, r)
            )
    if not points:
        return None
    fig, ax = _figure(3.6)
    low, high = 0.05, max(300.0, *(x for found in points.values() for x, _, _ in found))
    for name, rate in on.flops.items():
        ridge = rate / on.bandwidth[0]
        ax.plot(
            [low, ridge, high],
            [low * on.bandwidth[0], rate, rate],
            color=INK,
            lw=1,
            ls="-" if name == "float32" else "--",
        )
        ax.text(high, rate * 1.12, f"{name} {rate / 1e12:.2g} Tflop/s", ha="right", fontsize=8)
    ax.text(low * 1.1, low * on.bandwidth[0] * 2.4, f"copy {on.bandwidth[0] / 1e9:.3g} GB/s", rotation=32, fontsize=8)
    for mark, (name, found) in zip(MARKS, points.items(), strict=False):
        color = PEER if name == "ops, reference" else OURS
        _points(ax, found, link, mark, color, name)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations/s")
    ax.grid(lw=0.5)
    _legend(fig, ax, 3)
    return _svg(fig, "roofline")


def pareto_chart(rows: Sequence[Row], link: Link) -> str | None:
    """Error against time of each solver, who is on the front in our colour; calls beside the points of those that
    differ enough to be told apart."""
    rows = [r for r in rows if "rms" in r]
    if not rows:
        return None
    front = pareto(rows)
    fig, ax = _figure(4.6)
    for mark, solver in zip(MARKS, dict.fromkeys(r["solver"] for r in rows), strict=False):
        of = sorted((r for r in rows if r["solver"] == solver), key=lambda r: int(r["steps"]))
        ax.plot([r["ms_per_image"] for r in of], [r["rms"] for r in of], color=PEER, lw=0.7)
        for r in of:
            color, label = OURS if r["provider"] in front else PEER, solver if r is of[0] else ""
            _points(ax, [(r["ms_per_image"], r["rms"], r)], link, mark, color, label)
            if solver in CROWDED:
                continue
            calls = f"{r.get('calls', r['steps']):.0f}"
            place = (r["ms_per_image"], r["rms"])
            ax.annotate(calls, place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="ms an image", ylabel="RMS from 1000 steps of DDIM")
    ax.grid(lw=0.5)
    _plain(ax.xaxis, ax.yaxis)
    _legend(fig, ax, 3)
    return _svg(fig, "pareto")


def cost_chart(rows: Sequence[Row], link: Link) -> str | None:
    """Cost of an image against how many are made, start of the process and compiling included; hollow: extrapolated."""
    costs = [r for r in rows if "cost" in r]
    if not costs:
        return None
    fig, ax = _figure(3.2)
    for mark, r in zip(MARKS, costs, strict=False):
        color = OURS if r.get("family") == "ours" else PEER
        ax.plot([c["images"] for c in r["cost"]], [c["ms_per_image"] for c in r["cost"]], color=color, lw=0.8)
        for c in r["cost"]:
            label = r["provider"] if c is r["cost"][0] else ""
            _points(ax, [(c["images"], c["ms_per_image"], r)], link, mark, color, label, hollow=c["extrapolated"])
    ax.set(xscale="log", yscale="log", xlabel="images", ylabel="ms an image, everything included")
    ax.grid(lw=0.5)
    _plain(ax.yaxis)
    _legend(fig, ax, 2)
    return _svg(fig, "cost")


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    mpl.rcParams.update(STYLE)  # type: ignore[arg-type]  # its stub wants each key as a literal
    fig = Figure(figsize=(5.2, height), layout="constrained")
    return fig, fig.subplots(1, columns)


def _points(
    ax: Axes,
    points: Sequence[tuple[float, float, Row]],
    link: Link,
    mark: str,
    color: str,
    label: str,
    hollow: bool = False,
) -> None:
    """Marks at x and y, each linked to its row."""
    x, y = [x for x, _, _ in points], [y for _, y, _ in points]
    faces = "none" if hollow else color
    drawn = ax.scatter(x, y, s=22, marker=mark, facecolors=faces, edgecolors=color, label=label or None, zorder=3)
    drawn.set_urls([link(r) for _, _, r in points])


def _plain(*axes: Axis) -> None:
    """A logarithmic axis with numbers that are read at a glance: 20, 50, 100."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _legend(fig: Figure, ax: Axes, columns: int) -> None:
    fig.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, handletextpad=0.2
    )


def _svg(fig: Figure, salt: str) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        fig.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text))
    for stand_in, value in THEME.items():
        text = text.replace(stand_in, value)
    return text


def standalone(rows: Path) -> str:
    """The float32 waterfall of a row file, or the front of its solvers, as a picture of its own, in the colours of
    light and dark pages.

    Raises:
        ValueError: the file cannot be read, or holds nothing for it.
    """
    found = groups(latest(read_rows(rows)[0]))
    front = bool(found) and found[0][0]["target"] == "solvers"
    svg = (
        pareto_chart(found[0], lambda _: "")
        if front
        else waterfall(found[0], "float32", lambda _: "")
        if found
        else None
    )
    if svg is None:
        raise UserError(f"{rows} holds no waterfall and no front, allowed are rows of bench sampling or bench solvers")
    light = "--grid:#d9dde3;--ours:#0b7a75;--peer:#9aa3b2;--faint:#6b7484;color:#1c2430"
    dark = "--grid:#39424f;--ours:#3fc1b0;--peer:#7b8698;--faint:#98a2b3;color:#e4e7ec"
    style = f"<style>svg{{{light}}}text{{fill:currentColor}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1)


if __name__ == "__main__":
    picture = standalone(Path(sys.argv[1]))
    with whole_file(sys.argv[2]) as aside:
        aside.write_text(picture)
