"""What TensorRT says, kept; and what of it went wrong, in our words."""

from __future__ import annotations

import re
import threading
from collections import deque

KEPT = 200  # lines of each kind
FAILED = ("ERROR", "INTERNAL_ERROR")
# "[a.cpp::f::12] Error Code 2: " and "2: [a.cpp::f::12] Error Code 2: "
PLACE = re.compile(r"^(?:\[[^\]]*\]\s*)?(?:\d+:\s*)?(?:\[[^\]]*\]\s*)?(?:Error Code \d+:\s*)?")
REMEDIES = (
    (
        re.compile(r"out of memory|OutOfMemory|Cuda failure: 2\b|insufficient memory|failed to allocate", re.I),
        "the GPU has no memory left: end other programs on the GPU, or use a smaller --vision-batch, --kv-capacity or "
        "--workspace",
    ),
    (
        re.compile(r"no CUDA-capable device|CUDA initialization failure|driver version is insufficient", re.I),
        "there is no GPU that TensorRT can use: nvidia-smi must show one",
    ),
)


class Journal:
    """The last lines that TensorRT logged, from whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warnings: deque[str] = deque(maxlen=KEPT)
        self._errors: deque[str] = deque(maxlen=KEPT)

    def add(self, severity: str, text: str) -> None:
        """Keep an error or a warning; a builder says much else."""
        with self._lock:
            if severity in FAILED:
                self._errors.append(text)
            elif severity == "WARNING":
                self._warnings.append(text)

    def clear(self) -> None:
        """Forget."""
        with self._lock:
            self._warnings.clear()
            self._errors.clear()

    @property
    def errors(self) -> list[str]:
        """Errors since `clear`."""
        with self._lock:
            return list(self._errors)

    @property
    def warnings(self) -> list[str]:
        """Warnings since `clear`."""
        with self._lock:
            return list(self._warnings)

    def explain(self, failed: str, otherwise: str = "") -> str:
        """One line: what failed, what TensorRT said of it, and what to do."""
        said = self.errors or self.warnings[-1:]  # 8.6 calls it a warning that there is no GPU
        everything = " ".join(said)
        remedy = next((words for pattern, words in REMEDIES if pattern.search(everything)), otherwise)
        reason = plain(said[0]) if said else "it gives no reason"
        return f"{failed}: {reason}" + (f"; {remedy}" if remedy else "")


def plain(text: str) -> str:
    """A line of TensorRT without the place in its sources."""
    return PLACE.sub("", " ".join(text.split()))[:300]
