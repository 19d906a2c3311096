"""Where an answer on the GPU stands: its state there, and the records that come back, one a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.state import OFFSETS, RECORD, STATE

RING = 64  # records kept; the host reads each soon after it was made


class Records:
    """The state of one KV buffer's answer, and a ring of records in pinned memory."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.state = DeviceArray.empty(device, (STATE.itemsize,), np.uint8)
        self.ring = DeviceArray.empty(device, (RING, RECORD.itemsize), np.uint8)
        self._host = device.pinned(RING * RECORD.itemsize).view(RECORD)
        self._events = [device.event() for _ in range(RING)]
        self.count = 0  # tokens picked, as the GPU counts them

    def begin(self, **values: float) -> None:
        """Fields of STATE; those not named are zero."""
        state = np.zeros(1, STATE)
        for name, value in (values | {"step": self.count}).items():
            state[name] = value
        self.device.upload(self.state.address, state.view(np.uint8))

    def tell(self, name: str, value: int) -> None:
        """Change one field."""
        self.device.upload(self.state.address + OFFSETS[name], np.array([value], np.int32))

    def note(self) -> None:
        """A token was picked: its record is on its way."""
        at = self.count % RING
        self.device.download_async(self.ring[at].address, self._host[at : at + 1])
        self._events[at].record()
        self.count += 1

    def wait(self, number: int) -> Any:
        """The record of a token by its number, counted from the first ever; EngineError if it has none."""
        assert 0 < self.count - number <= RING
        self._events[number % RING].wait()
        record = self._host[number % RING].copy()
        if not record["finite"]:
            raise not_finite()
        return record


def not_finite() -> EngineError:
    """Damaged weights, or a model that fp16 cannot hold."""
    return EngineError("the model's logits are not finite; run: dycoke-edge verify BUNDLE")
