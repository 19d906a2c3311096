"""Takes credentials out of any text before somebody sees it. In doubt it takes out more."""

from __future__ import annotations

import re

HIDDEN = "***"
# What may stand in a query for everyone to see. All else may be a secret: cameras know no common name for it.
HARMLESS = frozenset(
    [
        *("channel", "subtype", "stream", "profile", "resolution", "codec", "format", "fps", "width", "height"),
        *("seconds", "noise", "motion", "seed", "cut"),
    ]
)
_LOCAL = frozenset(("file", "v4l2", "csi", "test", "gst"))  # an @ in these is no login
_SCHEME = re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*)://", re.I)
_QUERY = re.compile(r"[?#](\S*)")
_SECRETS = r"pass(?:w(?:or)?d|phrase)?|pwd|pw|secret|token|api[_-]?key|access[_-]?key|credentials?"
_PAIR = re.compile(rf"\b((?:[\w-]*[_-])?(?:{_SECRETS})(?:[_-]\w+)?['\"]?\s*[=:]\s*)\S+", re.I)
_LOGIN = re.compile(r"\b((?:user(?:[_-]?(?:name|id))?|login)=)\S+", re.I)
_HEADER = re.compile(r"\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=]\s*)\S.*", re.I)
_BARE = re.compile(r"(?<![^\s'\"=(<\[,])[^\s/'\"=(<\[,:@]+:(?!//)\S*@")


def redact(text: str) -> str:
    """The text without user names, passwords and tokens; hosts and paths stay where they can be told apart from them.
    Doing it twice changes nothing."""
    return "\n".join(map(_line, text.split("\n")))


def _line(text: str) -> str:
    pieces, end = [], len(text)
    for start, body in reversed(_addresses(text)):
        pieces.append(text[start:body] + _address(text[body:end]))
        end = start
    text = _HEADER.sub(rf"\1\2{HIDDEN}", "".join([text[:end], *reversed(pieces)]))
    text = _QUERY.sub(lambda match: match[0] if "=" not in match[1] else match[0][0] + _query(match[1]), text)
    text = _LOGIN.sub(rf"\1{HIDDEN}", _PAIR.sub(rf"\1{HIDDEN}", text))
    return _BARE.sub(f"{HIDDEN}@", text)


def _addresses(text: str) -> list[tuple[int, int]]:
    """Where each address starts, and what follows its scheme. One inside another belongs to it: it may be part of a
    password."""
    found: list[tuple[int, int]] = []
    for match in _SCHEME.finditer(text):
        inside = found and not re.search(r"\s", text[found[-1][1] : match.start()])
        if match[1].lower() not in _LOCAL and not inside:
            found.append((match.start(), match.end()))
    return found


def _address(text: str) -> str:
    """What follows a scheme, up to the next address. The login ends at the last @, for a password may hold one; with
    a ? before that nobody can tell a password from a query."""
    login, at, rest = text.rpartition("@")
    if at and re.search(r"[?#]", login):
        return HIDDEN + re.sub(r"^\S*", "", rest)
    place, *query = re.split(r"(?=[?#])", rest, maxsplit=1)
    shown = place + "".join(_QUERY.sub(lambda match: match[0][0] + _query(match[1]), part, count=1) for part in query)
    return f"{HIDDEN}@{shown}" if at else shown


def _query(query: str) -> str:
    parts = [part.partition("=") for part in query.split("&")]
    plain = not query or all(
        key.lower() in HARMLESS and re.fullmatch(r"[\w.-]{0,12}", value) for key, _, value in parts
    )
    return query if plain else HIDDEN
