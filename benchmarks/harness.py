"""The harness: warm up, compare, time in turns, and say of each provider what is known about its figure."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nvml import Gpu
from .rows import Row

THROTTLED = 0.75  # of the clock at the start
SPREAD = 0.10  # interquartile range beside the median above which a figure is marked
SETTLE = 0.1  # seconds before each sample on a CPU: the threads of ONNX Runtime go on spinning and would slow whoever comes next
SAMPLE_SECONDS = 2e-3  # short calls are bundled until a sample lasts this long

Output = Callable[[], Any]


class Absent(Exception):
    """A provider that is not there or cannot run here; the text says why. No failure."""


@dataclass(frozen=True)
class Case:
    """One provider's work.

    `build` prepares and returns what is timed; it may raise. `check` gives the result that is compared, if the timed call does not. The
    result must be as near to that of `against` as `tolerance` (relative to the largest value) and twice what the provider `plain`, the
    plain implementation in the same precision, is off. `against` None: nothing to compare with, and no speed-up. `approximate`: not
    to agree is no failure.
    """

    build: Callable[[], Output]
    against: str | None
    tolerance: float
    plain: str | None = None
    check: Callable[[], Any] | None = None
    dtype: str = "float32"
    approximate: bool = False


def measure(
    cases: Mapping[str, Case], *, rounds: int, base: str, device: torch.device, bundle: bool = False, cold: bool = False,
    energy: bool = False, say: Callable[[str], None] = lambda _: None,
) -> list[Row]:  # fmt: skip
    """A row for each case: warmed up one after the other, then timed in turns, every other round backwards, so that drift favours nobody.

    A row has the seconds (raw, median, p10, p90, interquartile range, n), `build_s`, `first_call_s` and `compile_s` (the first call
    beyond the median), `peak_bytes` on CUDA, `parity`, `speedup` over the case `base` (None without parity), `remarks`, with `cold` the
    seconds of single calls after the caches were flushed, and with `energy` the joules of a call where NVML counts them. `bundle`:
    calls of less than 2 ms are timed several at a time. A case that cannot run is a row with `absent` or `failed`, and why; a failure
    ends nothing but its own case.
    """
    gpu = Gpu() if device.type == "cuda" else None
    runs: dict[str, Output] = {}
    built: dict[str, Row] = {}
    results: dict[str, list[Tensor]] = {}
    lost: list[Row] = []

    def drop(name: str, error: BaseException) -> None:
        lost.append({"provider": name, "dtype": cases[name].dtype} | why_not(error))
        runs.pop(name, None)

    for name, case in cases.items():
        say(f"warming up: {name}")
        try:
            before, start = allocated(device), time.perf_counter()
            call = case.build()
            middle = time.perf_counter()
            results[name] = [t.detach().float().cpu().clone() for t in tensors((case.check or call)())]
            wait(device)
            built[name] = {"build_s": middle - start, "first_call_s": time.perf_counter() - middle}
            call()
            built[name]["peak_bytes"] = allocated(device, peak=True) - before if device.type == "cuda" else None
            times = max(1, round(SAMPLE_SECONDS / min(_seconds(call, device) for _ in range(3)))) if bundle else 1
            runs[name] = _several(call, times) if times > 1 else call
            built[name]["times"] = times
        except Exception as error:  # one provider's failure is its row, not the end of the others
            drop(name, error)
    say(f"timing: {rounds} rounds of {len(runs)} providers")
    clocks: list[int] = []
    others = 0
    raw: dict[str, list[float]] = {name: [] for name in runs}
    for i, name in enumerate(turns(list(runs), rounds)):
        if name not in runs:
            continue
        time.sleep(SETTLE if device.type == "cpu" and not bundle else 0.0)
        try:
            raw[name].append(_seconds(runs[name], device) / built[name]["times"])
        except Exception as error:  # likewise: memory may run out late
            drop(name, error)
        if gpu and i % len(raw) == 0:
            clocks += [clock] if (clock := gpu.clock()) else []
            others = max(others, gpu.others() or 0)
    flushed = _cold({name: run for name, run in runs.items() if built[name]["times"] > 1}, rounds, device) if cold else {}
    idle = gpu.idle_watts() if gpu and energy else None
    rows = []
    for name, run in runs.items():
        case, s = cases[name], summary(raw[name])
        row = s | {"provider": name, "dtype": case.dtype, "compile_s": max(0.0, built[name]["first_call_s"] - s["median_s"])}
        row |= {key: built[name][key] for key in ("build_s", "first_call_s", "peak_bytes")}
        row["parity"] = _parity(name, cases, results)
        if case.approximate:
            row["approximate"] = True
        factor = summary(raw[base])["median_s"] / s["median_s"] if base in runs and row["parity"] and row["parity"]["ok"] else None
        row["speedup"] = {"over": base, "factor": factor} if factor else None
        row["remarks"] = _remarks(s, clocks, others)
        if clocks:
            row["clock_mhz"] = [clocks[0], min(clocks), clocks[-1]]
        if name in flushed:
            row["cold"] = summary(flushed[name])
        if gpu and energy:
            row["energy"] = gpu.energy(run, idle)
        rows.append(row)
    order = list(cases)
    return sorted(rows + lost, key=lambda row: order.index(row["provider"]))


def why_not(error: BaseException) -> Row:
    """What a row says of a provider that raised: `absent` with the reason, or `failed`."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if isinstance(error, Absent):
        return {"absent": text}
    return {"absent": f"not installed ({text})"} if isinstance(error, ImportError) else {"failed": f"{type(error).__name__}: {text}"}


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """The names in turn, `rounds` times, every other round backwards: A B B A A B, so that drift favours nobody."""
    names = list(names)
    for i in range(rounds):
        yield from names if i % 2 == 0 else names[::-1]


def interleaved(calls: Mapping[str, Output], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, in turns."""
    raw: dict[str, list[float]] = {name: [] for name in calls}
    for name in turns(calls, rounds):
        raw[name].append(_seconds(calls[name], device))
    return raw


def summary(raw: Sequence[float]) -> Row:
    """Median, p10, p90, interquartile range and n of `raw`, in seconds, with the raw values."""
    t = torch.tensor(raw, dtype=torch.float64)
    p10, q1, median, q3, p90 = torch.quantile(t, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    return {"median_s": median, "p10_s": p10, "p90_s": p90, "iqr_s": q3 - q1, "n": len(raw), "raw_s": [round(v, 9) for v in raw]}


def failures(rows: Sequence[Row]) -> list[str]:
    """Who failed or was wrong: what the exit code tells."""
    return [f"{r['provider']}: {r['failed']}" for r in rows if "failed" in r] + [
        f"{r['provider']}: differs from {r['parity']['against']} by {r['parity']['error']:.1e}, allowed is {r['parity']['allowed']:.1e}"
        for r in rows
        if r.get("parity") and not r["parity"]["ok"] and not approximate(r)
    ]  # fmt: skip


def approximate(row: Row) -> bool:
    """Whether a row's provider is another function by design; the first rows of int8 had no mark of it."""
    return bool(row.get("approximate", "int8" in row["provider"]))


def tensors(out: Any) -> list[Tensor]:
    """The tensors of a result: one, or several."""
    return [out] if isinstance(out, Tensor) else list(out)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value of b; what is not finite is infinitely wrong."""
    if not a.numel():
        return 0.0
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes of tensors on the CUDA device now, or at their most since the last call without `peak`; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _seconds(call: Output, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def _several(call: Output, times: int) -> Output:
    def run() -> None:
        for _ in range(times):
            call()

    run.call = call  # type: ignore[attr-defined]  # the single call, for the cold measurement
    return run


def _cold(runs: Mapping[str, Any], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of single calls, each after the last level of cache was written over; on CUDA between events on the stream."""
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    raw: dict[str, list[float]] = {name: [] for name in runs}
    for name in turns(runs, rounds):
        flush.zero_()
        if device.type != "cuda":
            raw[name].append(_seconds(runs[name].call, device))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[name].call()
        end.record()
        end.synchronize()
        raw[name].append(start.elapsed_time(end) / 1e3)
    return raw


def cache_bytes(device: torch.device) -> int:
    """The last level of cache: L2 of a GPU, L3 of a processor (64 MiB where it does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 64 * 2**20


def _parity(name: str, cases: Mapping[str, Case], results: Mapping[str, list[Tensor]]) -> Row | None:
    case = cases[name]
    if case.against is None:
        return None

    wanted = results.get(case.against)

    def off(who: str) -> float:
        if who not in results or wanted is None:
            return math.inf
        return max(relative(a, b) for a, b in zip(results[who], wanted, strict=True))

    error, plain = off(name), off(case.plain or "")
    # a plain implementation that failed allows nothing more
    allowed = case.tolerance + (2 * plain if math.isfinite(plain) else 0.0)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in results[name])).hexdigest()[:16]
    return {"against": case.against, "error": error, "allowed": allowed, "ok": error <= allowed, "sha256": digest}


def _remarks(s: Row, clocks: Sequence[int], others: int) -> list[str]:
    remarks = []
    if s["iqr_s"] > SPREAD * s["median_s"]:
        remarks.append(f"spread {s['iqr_s'] / s['median_s']:.0%}")
    if clocks and min(clocks) < THROTTLED * clocks[0]:
        remarks.append(f"throttled: the clock fell to {min(clocks) / clocks[0]:.0%} of its start")
    if others:
        remarks.append(f"{others} other process{'es' if others > 1 else ''} on the GPU")
    return remarks
