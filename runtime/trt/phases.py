"""How far a build is, from phases that lie in phases."""

from __future__ import annotations


class Phases:
    """TensorRT names a phase, its parent and its steps, and says when a step is done."""

    def __init__(self) -> None:
        self._open: dict[str, list[int]] = {}  # name -> steps done, steps in all; from the outermost to the innermost
        self._parent: dict[str, str | None] = {}
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._open[name], self._parent[name] = [0, max(steps, 1)], parent

    def step(self, name: str, step: int) -> None:
        """A step of a phase is done; the first is 0."""
        if name in self._open:
            self._open[name][0] = step + 1

    def finish(self, name: str) -> None:
        """A phase is over."""
        self._open.pop(name, None)
        self._parent.pop(name, None)

    @property
    def share(self) -> float:
        """0 to 1, never less than it was: later phases may begin anew."""
        share, width, inside = 0.0, 1.0, None
        while name := next((n for n in self._open if self._parent[n] == inside), None):
            done, steps = self._open[name]
            share += width * min(done / steps, 1.0)
            width, inside = width / steps, name
        self._most = max(self._most, min(share, 1.0))
        return self._most
