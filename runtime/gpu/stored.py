"""A bundle's weights on their way to a GPU: read where a table says they lie, matrices turned to rows of outputs."""

from __future__ import annotations

from ctypes import c_int32, c_void_p

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import Placed
from dycoke_edge.errors import BundleError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import suffix

STAGE_BYTES = 64 << 20  # of a matrix that are turned at a time
TILE = 32  # of kernels/rows.cu


class Stored:
    """Uploads weights. BundleError for files that do not fit their table."""

    def __init__(self, device: Device, bundle: Bundle) -> None:
        self._device, self._folder, self._dtype = device, bundle.path / "onnx", bundle.model.numpy_dtype
        self._stage: DeviceArray | None = None

    def read(self, placed: Placed) -> NDArray[np.generic]:
        """Mapped from its file."""
        file = self._folder / placed.file
        try:
            mapped: NDArray[np.generic] = np.memmap(file, self._dtype, "r", placed.offset, placed.shape)
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} does not hold what its weight table says ({error}); export again") from None
        return mapped

    def vector(self, *placed: Placed) -> DeviceArray:
        """One after the other, as they lie."""
        return DeviceArray.of(self._device, np.concatenate([np.asarray(self.read(part)) for part in placed]))

    def matrix(self, *placed: Placed) -> DeviceArray:
        """Matrices [in, out] on disk as one [out, in], the outputs of one after those of the other."""
        sources = [self.read(part) for part in placed]
        inputs, outputs = len(sources[0]), [source.shape[1] for source in sources]
        turned = DeviceArray.empty(self._device, (sum(outputs), inputs), self._dtype)
        for i, source in enumerate(sources):
            self._turn(source, turned[sum(outputs[:i]) : sum(outputs[: i + 1])])
        return turned

    def _turn(self, source: NDArray[np.generic], turned: DeviceArray) -> None:
        """Piece by piece on the GPU."""
        outputs, inputs = turned.shape
        most = max(1, STAGE_BYTES // source[0].nbytes)
        for start in range(0, inputs, most):
            part = np.asarray(source[start : start + most])
            stage = self._staged(part)
            grid = (-(-outputs // TILE), -(-len(part) // TILE), 1)
            to = turned.address + start * turned.dtype.itemsize
            sizes = c_int32(len(part)), c_int32(outputs), c_int32(inputs)
            kernel = f"transpose_{suffix(turned.dtype)}"
            self._device.kernel(kernel, grid, 8 * TILE, stage, c_void_p(to), *sizes)()

    def _staged(self, part: NDArray[np.generic]) -> DeviceArray:
        if self._stage is None or self._stage.nbytes < part.nbytes:
            self._stage = DeviceArray.empty(self._device, (max(part.nbytes, STAGE_BYTES),), np.uint8)
        self._device.upload(self._stage.address, part)
        return self._stage
