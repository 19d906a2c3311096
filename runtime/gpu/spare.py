"""GPU memory that was given back and is kept for the next who wants as much."""

from __future__ import annotations

from collections import defaultdict

LIMIT = 256 << 20  # bytes kept


class Spare:
    """Blocks by size: a request asks for those of the one before, and the driver's own free waits for the GPU."""

    def __init__(self) -> None:
        self._blocks: defaultdict[int, list[int]] = defaultdict(list)
        self.nbytes = 0

    def take(self, nbytes: int) -> int | None:
        """The address of a block of exactly so many bytes, if there is one."""
        blocks = self._blocks[nbytes]
        if not blocks:
            return None
        self.nbytes -= nbytes
        return blocks.pop()

    def keep(self, address: int, nbytes: int) -> bool:
        """Whether the block is kept; otherwise there is no room for it."""
        if self.nbytes + nbytes > LIMIT:
            return False
        self.nbytes += nbytes
        self._blocks[nbytes].append(address)
        return True

    def clear(self) -> list[int]:
        """All addresses, which are kept no longer."""
        kept = [address for blocks in self._blocks.values() for address in blocks]
        self._blocks.clear()
        self.nbytes = 0
        return kept
