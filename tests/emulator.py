"""A device without a GPU: kernels compiled with g++ (cuda_on_cpu/), products by numpy, memory of the host.

It does what a GPU does and refuses what a GPU would not forgive, or not notice: addresses outside of live memory,
arguments of another type, too many threads, too much shared memory, misaligned loads, barriers that not all reach.
"""

from __future__ import annotations

import bisect
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import ALIGNMENT, Argument, DeviceArray, out_of_memory, plain
from tests.cuda_on_cpu.compiled import Tail, project_kernels

Array = NDArray[Any]
MAX_THREADS, MAX_SHARED, MAX_GRID_YZ = 1024, 48 << 10, 65535
LETTERS = {ctypes.c_void_p: "p", ctypes.c_int32: "i", ctypes.c_int64: "q", ctypes.c_float: "f"}
ONE_AT_A_TIME = threading.Lock()  # the emulated block is global to the library


class GpuFault(AssertionError):
    """What would end a process on a GPU, or go wrong without a word."""


class EmulatedDevice:
    """The Device protocol on the host. `order` of threads and blocks: 0 as numbered, 1 last first, else shuffled."""

    def __init__(self, total_bytes: int = 1 << 30, order: int = 0, kernels: ctypes.CDLL | None = None) -> None:
        self.name, self.index, self.compute_capability, self.multiprocessors = "emulated", 0, (8, 7), 4
        self.bandwidth: float | None = 1e9
        self.total_bytes, self.driver_version, self.stream = total_bytes, 12020, 1
        self.order = order
        self.launches = self.waits = 0  # kernels and graphs launched, and times the host waited, for tests that count
        self._library = kernels or project_kernels()
        count = ctypes.c_int.in_dll(self._library, "kernel_count").value
        self._kernels = {self._library.kernel_name(i).decode(): i for i in range(count)}
        self._sizes: dict[int, int] = {}  # of device memory
        self._pinned: dict[int, int] = {}
        self._starts: list[int] = []  # of both, sorted
        self._recording: list[Callable[[], object]] | None = None
        self._peak = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels."""
        return tuple(self._kernels)

    # Memory

    @property
    def bytes_in_use(self) -> int:
        return sum(map(_whole, self._sizes.values()))

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.bytes_in_use

    def take_peak_bytes(self) -> int:
        peak, self._peak = max(self._peak, self.bytes_in_use), self.bytes_in_use
        return peak

    def alloc(self, nbytes: int) -> int:
        self._must_not_record("alloc")
        free = self.total_bytes - self.bytes_in_use
        if _whole(nbytes) > free:
            raise out_of_memory(nbytes, free, self.total_bytes)
        address = self._new(nbytes, self._sizes)
        self._peak = max(self._peak, self.bytes_in_use)
        return address

    def free(self, address: int) -> None:
        nbytes = self._sizes.pop(address, None)
        if nbytes is not None:  # else the device was closed
            self._release(address, nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        self._check(address, nbytes, self._sizes)
        self._do(lambda: ctypes.memset(address, 0, nbytes))

    def upload(self, address: int, array: Array) -> None:
        self._must_not_record("upload")
        assert array.flags.c_contiguous
        self._check(address, array.nbytes, self._sizes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Array) -> None:
        self._must_not_record("download")
        self.waits += 1
        assert array.flags.c_contiguous and array.flags.writeable
        self._check(address, array.nbytes, self._sizes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        for address in (to, source):
            self._check(address, nbytes, self._sizes)
        if abs(to - source) < nbytes:
            raise GpuFault(f"copy of {nbytes} bytes onto itself, {to - source} bytes further")
        self._do(lambda: ctypes.memmove(to, source, nbytes))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        address = self._new(nbytes, self._pinned)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(memory, self._unpin, address).atexit = False
        return np.ctypeslib.as_array(memory)

    def download_async(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous
        to, nbytes = array.ctypes.data, array.nbytes
        self._check(to, nbytes, self._pinned)
        self._check(address, nbytes, self._sizes)
        self._do(lambda: ctypes.memmove(to, address, nbytes))

    # Work

    def kernel(
        self,
        name: str,
        grid: int | tuple[int, int, int],
        block: int,
        *arguments: Argument | DeviceArray,
        shared: int = 0,
    ) -> Callable[[], None]:
        args = plain(arguments)
        number, blocks = self._kernels[name], grid if isinstance(grid, tuple) else (grid, 1, 1)
        given, wanted = "".join(LETTERS[type(arg)] for arg in args), self._library.kernel_signature(number).decode()
        if given != wanted:
            raise GpuFault(f"{name} takes ({wanted}), not ({given})")
        if not (0 < block <= MAX_THREADS and block % 32 == 0 and 0 <= shared <= MAX_SHARED):
            raise GpuFault(f"{name}: {block} threads with {shared} bytes of shared memory cannot be launched")
        if min(blocks) < 1 or max(blocks[1:]) > MAX_GRID_YZ:
            raise GpuFault(f"{name}: a grid of {blocks} cannot be launched")
        tails = [tail for arg in args if isinstance(arg, ctypes.c_void_p) for tail in self._tail(name, arg.value)]
        pointers = (ctypes.c_void_p * max(len(args), 1))(*(ctypes.addressof(arg) for arg in args))
        fixed = (number, (ctypes.c_uint * 3)(*blocks), block, shared, pointers, (Tail * len(tails))(*tails), len(tails))

        def run(keep: object = (args, arguments)) -> None:  # the pointers point into the arguments
            with ONE_AT_A_TIME:
                fault = self._library.launch(*fixed, self.order)
            if fault:
                raise GpuFault(fault.decode())

        return lambda: self._launch(run)

    def product(
        self,
        x: DeviceArray,
        matrix: DeviceArray,
        out: DeviceArray,
        beta: float = 0.0,
        bias: DeviceArray | None = None,
        gelu: bool = False,
    ) -> None:
        left, right, target = map(self._matrix, (x, matrix, out))
        added = None if bias is None else self._matrix(bias)
        (m, k), n = x.shape, len(matrix)
        assert matrix.shape == (n, k) and out.shape == (m, n) and x.dtype == matrix.dtype
        assert bias is None or (bias.shape == (n,) and bias.dtype == out.dtype and bias.address % 256 == 0)
        assert bias is not None or not gelu

        def run() -> None:
            found = left.astype(np.float32) @ right.astype(np.float32).T
            if beta:
                found += np.float32(beta) * target
            if added is not None:
                found += added
            if gelu:
                found = found / 2 * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (found + 0.044715 * found**3)))
            target[...] = found

        self._do(run)

    @contextmanager
    def capture(self) -> Iterator[_Graph]:
        self._must_not_record("capture")
        graph = _Graph(self)
        self._recording = graph.work
        try:
            yield graph
        finally:
            self._recording = None

    def event(self, timed: bool = False) -> _Event:
        return _Event(self, timed)

    def synchronize(self) -> None:
        self._must_not_record("synchronize")
        self.waits += 1

    def close(self) -> None:
        for address in tuple(self._sizes):
            self.free(address)

    # Its own

    def _launch(self, work: Callable[[], None]) -> None:
        self.launches += self._recording is None
        self._do(work)

    def _do(self, work: Callable[[], object]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def _must_not_record(self, what: str) -> None:
        if self._recording is not None:
            raise GpuFault(f"{what} while work is recorded")

    def _new(self, nbytes: int, sizes: dict[int, int]) -> int:
        assert nbytes > 0
        address = self._library.allocate(nbytes)
        assert address, "the host has no memory left"
        sizes[address] = nbytes
        bisect.insort(self._starts, address)
        return int(address)

    def _unpin(self, address: int) -> None:
        self._release(address, self._pinned.pop(address))

    def _release(self, address: int, nbytes: int) -> None:
        del self._starts[bisect.bisect_left(self._starts, address)]
        self._library.release(address, nbytes)

    def _holder(self, address: int) -> int | None:
        """Start of the live memory that the address lies in."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        start = self._starts[at]
        return start if address < start + (self._sizes.get(start) or self._pinned[start]) else None

    def _check(self, address: int, nbytes: int, sizes: dict[int, int]) -> None:
        start = self._holder(address)
        if nbytes and (start not in sizes or address + nbytes > start + sizes[start]):
            raise GpuFault(f"{nbytes} bytes at {address:#x} are not in live memory")

    def _tail(self, name: str, address: int | None) -> Iterator[Tail]:
        if not address:
            return
        start = self._holder(address)
        if start is None:
            raise GpuFault(f"{name}: an argument is no live memory: {address:#x}")
        nbytes = self._sizes.get(start) or self._pinned[start]
        if _whole(nbytes) > nbytes:
            yield Tail(start + nbytes, _whole(nbytes) - nbytes)

    def _matrix(self, array: DeviceArray) -> Array:
        self._check(array.address, array.nbytes, self._sizes)
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
        return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)


class _Graph:
    def __init__(self, device: EmulatedDevice) -> None:
        self.work: list[Callable[[], object]] = []
        self._device = device
        self._closed = False

    def launch(self) -> None:
        assert not self._closed
        self._device._must_not_record("launch of a graph")
        self._device.launches += 1
        for do in self.work:
            do()

    def close(self) -> None:
        self._closed = True


class _Event:
    """Nothing here is done later than asked for; but an event must have been recorded before it is waited for."""

    def __init__(self, device: EmulatedDevice, timed: bool) -> None:
        self._device, self._timed, self._at = device, timed, 0.0

    def record(self) -> None:
        self._device._must_not_record("an event")
        self._at = perf_counter()

    def wait(self) -> None:
        assert self._at, "waits for an event that was never recorded"
        self._device.waits += 1

    def since(self, earlier: _Event) -> float:
        assert self._timed and earlier._timed, "nobody noted when it was"
        return self._at - earlier._at


def _whole(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
