"""The one place that reads the environment: {DYCOKE_NAME} in a URI or a setting stands for a variable's value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dycoke_edge.errors import UsageError

PLACE = re.compile(r"\{(DYCOKE_[A-Z0-9_]+)\}")
HELP = "{DYCOKE_NAME} in it stands for that environment variable, so that no password shows in `ps`"


def fill(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with every {DYCOKE_NAME} replaced, as it stands; UsageError for one that is not set. From now on all
    that is shown has the name for the value, and for the whole text the text as it was written."""
    known = os.environ if environment is None else environment

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            raise UsageError(f"{{{name}}} is used but the environment has no {name}; set it, e.g. export {name}=...")
        hide(known[name], match[0])
        return known[name]

    if PLACE.search(text) is None:
        return text
    from dycoke_edge.runtime.camera.redact import concealed, hide  # late: no side is loaded before it is used

    filled = PLACE.sub(value, text)
    hide(filled, concealed(text))
    return filled
