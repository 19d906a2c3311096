"""The context of a GPU: what its calls need to be current, and what is no more when it is lost."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.driver import Driver


class Context:
    """The primary context of a GPU, which ONNX Runtime, TensorRT and torch use too.

    May be used from any thread, by one at a time.
    """

    def __init__(self, driver: Driver, index: int) -> None:
        """EngineError if there is no such GPU."""
        count = driver.call("cuDeviceGetCount")
        if index >= count:
            raise EngineError(f"there is no GPU {index}: this machine has {count}, counted from 0")
        self.driver = driver
        self.gpu = driver.call("cuDeviceGet", index)
        self.closed = False
        self._context = driver.call("cuDevicePrimaryCtxRetain", self.gpu)
        self._threads = threading.local()

    def enter(self) -> None:
        """Make the context current to this thread; EngineError if it is lost."""
        assert not self.closed, "the device is closed"
        if not getattr(self._threads, "entered", False):
            self.driver.call("cuCtxSetCurrent", self._context)
            self._threads.entered = True
        elif self.driver.lost:
            raise EngineError(self.driver.lost)

    def call(self, name: str, *arguments: object) -> Any:
        """As Driver.call, in this context."""
        self.enter()
        return self.driver.call(name, *arguments)

    def quietly(self, name: str, *arguments: object) -> None:
        """Give something back, or not: what a lost context or a closed device held is gone already."""
        if self.closed or self.driver.lost:
            return
        with contextlib.suppress(EngineError):  # if the context was lost just now, the next call says so
            self.call(name, *arguments)

    def attribute(self, name: str) -> int:
        """An attribute of the GPU, by its name after CU_DEVICE_ATTRIBUTE_."""
        number = getattr(self.driver.module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.driver.call("cuDeviceGetAttribute", number, self.gpu))

    def close(self) -> None:
        """Let go of the context; it lives on while others use it."""
        self.quietly("cuDevicePrimaryCtxRelease", self.gpu)
        self.closed = True
