"""One measured quantity and its percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Fewest samples from which a percentile is reported. Of so many, two or more lie beyond it with 99 % certainty: the
# floors of MLPerf's early stopping. A median is always given.
FLOORS = {50: 1, 90: 64, 95: 130, 99: 662}
UNSTEADY = 0.05  # standard deviation over mean above which clocks are likely to move


def summary(values: Sequence[float], unit: str) -> dict[str, Any]:
    """For JSON: unit, samples, avg, min, max, std, and percentiles, which are None below their floor."""
    data = np.asarray(values, np.float64)
    percentiles = {
        f"p{share}": float(np.percentile(data, share)) if data.size >= floor else None
        for share, floor in FLOORS.items()
    }
    return {
        "unit": unit,
        "samples": int(data.size),
        "avg": float(data.mean()),
        "min": float(data.min()),
        "max": float(data.max()),
        "std": float(data.std()),
        **percentiles,
    }


def unsteady(metric: dict[str, Any]) -> float | None:
    """The coefficient of variation where it is high enough to warn of."""
    share = float(metric["std"] / metric["avg"]) if metric["avg"] else 0.0
    return share if metric["samples"] > 1 and share > UNSTEADY else None
