"""Where an engine's tensors lie on the GPU while a graph runs: where they are, or in memory of the engine's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.runtime.gpu.device import Device, DeviceArray


class Staging:
    """Memory for tensors that are on the host, or on the GPU but not at a multiple of `alignment` bytes."""

    def __init__(self, device: Device, alignment: int = 1) -> None:
        self.device, self._alignment = device, alignment
        self._held: dict[tuple[str, str], DeviceArray] = {}  # by graph and tensor

    def put(self, graph: str, name: str, array: NDArray[Any] | DeviceArray) -> DeviceArray:
        """An input where the graph can read it."""
        place = self.place(graph, name, array)
        if place is not array:
            place[...] = array
        return place

    def place(self, graph: str, name: str, array: NDArray[Any] | DeviceArray) -> DeviceArray:
        """Where the graph can write an output of this shape and type."""
        if isinstance(array, DeviceArray) and array.address % self._alignment == 0:
            return array
        assert isinstance(array, DeviceArray) or array.flags.c_contiguous
        held = self._held.get((graph, name))
        if held is None or held.nbytes < array.nbytes:
            # half as much again: the rows that decoder graphs see grow with every token
            held = self._held[graph, name] = DeviceArray.empty(
                self.device, (array.nbytes + array.nbytes // 2 + 1,), np.uint8
            )
        return DeviceArray(self.device, held.address, array.shape, array.dtype, held)

    def fetch(self, array: NDArray[Any] | DeviceArray, place: DeviceArray) -> None:
        """Bring an output from its place to where it was asked for; waits if that is the host."""
        if isinstance(array, DeviceArray):
            if place is not array:
                array[...] = place
        elif array.nbytes:
            self.device.download(place.address, array)

    def drop(self, graph: str) -> None:
        """Give back what was held for a graph."""
        for key in [key for key in self._held if key[0] == graph]:
            del self._held[key]
