"""The harness: warm up, compare, time in turns, and say of each provider what is known about its figure."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .nvml import Gpu
from .rows import Row
from .timing import Output, allocated, bundle_calls, cold_calls, remarks, seconds_of, summary, turns, wait

# seconds before each sample on a CPU: the threads of ONNX Runtime go on spinning and would slow whoever comes next
SETTLE = 0.1
ROUNDS_AT_LEAST = 3  # also where the time is over
LOST = 0.02  # relative: more than this no precision may lose, whatever the plain implementation loses


class Absent(Exception):
    """A provider that is not there or cannot run here; the text says why. No failure."""


@dataclass(frozen=True)
class Case:
    """One provider's work.

    Attributes:
        build: prepares and returns what is timed; it may raise.
        reference: the case whose result it must have; None: nothing to compare with, and no speed-up.
        tolerance: allowed difference, relative to the largest value; twice the error of `baseline` is added.
        baseline: the plain implementation in the same precision.
        check: gives the result that is compared, if the timed call does not.
        approximate: not to agree is no failure.
        about: keys of the row that say who it is, such as `family`.
    """

    build: Callable[[], Output]
    reference: str | None
    tolerance: float
    baseline: str | None = None
    check: Callable[[], Any] | None = None
    dtype: str = "float32"
    approximate: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """How cases are timed.

    Attributes:
        rounds: of all cases in turn.
        seconds: after which no further round begins.
        bundle: time calls of less than 2 ms several at a time, one after the other; on CUDA from one captured graph of
            `CAPTURED` calls, as a Python call takes longer than a small kernel, or from Python where that fails
            (`timed` says).
        cold: also single calls after the caches were flushed.
        energy: also the joules of a call, where NVML counts them.
    """

    rounds: int
    seconds: float = math.inf
    bundle: bool = False
    cold: bool = False
    energy: bool = False


def measure(
    cases: Mapping[str, Case],
    timing: Timing,
    *,
    base: str,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each case: warmed up one after the other, then timed in turns, every other round backwards, so that
    drift favours nobody.

    After the seconds of `timing`, or an interrupt (Ctrl-C), no further round begins, though three are made of what was
    warmed up; the rows after an interrupt say `interrupted`, and whoever asked for them asks for no more.

    A row has the seconds (raw, median, p10, p90, interquartile range, n), `build_s`, `first_call_s` and `compile_s`
    (the first call beyond the median), on CUDA `peak_bytes` of building and two calls beyond what was there, `parity`
    of the first and the last call, `speedup` over the case `base` (None without parity), `remarks`, and what `timing`
    asks for beside. A case that cannot run is a row with `absent` or `failed`, and why; a failure ends nothing but its
    own case. TF32 is off, so that float32 means float32.
    """
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        run = _Run(cases, timing, device, say)
        run.warm_up()
        run.time()
        return run.rows_of(base)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


class _Run:
    """A run of `measure`: what was built, what it gave and how long it took, case by case."""

    def __init__(
        self, cases: Mapping[str, Case], timing: Timing, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.cases, self.timing, self.device, self.say = cases, timing, device, say
        self.gpu = Gpu() if device.type == "cuda" else None
        self.rows: dict[str, Row] = {
            name: {"provider": name, "dtype": case.dtype, **case.about} for name, case in cases.items()
        }
        self.single: dict[str, Output] = {}  # a call
        self.calls: dict[str, Output] = {}  # what is timed: several of it, where it is short
        self.times: dict[str, int] = {}  # how many
        self.results: dict[str, list[Tensor]] = {}  # of the first call
        self.last: dict[str, Any] = {}  # of the last
        self.raw: dict[str, list[float]] = {}
        self.clocks: list[int] = []
        self.others, self.stopped = 0, False

    def warm_up(self) -> None:
        """Build each case and call it, one after the other."""
        for name, case in self.cases.items():
            self.say(f"warming up: {name}")
            if self.stopped:
                self._leave_out(name)
                continue
            try:
                self._first_call(name, case)
            except KeyboardInterrupt:
                self.stopped = True
                self._leave_out(name)
            except Exception as error:  # one provider's failure is its row, not the end of the others
                self._drop(name, error)
            if not self.clocks:
                self._look()  # before the board is warm

    def _first_call(self, name: str, case: Case) -> None:
        before = allocated(self.device)
        start = time.perf_counter()
        call = case.build()
        middle = time.perf_counter()
        result = (case.check or call)()
        wait(self.device)
        row = self.rows[name]
        row |= {"build_s": middle - start, "first_call_s": time.perf_counter() - middle}
        self.results[name] = host(result) if case.reference else []
        call()
        on_cuda = self.device.type == "cuda"
        row["peak_bytes"] = allocated(self.device, peak=True) - before if on_cuda else None
        self.times[name], self.single[name] = 1, call
        if self.timing.bundle:
            call, self.times[name], row["timed"] = bundle_calls(call, self.device)
        self.calls[name] = call

    def time(self) -> None:
        """Time the cases in turns; when the time is over no further round begins."""
        timing = self.timing
        self.say(f"timing: {timing.rounds} rounds of {len(self.calls)} providers")
        raw = self.raw = {name: [] for name in self.calls}
        begun = time.perf_counter()
        for i, name in enumerate(turns(list(self.calls), timing.rounds)):
            if i % len(raw) == 0:
                self._look()
                over = self.stopped or time.perf_counter() - begun > timing.seconds
                if i >= ROUNDS_AT_LEAST * len(raw) and over:
                    break
            if name not in self.calls:  # dropped meanwhile
                continue
            try:
                time.sleep(SETTLE if self.device.type == "cpu" and not timing.bundle else 0.0)
                seconds, self.last[name] = seconds_of(self.calls[name], self.device)
                raw[name].append(seconds / self.times[name])
            except KeyboardInterrupt:
                self.stopped = True
            except Exception as error:  # likewise: memory may run out late
                self._drop(name, error)
        self._look()

    def rows_of(self, base: str) -> list[Row]:
        """The rows, with what is known about each figure."""
        timing = self.timing
        idle = self.gpu.idle_watts() if self.gpu and timing.energy else None
        for name in [name for name in self.calls if not self.raw[name]]:
            about = ("provider", "dtype", *self.cases[name].about)
            self.rows[name] = {key: self.rows[name][key] for key in about}
            self._leave_out(name)
            del self.calls[name]
        median = {name: summary(self.raw[name])["median_s"] for name in self.calls}
        for name in list(self.calls):
            self._figures(name)
            found = self.rows[name]
            try:
                found["parity"] = self._parity(name)
                agrees = found["parity"] and found["parity"]["ok"] and base in median
                factor = {"over": base, "factor": median[base] / median[name]} if agrees else None
                found["speedup"] = factor
                if timing.cold:
                    found["cold"] = summary(cold_calls(self.single[name], timing.rounds, self.device))
                if self.gpu and timing.energy:
                    found["energy"] = self.gpu.energy(self.single[name], idle)
            except Exception as error:  # likewise
                self._drop(name, error)
        return list(self.rows.values())

    def _figures(self, name: str) -> None:
        case, found, s, clocks = self.cases[name], self.rows[name], summary(self.raw[name]), self.clocks
        found |= s | {"remarks": remarks(s, clocks, self.others)} | ({"interrupted": True} if self.stopped else {})
        found["compile_s"] = None if case.check else max(0.0, found["first_call_s"] - s["median_s"])
        if clocks:
            found["clock_mhz"] = {"start": clocks[0], "median": sorted(clocks)[len(clocks) // 2], "least": min(clocks)}
        if case.approximate:
            found["approximate"] = True

    def _parity(self, name: str) -> Row | None:
        """Of the first call and of the last: what drifted has no parity either. A bundle's state may go on from call to
        call, and a check has a result of its own: there the first alone."""
        case, first = self.cases[name], self.results[name]
        drifted = host(self.last[name]) if case.reference and not case.check and not self.timing.bundle else first
        return parity(case, self.results | {name: first + drifted}, self.results, name)

    def _drop(self, name: str, error: BaseException) -> None:
        case = self.cases[name]
        self.rows[name] = {"provider": name, "dtype": case.dtype, **case.about} | why_not(error)
        self.calls.pop(name, None)

    def _leave_out(self, name: str) -> None:
        self.rows[name] |= {"absent": "interrupted before its turn", "interrupted": True}

    def _look(self) -> None:
        if self.gpu:
            self.clocks.extend([clock] if (clock := self.gpu.clock()) else [])
            self.others = max(self.others, self.gpu.others() or 0)


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
    """Whether a row's provider is another function by design."""
    return bool(row.get("approximate"))


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
    if case.reference is None:
        return None
    right = wanted.get(case.reference, [])

    def off(results: Sequence[Tensor]) -> float:
        several = [results[i : i + len(right)] for i in range(0, len(results), len(right))] if right else []
        return max((relative(one, right) for one in several), default=math.inf)

    error, plain = off(got[name]), off(wanted.get(case.baseline or "", []))
    # a plain implementation that failed allows nothing more, and none allows more than LOST
    allowed = case.tolerance + (min(2 * plain, LOST) if math.isfinite(plain) else 0.0)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in wanted[name])).hexdigest()[:16]
    return {
        "against": case.reference,
        "error": error if math.isfinite(error) else None,
        "allowed": allowed,
        "ok": error <= allowed,
        "sha256": digest,
    }
