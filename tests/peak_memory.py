"""Exports a checkpoint and prints the most anonymous memory that the process held meanwhile, in bytes.

    python -m tests.peak_memory MODEL_DIR BUNDLE DTYPE

RssAnon of /proc/self/status is what a process must have in RAM or swap: its heap. Pages of mapped files (safetensors
that are read, graphs that are checked) count in RSS and in ru_maxrss too, but the kernel drops them when memory is
short: they limit no export.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import cast

import torch

from dycoke_edge.config import DType, ExportSpec
from dycoke_edge.export.build import export

EVERY = 0.002  # seconds


def anonymous() -> int:
    """Bytes of anonymous memory now."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class Watch(threading.Thread):
    """Samples until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(EVERY):
            self.peak = max(self.peak, anonymous())


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch = Watch()
    watch.start()
    spec = ExportSpec(dtype=cast(DType, sys.argv[3]), merge_ratio=(1.0,), split_layer=1)
    export(sys.argv[1], sys.argv[2], spec)
    watch.over.set()
    watch.join()
    print(watch.peak)
