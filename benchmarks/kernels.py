"""The fused ops against eager PyTorch and torch.compile, in GB/s beside a copy of the same bytes; and their roofline on a T4.

python -m sbldm_fast.benchmarks.kernels > benchmarks/ROOFLINE.md
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend
from torch import Tensor

from .timing import interleaved, machine, summary

OPS = ("group_norm_silu", "ddim_step", "solver_step", "frequency_loss", "spectral_mse", "philox_normal", "diffuse")
RELATIVE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of the largest value: what an op's own rounding leaves
SAMPLE_SECONDS = 2e-3  # calls are bundled until a sample lasts this long
T4_BANDWIDTH = (220e9, 250e9)  # bytes/s that others have measured of 320e9 (Jia et al. 2019, arXiv:1903.07486, and later)
T4_FLOPS = 5e12  # float32 at the 990 MHz that a T4 sustains (ONNX Runtime's Stable Diffusion benchmarks lock it there), of 8.1e12 at boost
T4_LAUNCH = 3e-6  # seconds of the smallest kernel, an assumption


Providers = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """One problem: what must be moved and computed at the least, and who computes it; the first provider is the reference."""

    shape: str
    dtype: torch.dtype
    layout: str
    moved: int  # bytes
    flops: int
    launches: int  # of our op
    providers: Providers
    again: int = 0  # bytes that our op reads a second time
    own_stream: tuple[str, ...] = ()  # providers of other random numbers, which nothing can be compared with


def cases(op: str, device: torch.device, large: bool) -> Iterator[Case]:
    """The cases of `bench_<op>.py`: what the presets run, and with `large` one of 64 MB or more."""
    found: Iterator[Case] = importlib.import_module(f"{__package__}.bench_{op}").cases(device, large)
    return found


def on_device(device: torch.device) -> Sequence[torch.dtype]:
    """The dtypes worth timing: float32, and float16 but on a CPU."""
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16)


def ours(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with the Triton kernels, which is an error where they cannot run."""

    def run() -> Any:
        with backend("triton"):
            return call()

    return run


def bench_kernels(
    ops: Sequence[str] = OPS, *, rounds: int = 10, large: bool = True, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row for each op, case and provider: seconds a call, GB/s of the bytes that must move, and the fraction of a copy's rate.

    A provider whose output differs from the reference's gets no speed-up; one that cannot run is a row that says why. The speed-up is
    over eager PyTorch. Samples are bundles of calls of 2 ms or more, interleaved.

    Raises:
        ValueError: an unknown op, or rounds below 1.
    """
    if rounds < 1 or set(ops) - set(OPS):
        raise ValueError(f"ops, rounds: got {', '.join(ops)}, {rounds}, allowed are {', '.join(OPS)}, and 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for op in ops:
        for case in cases(op, device, large):
            say(f"{op} {case.shape} {case.layout} {str(case.dtype)[6:]}")
            common = {"target": "kernels", "run": run, "op": op, "shape": case.shape, "dtype": str(case.dtype)[6:], "layout": case.layout,
                      "device": str(device), "moved": case.moved, "env": machine()}  # fmt: skip
            rows += [common | row for row in _timed(case, device, rounds)]
    return rows


def _timed(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    # all cases of an op share the function that torch.compile is given: with their versions counted together, the ninth would run eagerly
    torch._dynamo.reset()
    source = torch.zeros(max(1, case.moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    providers = dict(case.providers) | {"copy": lambda: target.copy_(source)}
    outputs: dict[str, list[Tensor]] = {}
    failed: list[dict[str, Any]] = []
    bundles = {}
    for name, call in list(providers.items()):
        try:
            outputs[name] = [t.detach().float().cpu() for t in _tensors(call())]
            call()
            bundles[name] = max(1, round(SAMPLE_SECONDS / min(interleaved({name: call}, 3)[name])))
        except Exception as failure:  # one provider's failure is its row, not the end of the others
            failed.append({"provider": name, "absent": f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:160]}"})
            del providers[name]
    calls = {name: _bundled(call, bundles[name]) for name, call in providers.items()}
    seconds = {name: [t / bundles[name] for t in raw] for name, raw in interleaved(calls, rounds).items()}
    reference = next(iter(case.providers))
    medians = {name: summary(raw)["median_s"] for name, raw in seconds.items()}
    rows = []
    for name, raw in seconds.items():
        compared = name != "copy" and name not in case.own_stream and reference in outputs
        error = max(_relative(a, b) for a, b in zip(outputs[name], outputs[reference], strict=True)) if compared else None
        ok = error is not None and error <= RELATIVE[case.dtype]
        factor = medians["eager"] / medians[name] if ok and "eager" in medians else None
        rows.append(summary(raw) | {
            "provider": name, "gb_s": case.moved / medians[name] / 1e9, "of_copy": medians["copy"] / medians[name],
            "parity": {"against": reference, "error": error, "ok": ok} if compared else None, "speedup_over_eager": factor,
        })  # fmt: skip
    return rows + failed


def _bundled(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() else 0.0


def kernels_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line for each op, case and provider."""
    lines = ["| op | case | provider | µs | GB/s | of copy | × eager |", "|---|---|---|---:|---:|---:|---:|"]
    for r in rows:
        case = f"{r['op']} | {r['shape']} {r['layout']} {r['dtype']} | {r['provider']}"
        if "absent" in r:
            lines.append(f"| {case} | {r['absent']} | | | |")
        else:
            wrong = "" if not r["parity"] or r["parity"]["ok"] else "no parity"
            factor = f"{r['speedup_over_eager']:.2f}" if r["speedup_over_eager"] else wrong
            lines.append(f"| {case} | {1e6 * r['median_s']:.1f} | {r['gb_s']:.1f} | {r['of_copy']:.0%} | {factor} |")
    return "\n".join(lines)


def roofline() -> str:
    """The model of each op on a T4: bytes / bandwidth, flops / rate or launches, whichever is the largest. A model, not a measurement."""
    low, high = T4_BANDWIDTH
    lines = [
        "# Roofline of the ops on a T4\n",
        f"A **model**, not a measurement: the largest of bytes / ({low / 1e9:.0f} to {high / 1e9:.0f} GB/s), "
        f"flops / ({T4_FLOPS / 1e12:.0f} Tflop/s) and launches × {1e6 * T4_LAUNCH:.0f} µs (assumed).",
        "The basis of `frequency_loss`, 0.05 MB at 16x16 and 0.8 MB at 32x32, is read by every image and taken to come from the L2 cache.",
        "Rendered by `python -m sbldm_fast.benchmarks.kernels`, where the constants have their sources.\n",
        "| op | case | MB | Mflop | launches | predicted µs | bound by |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for op in OPS:
        for c in cases(op, torch.device("meta"), large=True):
            moved, flops, launches = c.moved + c.again, c.flops / T4_FLOPS, c.launches * T4_LAUNCH
            times = {"launches": (launches, launches), "memory": (moved / high, moved / low), "arithmetic": (flops, flops)}
            bound = max(times, key=lambda k: times[k][1])
            span = " to ".join(dict.fromkeys(f"{1e6 * t:.0f}" for t in times[bound]))
            case = f"{c.shape} {c.layout} {str(c.dtype)[6:]}"
            lines.append(f"| {op} | {case} | {moved / 1e6:.2f} | {c.flops / 1e6:.2f} | {c.launches} | {span} | {bound} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(roofline(), end="")
