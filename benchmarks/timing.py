"""Timing: in turns, in bundles, after the caches were flushed, and what may have disturbed a figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sbldm_fast.sampling.loop import capture

from .rows import Row

THROTTLED = 0.75  # of the clock at the start
SPREAD = 0.10  # interquartile range beside the median above which a figure is marked
SAMPLE_SECONDS = 2e-3  # short calls are bundled until a sample lasts this long
CAPTURED = 20  # calls in one graph
# cycles that the GPU waits before a cold call: longer than Python takes for a forward and a backward pass
AHEAD = 10_000_000
Output = Callable[[], Any]


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """The names in turn, `rounds` times, every other round backwards: A B B A A B, so that drift favours nobody."""
    names = list(names)
    for i in range(rounds):
        yield from names if i % 2 == 0 else names[::-1]


def time_in_turns(calls: Mapping[str, Output], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, in turns."""
    raw: dict[str, list[float]] = {name: [] for name in calls}
    for name in turns(calls, rounds):
        raw[name].append(seconds_of(calls[name], device)[0])
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


def seconds_of(call: Output, device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    out = call()
    wait(device)
    return time.perf_counter() - start, out


def bundle_calls(call: Output, device: torch.device) -> tuple[Output, int, str]:
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
    outer = max(1, round(SAMPLE_SECONDS / min(seconds_of(call, device)[0] for _ in range(3))))
    return _several(call, outer), inner * outer, how


def _several(call: Output, times: int) -> Output:
    def run() -> Any:
        for _ in range(times - 1):
            call()
        return call()

    return run


def cold_calls(call: Output, rounds: int, device: torch.device) -> list[float]:
    """Seconds of single calls, each after the last level of cache was written over; on CUDA between events on a busy
    stream."""
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    raw = []
    for _ in range(rounds):
        flush.zero_()
        if device.type != "cuda":
            raw.append(seconds_of(call, device)[0])
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


def remarks(s: Row, clocks: Sequence[int], others: int) -> list[str]:
    """What may have disturbed a figure: its spread, a clock that fell, other processes on the GPU."""
    found = []
    if s["iqr_s"] > SPREAD * s["median_s"]:
        found.append(f"spread {s['iqr_s'] / s['median_s']:.0%}")
    if clocks and min(clocks) < THROTTLED * clocks[0]:
        found.append(f"throttled: the clock fell to {min(clocks) / clocks[0]:.0%} of its start")
    if others:
        found.append(f"{others} other process{'es' if others > 1 else ''} on the GPU")
    return found
