"""Stop strings: where an answer ends because of what it says."""

from __future__ import annotations


class Until:
    """Text up to the first of several stop strings, which may come in parts. What could still become one is held back.
    The first is the one that is complete first, so that it does not matter in which parts the text comes."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops  # none of them empty
        self.reached = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take text in; returns what certainly stands before a stop string. Nothing comes after one."""
        if self.reached:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        self.reached = bool(found)
        cut = min(found)[1] if found else len(text) - self._open(text)
        self._held = "" if found else text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """Letters at the end of a text that may be the beginning of a stop string."""
        return max(
            (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
