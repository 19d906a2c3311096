"""What a stream of a GPU is given to do: launches, graphs of them, events between them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

from dycoke_edge.runtime.gpu.context import Context
from dycoke_edge.runtime.gpu.device import Argument, DeviceArray, plain

UNTIMED = 2  # of an event's flags: nobody asks when it was


class CudaLaunch:
    """Launch: the arguments are packed once, and a launch is one call of the driver."""

    def __init__(
        self, context: Context, function: Any, shape: tuple[Any, ...], args: Sequence[Argument | DeviceArray]
    ) -> None:
        """`shape`: grid and block, 3 numbers each, bytes of shared memory, stream."""
        self._context = context
        self._arrays, self._args = args, plain(args)  # the pointers point into them
        self._pointers = (ctypes.c_void_p * max(len(args), 1))(*map(ctypes.addressof, self._args))
        self._call = (function, *shape, ctypes.addressof(self._pointers), 0)
        self._launch = context.driver.module.cuLaunchKernel

    def __call__(self) -> None:
        """As in Launch."""
        self._context.enter()
        (status,) = self._launch(*self._call)
        if status != 0:
            self._context.driver.fail("cuLaunchKernel", status)


class CudaGraph:
    """CudaGraph of the protocol: recorded between begin and finish."""

    def __init__(self, context: Context, stream: Any) -> None:
        self._context = context
        self._stream = stream
        self._executable: Any = None

    def begin(self) -> None:
        """Record from here on. Relaxed: what other threads and libraries do meanwhile does not spoil it."""
        modes = self._context.driver.module.CUstreamCaptureMode
        self._context.call("cuStreamBeginCapture", self._stream, modes.CU_STREAM_CAPTURE_MODE_RELAXED)

    def finish(self) -> None:
        """End recording and make it ready to launch."""
        graph = self._context.call("cuStreamEndCapture", self._stream)
        try:
            self._executable = self._context.call("cuGraphInstantiate", graph, 0)
        finally:
            self._context.quietly("cuGraphDestroy", graph)
        self._destroy = weakref.finalize(self, self._context.quietly, "cuGraphExecDestroy", self._executable)
        self._destroy.atexit = False
        self._context.call("cuGraphUpload", self._executable, self._stream)

    def discard(self) -> None:
        """End recording and forget it."""
        status, graph = self._context.driver.module.cuStreamEndCapture(self._stream)
        if status == 0:
            self._context.quietly("cuGraphDestroy", graph)

    def launch(self) -> None:
        """As in the protocol."""
        assert self._executable is not None, "launched while it is recorded, or after close"
        self._context.call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """As in the protocol."""
        if self._executable is not None:
            self._destroy()
            self._executable = None


class CudaEvent:
    """Event."""

    def __init__(self, context: Context, stream: Any, timed: bool) -> None:
        self._context, self._stream = context, stream
        self._event = context.call("cuEventCreate", 0 if timed else UNTIMED)
        weakref.finalize(self, context.quietly, "cuEventDestroy", self._event).atexit = False

    def record(self) -> None:
        """As in Event."""
        self._context.call("cuEventRecord", self._event, self._stream)

    def wait(self) -> None:
        """As in Event."""
        self._context.call("cuEventSynchronize", self._event)

    def since(self, earlier: CudaEvent) -> float:
        """As in Event."""
        milliseconds: float = self._context.call("cuEventElapsedTime", earlier._event, self._event)
        return milliseconds / 1e3
