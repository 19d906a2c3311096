"""SourceError: why a stream cannot be opened or read, in a word that programs can use and a line without secrets."""

from __future__ import annotations

from typing import Literal

from dycoke_edge.errors import InputError
from dycoke_edge.runtime.camera.redact import redact

Code = Literal["auth_failed", "not_found", "timeout", "refused", "tls", "codec_unsupported", "ended", "unreadable"]
PATIENT: frozenset[Code] = frozenset(("auth_failed", "not_found", "codec_unsupported"))  # haste only locks accounts


class SourceError(InputError):
    """A stream that cannot be opened or read, or that ended. The text never holds credentials. `patient`: trying again
    soon would not help."""

    def __init__(self, code: Code, text: str, patient: bool = True) -> None:
        super().__init__(redact(text))
        self.code: Code = code
        self.patient = patient and code in PATIENT
