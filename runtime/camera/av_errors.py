"""What FFmpeg's errors mean for the person who owns the camera, without the address that FFmpeg puts in them."""

from __future__ import annotations

import errno

from av import error as av_error

from dycoke_edge.runtime.camera.failure import Code, SourceError
from dycoke_edge.runtime.camera.uri import Address

KINDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Code, str], ...] = (
    (
        (av_error.HTTPUnauthorizedError, av_error.HTTPForbiddenError),
        "auth_failed",
        "refused the login; check user and password, with special characters in them written as %XX",
    ),
    (av_error.HTTPNotFoundError, "not_found", "has no such stream; check the path"),
    ((av_error.TimeoutError, av_error.ExitError), "timeout", "sent nothing in time; check the camera and the network"),
    (av_error.ConnectionRefusedError, "refused", "refused the connection; check host and port"),
    (
        (av_error.ConnectionResetError, av_error.BrokenPipeError, av_error.ConnectionAbortedError, av_error.EOFError),
        "ended",
        "broke the connection off",
    ),
    (av_error.FileNotFoundError, "not_found", "does not exist; check the path"),
    (av_error.PermissionError, "unreadable", "may not be read; check its permissions"),
    (av_error.IsADirectoryError, "unreadable", "is a folder; give one file"),
    (
        (av_error.DecoderNotFoundError, av_error.PatchWelcomeError),
        "codec_unsupported",
        "uses a codec this FFmpeg cannot decode; set the camera to H.264 or H.265",
    ),
)


def explain(error: Exception, address: Address) -> SourceError:
    """The SourceError for what FFmpeg raised."""
    for kinds, code, text in KINDS:
        if isinstance(error, kinds):
            patient = address.kind == "rtsp"  # a device or file that is missing may come back at any time
            return SourceError(code, f"{address.shown} {text}", patient)
    number = getattr(error, "errno", None)
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
        return SourceError("refused", f"{address.shown} cannot be reached; check host and network")
    if number == errno.EIO and address.target.lower().startswith("rtsps:"):
        return SourceError(
            "tls", f"{address.shown} speaks no TLS that FFmpeg takes; check host and port, or use rtsp://"
        )
    if number == errno.EIO and address.kind == "rtsp":
        return SourceError("refused", f"{address.shown} cannot be reached; check host and network")
    reason = " ".join((getattr(error, "strerror", None) or type(error).__name__).split())
    return SourceError("unreadable", f"{address.shown} cannot be read as video ({reason})")
