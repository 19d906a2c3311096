"""The oldest packages that pyproject.toml allows, as requirements: `python -m tests.floors [EXTRA...]` prints them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(*extras: str) -> list[str]:
    """name==version of what the package and these extras ask for, torch left out: see Makefile."""
    tomllib = import_module("tomllib")  # Python 3.11; tests that come here skip before it
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    asked = project["dependencies"] + [each for extra in extras for each in project["optional-dependencies"][extra]]
    return [each.replace(">=", "==") for each in asked if not each.startswith("torch")]


if __name__ == "__main__":
    print(*floors(*sys.argv[1:]))
