"""Where tokens stand, for RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Positions:
    """RoPE positions of a part of a prompt: visual token v has `first` + places[v], the text begins at `text`."""

    places: Any  # int [M], on the host or where the layers compute
    first: int
    text: int

    def on_host(self, num_text: int) -> NDArray[np.int64]:
        """int64 [M + Q]; waits for places that only a GPU knows."""
        visual = self.first + np.asarray(self.places, np.int64)
        return np.concatenate((visual, self.text + np.arange(num_text)))
