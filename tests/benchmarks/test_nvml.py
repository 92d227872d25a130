"""What NVML tells, with a GPU that is made up: the library itself is only there with a driver."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import harness, nvml
from sbldm_fast.benchmarks.harness import Case, Timing, measure
from sbldm_fast.benchmarks.nvml import Gpu

CPU = torch.device("cpu")


class Library:
    """As much of pynvml as is asked for."""

    class NVMLError(Exception):
        pass

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = {
            "ClockInfo": iter([]),
            "TotalEnergyConsumption": iter([]),
            "ComputeRunningProcesses": [],
        } | values

    def nvmlInit(self) -> None:
        if "init" in self.values:
            raise self.NVMLError(self.values["init"])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def __getattr__(self, name: str) -> Any:
        def ask(handle: str, *_: Any) -> Any:
            assert handle == "GPU-1"
            value = self.values.get(name.removeprefix("nvmlDeviceGet"))
            if value is None:
                raise self.NVMLError("Not Supported")
            return next(value) if hasattr(value, "__next__") else value

        return ask


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**values: Any) -> Gpu:
        monkeypatch.setitem(sys.modules, "pynvml", Library(**values))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1", L2_cache_size=2**20)
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        return Gpu()

    return make


def test_what_it_tells(made_up: Any) -> None:
    gpu = made_up(ClockInfo=1500, EnforcedPowerLimit=70_000, Temperature=40, CurrentClocksEventReasons=4)
    assert gpu.state() == {
        "driver": "580.1",
        "clock_mhz": 1500,
        "memory_clock_mhz": 1500,
        "power_limit_w": 70.0,
        "temperature_c": 40,
        "throttle_reasons": 4,
        "other_processes": 0,
    }


def test_what_it_withholds_is_none(made_up: Any) -> None:
    gpu = made_up(ClockInfo=None, TotalEnergyConsumption=None, ComputeRunningProcesses=None)
    assert (gpu.clock(), gpu.joules(), gpu.others(), gpu.idle_watts(), gpu.energy(lambda: None, 20.0)) == (None,) * 5


def test_an_old_library_tells_less(made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "nvmlSystemGetDriverVersion", lambda self: b"470.1")
    gpu = made_up(ClockInfo=1500, CurrentClocksEventReasons=None, CurrentClocksThrottleReasons=4)
    assert gpu.state()["driver"] == "470.1"
    assert gpu.state()["throttle_reasons"] == 4


def test_without_it_the_reason_is_kept(made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made_up(init="Driver/library version mismatch").state() == {"obstacle": "Driver/library version mismatch"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = Gpu()
    assert gpu.state() == {"obstacle": "nvidia-ml-py is not installed"}
    assert gpu.clock() is gpu.joules() is gpu.others() is None


@pytest.mark.parametrize(
    ("pids", "context", "others"),
    [([], False, 0), ([-1], True, 0), ([-1, 7], True, 1), ([7], True, 0), ([7], False, 1)],
)
def test_other_processes(
    made_up: Any, monkeypatch: pytest.MonkeyPatch, pids: list[int], context: bool, others: int
) -> None:
    """-1 is this process; in a container it may be there under another number, which a context of its own tells."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: context)
    found = [SimpleNamespace(pid=os.getpid() if pid == -1 else pid) for pid in pids]
    assert made_up(ComputeRunningProcesses=found).others() == others


def test_energy_by_hand(made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 2.0, 2.0])  # begun; two looks that go on; one that does not; the end
    monkeypatch.setattr(nvml.time, "perf_counter", lambda: next(clock))
    gpu = made_up(TotalEnergyConsumption=iter([1_000, 101_000]))
    calls: list[int] = []
    # 100 J in 2 s and 2 runs; 20 W idle are 40 J of them
    assert gpu.energy(lambda: calls.append(1), 20.0) == {
        "joules": 50.0,
        "joules_above_idle": 30.0,
        "idle_watts": 20.0,
        "runs": 2,
    }
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("clocks", "neighbours", "remarks"),
    [
        ([1500, 1490, 1480, 1480, 1480], 0, []),
        ([1500, 1124, 1300, 1300, 1300], 0, ["throttled: the clock fell to 75% of its start"]),
        ([1500, 1500, 1500, 1500, 1500], 2, ["2 other processes on the GPU"]),
    ],
)
def test_rows_say_what_disturbed_them(
    made_up: Any, monkeypatch: pytest.MonkeyPatch, clocks: list[int], neighbours: int, remarks: list[str]
) -> None:
    gpu = made_up(ClockInfo=iter(clocks), ComputeRunningProcesses=[SimpleNamespace(pid=1)] * 0)
    monkeypatch.setattr(gpu, "others", lambda: neighbours)
    monkeypatch.setattr(harness, "Gpu", lambda: gpu)
    for name in ("allocated", "wait"):
        monkeypatch.setattr(harness, name, lambda *_, **__: 0)
    cases = {"a": Case(lambda: lambda: torch.ones(1), "a", 0.0)}
    (row,) = measure(cases, Timing(3), base="a", device=torch.device("cuda"))
    assert [r for r in row["remarks"] if not r.startswith("spread")] == remarks
    assert row["clock_mhz"] == {"start": clocks[0], "median": sorted(clocks)[len(clocks) // 2], "least": min(clocks)}
