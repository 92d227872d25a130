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

from sbldm_fast.sampling.loop import capture

from .nvml import Gpu
from .rows import Row

THROTTLED = 0.75  # of the clock at the start
SPREAD = 0.10  # interquartile range beside the median above which a figure is marked
# seconds before each sample on a CPU: the threads of ONNX Runtime go on spinning and would slow whoever comes next
SETTLE = 0.1
SAMPLE_SECONDS = 2e-3  # short calls are bundled until a sample lasts this long

ROUNDS_AT_LEAST = 3  # also where the time is over
CAPTURED = 20  # calls in one graph
# cycles that the GPU waits before a cold call: longer than Python takes for a forward and a backward pass
AHEAD = 10_000_000
LOST = 0.02  # relative: more than this no precision may lose, whatever the plain implementation loses

Output = Callable[[], Any]


class Absent(Exception):
    """A provider that is not there or cannot run here; the text says why. No failure."""


@dataclass(frozen=True)
class Case:
    """One provider's work.

    `build` prepares and returns what is timed; it may raise. `check` gives the result that is compared, if the timed
    call does not. The result must be as near to that of `against` as `tolerance` (relative to the largest value) and
    twice what the provider `plain`, the plain implementation in the same precision, is off. `against` None: nothing to
    compare with, and no speed-up. `approximate`: not to agree is no failure.
    """

    build: Callable[[], Output]
    against: str | None
    tolerance: float
    plain: str | None = None
    check: Callable[[], Any] | None = None
    dtype: str = "float32"
    approximate: bool = False


def measure(
    cases: Mapping[str, Case],
    *,
    rounds: int,
    base: str,
    device: torch.device,
    seconds: float = math.inf,
    bundle: bool = False,
    cold: bool = False,
    energy: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each case: warmed up one after the other, then timed in turns, every other round backwards, so that
    drift favours nobody.

    After `seconds` of timing, or an interrupt (Ctrl-C), no further round begins, though three are made of what was
    warmed up; the rows after an interrupt say `interrupted`, and whoever asked for them asks for no more.

    A row has the seconds (raw, median, p10, p90, interquartile range, n), `build_s`, `first_call_s` and `compile_s`
    (the first call beyond the median), on CUDA `peak_bytes` of building and two calls beyond what was there, `parity`
    of the first and the last call, `speedup` over the case `base` (None without parity), `remarks`, with `cold` the
    seconds of single calls after the caches were flushed, and with `energy` the joules of a call where NVML counts
    them. `bundle`: calls of less than 2 ms are timed several at a time, one after the other; on CUDA from one captured
    graph of `CAPTURED` calls, as a Python call takes longer than a small kernel, or from Python where that fails
    (`timed` says). A case that cannot run is a row with `absent` or `failed`, and why; a failure ends nothing but its
    own case. TF32 is off, so that float32 means float32.
    """
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return _measure(cases, rounds, base, device, seconds, bundle, cold, energy, say)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _measure(
    cases: Mapping[str, Case],
    rounds: int,
    base: str,
    device: torch.device,
    limit: float,
    bundle: bool,
    cold: bool,
    energy: bool,
    say: Callable[[str], None],
) -> list[Row]:
    gpu = Gpu() if device.type == "cuda" else None
    calls: dict[str, Output] = {}
    single: dict[str, Output] = {}
    rows: dict[str, Row] = {}
    results: dict[str, list[Tensor]] = {}
    times: dict[str, int] = {}
    clocks: list[int] = []
    others, stopped = 0, False

    def drop(name: str, error: BaseException) -> None:
        rows[name] = {"provider": name, "dtype": cases[name].dtype} | why_not(error)
        calls.pop(name, None)

    def look() -> None:
        nonlocal others
        if gpu:
            clocks.extend([clock] if (clock := gpu.clock()) else [])
            others = max(others, gpu.others() or 0)

    for name, case in cases.items():
        say(f"warming up: {name}")
        row: Row = {"provider": name, "dtype": case.dtype}
        rows[name] = row
        if stopped:
            row |= {"absent": "interrupted before its turn", "interrupted": True}
            continue
        try:
            before = allocated(device)
            start = time.perf_counter()
            call = case.build()
            middle = time.perf_counter()
            result = (case.check or call)()
            wait(device)
            row |= {"build_s": middle - start, "first_call_s": time.perf_counter() - middle}
            results[name] = host(result) if case.against else []
            call()
            row["peak_bytes"] = allocated(device, peak=True) - before if device.type == "cuda" else None
            times[name], single[name] = 1, call
            if bundle:
                call, times[name], row["timed"] = bundled(call, device)
            calls[name] = call
        except KeyboardInterrupt:
            stopped = True
            row |= {"absent": "interrupted before its turn", "interrupted": True}
        except Exception as error:  # one provider's failure is its row, not the end of the others
            drop(name, error)
        if not clocks:
            look()  # before the board is warm
    say(f"timing: {rounds} rounds of {len(calls)} providers")
    raw: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, Any] = {}
    begun = time.perf_counter()
    for i, name in enumerate(turns(list(calls), rounds)):
        if i % len(raw) == 0:
            look()
            if i >= ROUNDS_AT_LEAST * len(raw) and (stopped or time.perf_counter() - begun > limit):
                break
        if name not in calls:  # dropped meanwhile
            continue
        try:
            time.sleep(SETTLE if device.type == "cpu" and not bundle else 0.0)
            seconds, last[name] = _seconds(calls[name], device)
            raw[name].append(seconds / times[name])
        except KeyboardInterrupt:
            stopped = True
        except Exception as error:  # likewise: memory may run out late
            drop(name, error)
    look()
    idle = gpu.idle_watts() if gpu and energy else None
    for name in [name for name in calls if not raw[name]]:
        rows[name] = {
            "provider": name,
            "dtype": cases[name].dtype,
            "absent": "interrupted before its turn",
            "interrupted": True,
        }
        del calls[name]
    median = {name: summary(raw[name])["median_s"] for name in calls}
    for name in list(calls):
        case, found, s = cases[name], rows[name], summary(raw[name])
        found |= s | {"remarks": _remarks(s, clocks, others)} | ({"interrupted": True} if stopped else {})
        found["compile_s"] = None if case.check else max(0.0, found["first_call_s"] - s["median_s"])
        if clocks:
            found["clock_mhz"] = {"start": clocks[0], "median": sorted(clocks)[len(clocks) // 2], "least": min(clocks)}
        if case.approximate:
            found["approximate"] = True
        try:
            # what drifted since the first call has no parity either; a bundle's state may go on from call to call, a
            # curve is a check's own
            drifted = host(last[name]) if case.against and not case.check and not bundle else results[name]
            found["parity"] = parity(case, results | {name: results[name] + drifted}, results, name)
            if found["parity"] and found["parity"]["ok"] and base in median:
                found["speedup"] = {"over": base, "factor": median[base] / s["median_s"]}
            else:
                found["speedup"] = None
            if cold:
                found["cold"] = summary(_cold(single[name], rounds, device))
            if gpu and energy:
                found["energy"] = gpu.energy(single[name], idle)
        except Exception as error:  # likewise
            drop(name, error)
    return list(rows.values())


def interrupted(rows: Sequence[Row]) -> bool:
    """Whether an interrupt came while the rows were measured."""
    return any(row.get("interrupted") for row in rows)


def why_not(error: BaseException) -> Row:
    """What a row says of a provider that raised: `absent` with the reason, or `failed`."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if isinstance(error, Absent):
        return {"absent": text}
    return (
        {"absent": f"not installed ({text})"}
        if isinstance(error, ImportError)
        else {"failed": f"{type(error).__name__}: {text}"}
    )


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """The names in turn, `rounds` times, every other round backwards: A B B A A B, so that drift favours nobody."""
    names = list(names)
    for i in range(rounds):
        yield from names if i % 2 == 0 else names[::-1]


def interleaved(calls: Mapping[str, Output], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, in turns."""
    raw: dict[str, list[float]] = {name: [] for name in calls}
    for name in turns(calls, rounds):
        raw[name].append(_seconds(calls[name], device)[0])
    return raw


def summary(raw: Sequence[float]) -> Row:
    """Median, p10, p90, interquartile range and n of `raw`, in seconds, with the raw values."""
    t = torch.tensor(raw, dtype=torch.float64)
    p10, q1, median, q3, p90 = torch.quantile(
        t, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    ).tolist()
    return {
        "median_s": median,
        "p10_s": p10,
        "p90_s": p90,
        "iqr_s": q3 - q1,
        "n": len(raw),
        "raw_s": [round(v, 9) for v in raw],
    }


def failures(rows: Sequence[Row]) -> list[str]:
    """Who failed or was wrong: what the exit code tells."""
    wrong = [r for r in rows if r.get("parity") and not r["parity"]["ok"] and not approximate(r)]
    return [f"{r['provider']}: {r['failed']}" for r in rows if "failed" in r] + [
        f"{r['provider']}: {difference(r)}" for r in wrong
    ]


def difference(row: Row) -> str:
    """How far a provider is from what it must equal; an error of None is one that is not finite, or of another
    shape."""
    p = row["parity"]
    off = "beyond measure" if p["error"] is None else f"by {p['error']:.1e}"
    return f"differs from {p['against']} {off}, allowed is {p['allowed']:.1e}"


def approximate(row: Row) -> bool:
    """Whether a row's provider is another function by design; the first rows of int8 had no mark of it."""
    return bool(row.get("approximate", "int8" in row["provider"]))


def host(out: Any) -> list[Tensor]:
    """The tensors of a result, one or several, as float32 on the processor, copied."""
    return [t.detach().float().cpu().clone() for t in ([out] if isinstance(out, Tensor) else out)]


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value of b; infinite for another shape or number, and where it is
    not finite."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf
    errors = [
        float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in zip(a, b, strict=True) if x.numel()
    ]
    return max((e if math.isfinite(e) else math.inf for e in errors), default=0.0)


def parity(
    case: Case, got: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]], name: str
) -> Row | None:
    """Whether `name`'s result is that of the case it is held against; `got` may hold several results of it, one after
    the other."""
    if case.against is None:
        return None
    right = wanted.get(case.against, [])

    def off(results: Sequence[Tensor]) -> float:
        several = [results[i : i + len(right)] for i in range(0, len(results), len(right))] if right else []
        return max((relative(one, right) for one in several), default=math.inf)

    error, plain = off(got[name]), off(wanted.get(case.plain or "", []))
    # a plain implementation that failed allows nothing more, and none allows more than LOST
    allowed = case.tolerance + (min(2 * plain, LOST) if math.isfinite(plain) else 0.0)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in wanted[name])).hexdigest()[:16]
    return {
        "against": case.against,
        "error": error if math.isfinite(error) else None,
        "allowed": allowed,
        "ok": error <= allowed,
        "sha256": digest,
    }


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


def _seconds(call: Output, device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    out = call()
    wait(device)
    return time.perf_counter() - start, out


def bundled(call: Output, device: torch.device) -> tuple[Output, int, str]:
    """A call that lasts `SAMPLE_SECONDS` or more, how many of `call` it makes, and how: captured, or from Python."""
    inner, how = 1, "from Python"
    if device.type == "cuda":
        try:
            call, inner, how = (
                capture(_several(call, CAPTURED), lambda: None, device, None),
                CAPTURED,
                f"captured, {CAPTURED} calls a graph",
            )
        except RuntimeError as error:  # a provider that waits for the device, or asks it something
            torch.cuda.synchronize(device)
            how = f"from Python: {str(error).strip().splitlines()[0][:120]}"
    outer = max(1, round(SAMPLE_SECONDS / min(_seconds(call, device)[0] for _ in range(3))))
    return _several(call, outer), inner * outer, how


def _several(call: Output, times: int) -> Output:
    def run() -> Any:
        for _ in range(times - 1):
            call()
        return call()

    return run


def _cold(call: Output, rounds: int, device: torch.device) -> list[float]:
    """Seconds of single calls, each after the last level of cache was written over; on CUDA between events on a busy
    stream."""
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    raw = []
    for _ in range(rounds):
        flush.zero_()
        if device.type != "cuda":
            raw.append(_seconds(call, device)[0])
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)  # the processor runs ahead meanwhile, so that its launches are not in the time
        start.record()
        call()
        end.record()
        end.synchronize()
        raw.append(start.elapsed_time(end) / 1e3)
    return raw


def cache_bytes(device: torch.device) -> int:
    """The last level of cache: L2 of a GPU, L3 of a processor (64 MiB where it does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 64 * 2**20


def _remarks(s: Row, clocks: Sequence[int], others: int) -> list[str]:
    remarks = []
    if s["iqr_s"] > SPREAD * s["median_s"]:
        remarks.append(f"spread {s['iqr_s'] / s['median_s']:.0%}")
    if clocks and min(clocks) < THROTTLED * clocks[0]:
        remarks.append(f"throttled: the clock fell to {min(clocks) / clocks[0]:.0%} of its start")
    if others:
        remarks.append(f"{others} other process{'es' if others > 1 else ''} on the GPU")
    return remarks
