"""Room in the temporary folder, where what a request shows lies while it is decoded."""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException | None) -> OSError | None:
    """The full disk that an error comes from, whatever was made of it since: to a decoder it is a damaged file."""
    for _ in range(16):
        if error is None or (isinstance(error, OSError) and error.errno in FULL):
            return error
        error = error.__cause__ or error.__context__
    return None
