"""One GPU as the runtime sees it, and arrays in its memory. No CUDA here: `cuda.py` is the GPU, tests have another."""

from __future__ import annotations

import ctypes
import math
import operator
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dycoke_edge.errors import EngineError

Array = NDArray[Any]
Argument: TypeAlias = "ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float"
ALIGNMENT = 512  # bytes: what every allocation starts at a multiple of


def megabytes(nbytes: int) -> str:
    """As an error text says it."""
    return f"{nbytes / 2**20:.0f} MiB"


def out_of_memory(nbytes: int, free: int, total: int) -> EngineError:
    """The error of an allocation that does not fit."""
    return EngineError(
        f"GPU memory is out: {megabytes(nbytes)} more are needed, {megabytes(free)} of {megabytes(total)} are free; "
        "use a smaller --kv-capacity or --vision-batch, or end other programs on the GPU"
    )


class Launch(Protocol):
    """A kernel with its grid and its arguments, fixed."""

    def __call__(self) -> None:
        """Launch it."""


class CudaGraph(Protocol):
    """Work that was recorded; addresses and arguments are fixed in it."""

    def launch(self) -> None:
        """Do the work again, in one launch."""

    def close(self) -> None:
        """Give it back; nothing if it is."""


class Event(Protocol):
    """A point in the stream's work."""

    def record(self) -> None:
        """It is now: after all that was asked for so far."""

    def wait(self) -> None:
        """Wait until the GPU is past it."""

    def since(self, earlier: Any) -> float:
        """Seconds that the GPU took from another event to this one; both timed, and passed."""


class Device(Protocol):
    """One GPU and one stream. Addresses are plain ints; work is done in order, and no call waits unless it says so.

    Every call raises EngineError when the GPU fails; after a lost context each one does, with the same text.
    """

    name: str
    index: int  # its number among the GPUs of this machine
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int
    bandwidth: float | None  # bytes a second, from memory clock and bus width; None if the driver does not say
    driver_version: int  # newest CUDA that the driver knows: 12020 is 12.2
    stream: int  # the stream's handle, for libraries that are to work in order with us

    @property
    def bytes_in_use(self) -> int:
        """Bytes that this process holds on the GPU: our allocations, or, if that is more, what free memory has lost
        since the device was opened (libraries take memory of their own)."""

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be allocated, as the driver says; on a Jetson it shares them with everything else."""

    def take_peak_bytes(self) -> int:
        """The most that bytes_in_use was since the last call, as seen when memory was allocated and now."""

    def alloc(self, nbytes: int) -> int:
        """Address of nbytes new bytes, all zero, aligned to 512; EngineError with the numbers when memory is out."""

    def free(self, address: int) -> None:
        """Give back what alloc gave. May wait. Raises nothing, so that it can be called by a finalizer."""

    def zero(self, address: int, nbytes: int) -> None:
        """Set bytes to zero."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to the GPU; the array may be changed as soon as this returns."""

    def download(self, address: int, array: Array) -> None:
        """Fill a contiguous host array from the GPU; waits."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy on the GPU; the two must not overlap."""

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory, zero, that the GPU reaches by itself; freed with its last view."""

    def download_async(self, address: int, array: Array) -> None:
        """As download, into a view of pinned memory and without waiting: record an event and wait for that."""

    def kernel(
        self, name: str, grid: int | tuple[int, int, int], block: int, *args: Argument | DeviceArray, shared: int = 0
    ) -> Launch:
        """A kernel of kernels.ptx, ready to launch. `shared` is bytes of dynamic shared memory."""

    def product(
        self,
        x: DeviceArray,
        matrix: DeviceArray,
        out: DeviceArray,
        beta: float = 0.0,
        bias: DeviceArray | None = None,
        gelu: bool = False,
    ) -> None:
        """out [m, n] = x [m, k] matrix [n, k]^T + beta out + bias [n]. fp16 to fp16 or fp32, or fp32 to fp32; sums are
        fp32, never TF32. With beta = 0 out is not read. A bias is of out's type and begins at a multiple of 256 bytes;
        with one, `gelu` applies GELU in its form with tanh to the sum; on a GPU that tanh is some 1e-5 off."""

    def capture(self) -> AbstractContextManager[CudaGraph]:
        """Record, in the `with` block, what is launched, copied and zeroed, without doing it; then launch() does it.
        No alloc, upload, download or waiting in the block."""

    def event(self, timed: bool = False) -> Event:
        """One to be recorded, as often as one likes. `timed` if it will be asked when it was."""

    def synchronize(self) -> None:
        """Wait until all is done."""

    def close(self) -> None:
        """Give everything back, arrays too; nothing may be called afterwards but free and close."""


def plain(args: Sequence[Argument | DeviceArray]) -> list[Argument]:
    """What a kernel takes: addresses for arrays."""
    return [arg.pointer if isinstance(arg, DeviceArray) else arg for arg in args]


class DeviceArray:
    """A contiguous array in a device's memory: so much of numpy as the runtime needs, with the same words.

    Views keep the memory alive. Only the first axis can be sliced, so that every view is contiguous.
    """

    def __init__(
        self, device: Device, address: int, shape: Sequence[int], dtype: DTypeLike, owner: object = None
    ) -> None:
        """What lies at `address`; `owner` is kept alive with it."""
        self.device = device
        self.address = address
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._owner = owner

    @classmethod
    def empty(cls, device: Device, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """New memory, zero, given back when the last view is gone."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = _Memory(device, device.alloc(max(nbytes, 1)))
        return cls(device, memory.address, shape, dtype, memory)

    @classmethod
    def of(cls, device: Device, array: Array) -> DeviceArray:
        """A copy of a host array."""
        new = cls.empty(device, array.shape, array.dtype)
        new[...] = array
        return new

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The address as a kernel takes it."""
        return ctypes.c_void_p(self.address)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | EllipsisType | None) -> DeviceArray:
        """A view: of one or of consecutive members of the first axis, of all (...), or with a new first axis (None)."""
        if key is Ellipsis:
            return self
        if key is None:
            return self._view(0, (1, *self.shape))
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "a view must be contiguous"
            return self._view(start * row, (max(stop - start, 0), *self.shape[1:]))
        at = operator.index(key)
        if not -len(self) <= at < len(self):
            raise IndexError(f"{at} in an axis of {len(self)}")
        return self._view(at % len(self) * row, self.shape[1:])

    def __setitem__(self, key: int | slice | EllipsisType, value: Array | DeviceArray) -> None:
        """Copy from the host or from the same device; shape and dtype must be the same."""
        view = self[key]
        assert (view.shape, view.dtype) == (value.shape, value.dtype), "nothing is broadcast or converted"
        if not view.nbytes:
            return
        if isinstance(value, DeviceArray):
            self.device.copy(view.address, value.address, view.nbytes)
        else:
            self.device.upload(view.address, np.ascontiguousarray(value))

    def reshape(self, *shape: int | Sequence[int]) -> DeviceArray:
        """A view of another shape; one -1 is worked out."""
        wanted = [axis for part in shape for axis in ([part] if isinstance(part, int) else part)]
        if -1 in wanted:
            known = math.prod(axis for axis in wanted if axis != -1)
            wanted[wanted.index(-1)] = self.size // known if known else 0
        assert math.prod(wanted) == self.size, f"{self.shape} does not reshape to {wanted}"
        return self._view(0, wanted)

    def numpy(self) -> Array:
        """A copy on the host; waits."""
        array: Array = np.empty(self.shape, self.dtype)
        if array.nbytes:
            self.device.download(self.address, array)
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        assert copy is not False, "it lies on another device"
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def _view(self, offset: int, shape: Sequence[int]) -> DeviceArray:
        return DeviceArray(self.device, self.address + offset, shape, self.dtype, self._owner)


class _Memory:
    """Frees an allocation when nothing refers to it any more."""

    def __init__(self, device: Device, address: int) -> None:
        self.address = address
        weakref.finalize(self, device.free, address).atexit = False
