"""What NVML tells of the GPU that PyTorch uses: clocks, throttling, energy, other processes. What it cannot tell is
None."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch

SETTLED = 1.0  # seconds of the idle baseline
LEAST = 2.0  # seconds of a run whose energy is worth reading: the counter moves every 20 to 100 ms


class Gpu:
    """The current CUDA device in NVML; `obstacle` says why nothing can be told of it."""

    def __init__(self) -> None:
        self.obstacle: str | None = None
        try:
            self.nvml: Any = importlib.import_module("pynvml")
            self.nvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self.handle = self.nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except ImportError:
            self.obstacle = "nvidia-ml-py is not installed"
        except Exception as error:  # NVML's errors, and PyTorch's without CUDA: whatever it is, it is the reason
            self.obstacle = (str(error).strip() or type(error).__name__).splitlines()[0]

    def _ask(self, name: str, *arguments: Any) -> Any:
        if self.obstacle:
            return None
        try:
            return getattr(self.nvml, name)(self.handle, *arguments)
        # hosted GPUs withhold some of it, and old versions of the library
        except (self.nvml.NVMLError, AttributeError):
            return None

    def clock(self) -> int | None:
        """MHz of the multiprocessors."""
        value = self._ask("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM
        return None if value is None else int(value)

    def joules(self) -> float | None:
        """Of the energy counter, since the driver was loaded."""
        value = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else value / 1e3

    def others(self) -> int | None:
        """Processes that compute on the GPU beside this one, which a container may see under another number."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if found is None:
            return None
        pids = {process.pid for process in found}
        own = os.getpid() in pids or torch.cuda.is_initialized()
        return max(0, len(pids) - own)

    def state(self) -> dict[str, Any]:
        """Driver, clocks, limits and temperature now, for the environment of a row."""
        if self.obstacle:
            return {"obstacle": self.obstacle}
        power = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "driver": (
                driver.decode() if isinstance(driver := self.nvml.nvmlSystemGetDriverVersion(), bytes) else driver
            ),
            "clock_mhz": self.clock(),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", 2),  # NVML_CLOCK_MEM
            "power_limit_w": None if power is None else power / 1e3,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", 0),
            "throttle_reasons": (
                self._ask("nvmlDeviceGetCurrentClocksEventReasons")
                or self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
            ),
            "other_processes": self.others(),
        }

    def idle_watts(self) -> float | None:
        """The power of the GPU while this process does nothing."""
        start = self.joules()
        if start is None:
            return None
        torch.cuda.synchronize()
        begun = time.perf_counter()
        time.sleep(SETTLED)
        return (self.joules() - start) / (time.perf_counter() - begun)  # type: ignore[operator]

    def energy(self, run: Callable[[], object], idle_watts: float | None) -> dict[str, float] | None:
        """Joules of one `run`, over at least two seconds of them, and those above idling."""
        start = self.joules()
        if start is None or idle_watts is None:
            return None
        begun, runs = time.perf_counter(), 0
        while time.perf_counter() - begun < LEAST:
            run()
            torch.cuda.synchronize()
            runs += 1
        seconds = time.perf_counter() - begun
        joules = self.joules() - start  # type: ignore[operator]  # as above
        return {
            "joules": joules / runs,
            "joules_above_idle": (joules - idle_watts * seconds) / runs,
            "idle_watts": idle_watts,
            "runs": runs,
        }
