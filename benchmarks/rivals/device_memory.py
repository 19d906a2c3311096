"""How much of a device's memory each side takes, as the driver of the device counts it.

Sides work one at a time and the others lie still, so what is taken while one works is its own: its context, its
libraries' workspaces and what its allocator keeps, as `nvidia-smi` would show.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PERIOD = 0.005  # seconds between two looks


class Meter:
    """Bytes in use on GPU 0 through NVML; on a machine without one, nothing."""

    def __init__(self, device: str) -> None:
        self._nvml, self._handle = None, None
        if device == "cuda":
            import pynvml  # type: ignore[import-untyped, import-not-found, unused-ignore]

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)

    def used(self) -> int:
        """Now; 0 without a GPU."""
        nvml: Any = self._nvml
        return int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used) if nvml else 0

    def describe(self) -> dict[str, str]:
        """Name of the GPU and version of its driver."""
        nvml: Any = self._nvml
        if not nvml:
            return {}
        name, driver = nvml.nvmlDeviceGetName(self._handle), nvml.nvmlSystemGetDriverVersion()
        return {"gpu": str(name), "driver": str(driver)}

    @contextmanager
    def watch(self) -> Iterator[list[int]]:
        """A list whose last element is the most that was in use so far; looked at while the block runs."""
        most, done = [self.used()], threading.Event()

        def look() -> None:
            while not done.wait(PERIOD):
                most.append(max(most.pop(), self.used()))

        thread = threading.Thread(target=look, daemon=True)
        if self._nvml:
            thread.start()
        try:
            yield most
        finally:
            done.set()
            if self._nvml:
                thread.join()
            most.append(max(most.pop(), self.used()))


class Holding:
    """What one side holds, and the most it held, from what changed while it alone worked."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.held, self.peak = meter, 0, 0

    @contextmanager
    def working(self, watched: bool) -> Iterator[None]:
        """Around everything the side does; what it takes and gives back meanwhile is seen only if `watched`."""
        before = self.meter.used()
        if watched:
            with self.meter.watch() as most:
                yield
            self.peak = max(self.peak, self.held + most[-1] - before)
        else:
            yield
        self.held += self.meter.used() - before
        self.peak = max(self.peak, self.held)
