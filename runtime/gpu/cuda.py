"""CudaDevice: the Device protocol on a real GPU."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.context import Context
from dycoke_edge.runtime.gpu.cublaslt import WORKSPACE, CuBlasLt, find_library
from dycoke_edge.runtime.gpu.device import Argument, DeviceArray, out_of_memory
from dycoke_edge.runtime.gpu.driver import Driver
from dycoke_edge.runtime.gpu.spare import Spare
from dycoke_edge.runtime.gpu.work import CudaEvent, CudaGraph, CudaLaunch

Array = NDArray[Any]
PTX = Path(__file__).parent / "kernels" / "kernels.ptx"
NON_BLOCKING = 1  # a stream that does not wait for the default stream, nor the default stream for it
PORTABLE = 1  # pinned memory that every context knows as such
OUT_OF_MEMORY = 2
PIECE = 8 << 20  # bytes of either of the two pieces of pinned memory that uploads pass through: 37 frames of 384 x 384
MAX_SHARED = 48 << 10  # bytes that every kernel may use unasked


class CudaDevice:
    """One GPU and a stream of our own. May be used from any thread, by one at a time."""

    def __init__(self, index: int = 0, driver: Driver | None = None, ptx: Path = PTX) -> None:
        """EngineError that says what is missing and how to get it. Tests give a driver and other kernels."""
        self._driver = driver or Driver()
        self._context = Context(self._driver, index)
        try:
            self._library = find_library(self._driver.version)  # what lacks is said now, not at the first product
        except EngineError:
            self._context.close()
            raise
        self._call, self._quietly = self._context.call, self._context.quietly
        self._stream = self._call("cuStreamCreate", NON_BLOCKING)
        self._free_at_start, self.total_bytes = self._call("cuMemGetInfo")
        self._sizes: dict[int, int] = {}
        self._held = 0  # the sum of these
        self._spare = Spare()
        self._pieces: list[tuple[NDArray[np.uint8], CudaEvent]] = []  # pinned, the used one first; when read
        self._filled = 0  # bytes of the first
        self._peak = 0
        self._ptx = ptx
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        self._cublas: CuBlasLt | None = None
        self._recording = False
        self._describe(index)

    def _describe(self, index: int) -> None:
        attribute = self._context.attribute
        self.index, self.stream, self.driver_version = index, int(self._stream), self._driver.version
        self.name = self._call("cuDeviceGetName", 256, self._context.gpu).split(b"\0")[0].decode()
        self.compute_capability = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        self.multiprocessors = attribute("MULTIPROCESSOR_COUNT")
        kilohertz, bits = attribute("MEMORY_CLOCK_RATE"), attribute("GLOBAL_MEMORY_BUS_WIDTH")
        self.bandwidth = 2 * 1e3 * kilohertz * bits / 8 or None  # two transfers a clock

    # Memory

    @property
    def bytes_in_use(self) -> int:
        """As in Device. What other programs took or gave back since is in it too: CUDA does not tell them apart. Blocks
        kept for the next who wants one are not."""
        free, _ = self._call("cuMemGetInfo")
        return max(self._held, int(self._free_at_start - free) - self._spare.nbytes)

    @property
    def free_bytes(self) -> int:
        """As in Device."""
        return int(self._call("cuMemGetInfo")[0])

    def take_peak_bytes(self) -> int:
        """As in Device. Libraries' memory is seen when we allocate and now, not in between."""
        now = self.bytes_in_use
        peak, self._peak = max(self._peak, now), now
        return peak

    def alloc(self, nbytes: int) -> int:
        """As in Device."""
        assert nbytes > 0 and not self._recording
        spare = self._spare.take(nbytes)
        address = self._new(nbytes) if spare is None else spare
        self._sizes[address] = nbytes
        self._held += nbytes
        self._peak = max(self._peak, self._held if spare else self.bytes_in_use)
        self.zero(address, nbytes)
        return address

    def _new(self, nbytes: int) -> int:
        self._context.enter()
        status, new = self._driver.module.cuMemAlloc(nbytes)
        if status == OUT_OF_MEMORY and self._spare.nbytes:
            for address in self._spare.clear():
                self._call("cuMemFree", address)
            status, new = self._driver.module.cuMemAlloc(nbytes)
        if status == OUT_OF_MEMORY:
            raise out_of_memory(nbytes, *self._call("cuMemGetInfo"))
        if status != 0:
            self._driver.fail("cuMemAlloc", status)
        return int(new)

    def free(self, address: int) -> None:
        """As in Device. What is done next happens after what uses the memory now: it is one stream."""
        nbytes = self._sizes.pop(address, None)
        if nbytes is None or self._context.closed:
            return
        self._held -= nbytes
        if not self._spare.keep(address, nbytes):
            self._quietly("cuMemFree", address)

    def zero(self, address: int, nbytes: int) -> None:
        """As in Device."""
        self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)

    def upload(self, address: int, array: Array) -> None:
        """As in Device. Arrays pass through pinned memory, which the GPU reads in its own time: where it reads pageable
        memory by itself, a copy may return before it has read. So nobody waits until both pieces are taken."""
        assert array.flags.c_contiguous
        source = array.reshape(-1).view(np.uint8)
        for start in range(0, source.size, PIECE):
            part = source[start : start + PIECE]
            memory = self._room(part.size)
            memory[...] = part
            self._call("cuMemcpyHtoDAsync", address + start, memory.ctypes.data, part.size, self._stream)

    def _room(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory that no copy reads: of this piece, or of the other one after what was copied from it."""
        if not self._pieces:
            self._pieces = [(self.pinned(PIECE), self.event()) for _ in range(2)]
        if self._filled + nbytes > PIECE:
            self._pieces[0][1].record()  # what lies there is read before this
            self._pieces.reverse()
            self._pieces[0][1].wait()
            self._filled = 0
        start, self._filled = self._filled, self._filled + -(-nbytes // 16) * 16
        return self._pieces[0][0][start : start + nbytes]

    def download(self, address: int, array: Array) -> None:
        """As in Device."""
        self.download_async(address, array)
        self.synchronize()

    def download_async(self, address: int, array: Array) -> None:
        """As in Device."""
        assert array.flags.c_contiguous and array.flags.writeable
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """As in Device."""
        self._call("cuMemcpyDtoDAsync", to, source, nbytes, self._stream)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """As in Device."""
        address = int(self._call("cuMemHostAlloc", nbytes, PORTABLE))
        ctypes.memset(address, 0, nbytes)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(memory, self._quietly, "cuMemFreeHost", address).atexit = False
        return np.ctypeslib.as_array(memory)

    # Work

    def kernel(
        self, name: str, grid: int | tuple[int, int, int], block: int, *args: Argument | DeviceArray, shared: int = 0
    ) -> CudaLaunch:
        """As in Device. The first one compiles kernels.ptx for this GPU; the driver keeps the result on disk."""
        assert 0 < block <= 1024 and block % 32 == 0 and shared <= MAX_SHARED
        blocks = grid if isinstance(grid, tuple) else (grid, 1, 1)
        return CudaLaunch(self._context, self._function(name), (*blocks, block, 1, 1, shared, self._stream), args)

    def product(
        self,
        x: DeviceArray,
        matrix: DeviceArray,
        out: DeviceArray,
        beta: float = 0.0,
        bias: DeviceArray | None = None,
        gelu: bool = False,
    ) -> None:
        """As in Device. The first one takes 32 MiB of workspace, and so must come before capture."""
        self._context.enter()
        if self._cublas is None:
            self._cublas = CuBlasLt(self._library, self.stream, self.alloc(WORKSPACE))
        try:
            self._cublas.product(x, matrix, out, beta, bias, gelu)
        except EngineError:
            self.synchronize()  # cuBLAS does not say that the context is lost: if it is, that is the error
            raise

    @contextmanager
    def capture(self) -> Iterator[CudaGraph]:
        """As in Device."""
        graph = CudaGraph(self._context, self._stream)
        graph.begin()
        self._recording = True
        try:
            yield graph
        except BaseException:
            graph.discard()
            raise
        finally:
            self._recording = False
        graph.finish()

    def event(self, timed: bool = False) -> CudaEvent:
        """As in Device."""
        return CudaEvent(self._context, self._stream, timed)

    def synchronize(self) -> None:
        """As in Device."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """As in Device."""
        if self._context.closed:
            return
        self._quietly("cuStreamSynchronize", self._stream)
        if self._cublas and not self._driver.lost:
            self._cublas.close()
        for address in (*self._sizes, *self._spare.clear()):
            self._quietly("cuMemFree", address)
        self._sizes.clear()
        self._held = 0
        if self._module:
            self._quietly("cuModuleUnload", self._module)
        self._quietly("cuStreamDestroy", self._stream)
        self._context.close()

    def _function(self, name: str) -> Any:
        if self._module is None:
            self._module = self._call("cuModuleLoadData", self._ptx.read_bytes() + b"\0")
        if name not in self._functions:
            self._functions[name] = self._call("cuModuleGetFunction", self._module, name.encode())
        return self._functions[name]
