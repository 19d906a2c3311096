"""The bytes that a decode step reads and leaves behind: kernels/state.cuh in numpy's words."""

from __future__ import annotations

import numpy as np

INTS = [
    *("token", "position", "origin", "num_visual", "num_active", "num_text", "step", "keep", "num_keep"),
    *("first", "one_shot", "turned", "refreshed", "swaps"),
]
STATE = np.dtype([*((name, np.int32) for name in INTS), ("threshold", np.float32), ("reserved", np.int32)])
RECORD = np.dtype(
    [(name, np.int32) for name in ("token", "active", "refreshed", "swaps", "finite", "step")]
    + [("reserved", np.int32, 2)]
)
PART = np.dtype([("most", np.float32), ("total", np.float32)])
KEEP = {"off": 0, "coverage": 1, "paper": 1, "official": 2}  # by attention, of each mode
OFFSETS = {name: int(place[1]) for name, place in (STATE.fields or {}).items()}
