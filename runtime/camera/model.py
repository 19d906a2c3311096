"""What cameras need of a model: the part of VideoLLM and LiveVideo that they call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config import Compression, LiveSpec, Sampling
from dycoke_edge.runtime.conversation import Asked
from dycoke_edge.runtime.reply import Piece, Reply
from dycoke_edge.runtime.scores import Scores


class Pushed(Protocol):
    """What became of a frame."""

    @property
    def gated(self) -> bool: ...

    @property
    def tokens_in(self) -> int: ...

    @property
    def tokens_kept(self) -> int: ...


class Live(Protocol):
    """A LiveVideo."""

    def push(self, image: NDArray[np.uint8], time: float | None = None) -> Pushed: ...

    def forget_before(self, time: float) -> int: ...

    def clear(self) -> None: ...

    def ask(self, prompt: Asked, sampling: Sampling) -> Iterator[Piece]: ...

    def score(self, prompt: str, answers: tuple[str, ...] = ("yes", "no")) -> Scores: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Model(Protocol):
    """A VideoLLM."""

    def check_live(self, prompt: Asked, answers: tuple[str, ...] = (), spec: LiveSpec = ...) -> None: ...

    def live(self, compression: Compression, spec: LiveSpec) -> Live: ...

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Piece]: ...

    def reply(self, pieces: Iterable[Piece]) -> Reply: ...
