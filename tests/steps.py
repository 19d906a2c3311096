"""A regular expression matcher that backtracks as `re` does and counts its steps, so that a test can bound the work."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser
else:
    import sre_parse as parser

CATEGORIES = {"CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}


class TooManyStepsError(AssertionError):
    """A pattern tried more than it may."""


class Steps:
    """Counts what is tried, for several patterns together; raises beyond `most`."""

    def __init__(self, most: float) -> None:
        self.most, self.taken = most, 0

    def take(self) -> None:
        self.taken += 1
        if self.taken > self.most:
            raise TooManyStepsError(f"more than {self.most:g} steps")


class Counted:
    """A compiled pattern whose searches cost steps. What it finds is checked against `re` itself."""

    def __init__(self, pattern: re.Pattern[str], steps: Steps) -> None:
        self._real, self._steps = pattern, steps
        parsed: Any = parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE)
        self._nodes = list(parsed)
        self._ignore = bool(parsed.state.flags & re.IGNORECASE)

    def search(self, text: str, start: int = 0, end: int = sys.maxsize) -> re.Match[str] | None:
        end = min(end, len(text))
        found = self._real.search(text, start, end)
        for at in range(start, end + 1):
            self._steps.take()
            stop = next(self._match(self._nodes, 0, text, at, end), None)
            if stop is not None:
                assert found is not None and found.span() == (at, stop), (self._real.pattern, at, stop, found)
                return found
        assert found is None, (self._real.pattern, found)
        return None

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        at = 0
        while at <= len(text) and (found := self.search(text, at)):
            yield found
            at = found.end() + (found.end() == found.start())

    def sub(self, new: str | Callable[[re.Match[str]], str], text: str, count: int = 0) -> str:
        pieces, at = list[str](), 0
        for number, found in enumerate(self.finditer(text), 1):
            pieces += [text[at : found.start()], found.expand(new) if isinstance(new, str) else new(found)]
            at = found.end()
            if number == count:
                break
        return "".join([*pieces, text[at:]])

    def _match(self, nodes: list[Any], index: int, text: str, at: int, end: int) -> Iterator[int]:
        """Where the nodes from `index` on may stop, the first choice first."""
        if index == len(nodes):
            yield at
            return
        for stop in self._node(nodes[index], text, at, end):
            yield from self._match(nodes, index + 1, text, stop, end)

    def _node(self, node: tuple[Any, Any], text: str, at: int, end: int) -> Iterator[int]:
        self._steps.take()
        kind, value = str(node[0]), node[1]
        if kind == "SUBPATTERN":
            yield from self._match(list(value[-1]), 0, text, at, end)
        elif kind == "BRANCH":
            for branch in value[1]:
                yield from self._match(list(branch), 0, text, at, end)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            direction, inner = value
            assert direction == 1 or len(inner) == 1  # behind stands one letter
            place = at if direction == 1 else at - 1
            held = place >= 0 and next(self._match(list(inner), 0, text, place, end), None) is not None
            if held == (kind == "ASSERT"):
                yield at
        elif kind == "MAX_REPEAT":
            yield from self._repeat(value, text, at, end)
        elif kind == "AT":
            if re.compile({"AT_BOUNDARY": r"\b"}[str(value)]).match(text, at):
                yield at
        elif at < end and self._letter(node, text[at]):
            yield at + 1

    def _repeat(self, value: tuple[int, Any, Any], text: str, at: int, end: int) -> Iterator[int]:
        least, most, inner = value
        nodes = list(inner)
        if least == 0 and most == 1:
            yield from self._match(nodes, 0, text, at, end)
            yield at
            return
        assert len(nodes) == 1, "only letters are repeated"
        stops = [at]
        for _ in range(most) if isinstance(most, int) and most < sys.maxsize // 4 else count():
            stop = next(self._node(nodes[0], text, stops[-1], end), None)
            if stop is None:
                break
            stops.append(stop)
        for stop in reversed(stops[least:]):
            self._steps.take()
            yield stop

    def _letter(self, node: tuple[Any, Any], letter: str) -> bool:
        kind, value = str(node[0]), node[1]
        if kind == "IN":
            negated = str(value[0][0]) == "NEGATE"
            return any(self._letter(one, letter) for one in value[negated:]) != negated
        if kind == "CATEGORY":
            return re.match(CATEGORIES[str(value)], letter) is not None
        if kind == "ANY":
            return letter != "\n"
        if kind == "NOT_LITERAL":
            return ord(letter) != int(value)
        cases = {letter, letter.lower(), letter.upper()} if self._ignore else {letter}
        low, high = value if kind == "RANGE" else (value, value)
        assert kind in ("RANGE", "LITERAL"), kind
        return any(len(one) == 1 and int(low) <= ord(one) <= int(high) for one in cases)
