"""Takes credentials out of any text before somebody sees it. In doubt it takes out more.

Strangers choose the text, so work grows with its length and no faster: no pattern tries a stretch of text again from
each of its letters. `tests/test_redact.py` counts the steps."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST = 4  # letters of a value that is looked for in any text; "10" stands everywhere
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
_SPACE = re.compile(r"\s")
_SECRETS = r"pass(?:w(?:or)?d|phrase)?|pwd|pw|secret|token|api[_-]?key|access[_-]?key|credentials?"
_SECRET = re.compile(rf"(?<![^\W_])(?:{_SECRETS})(?![^\W_])", re.I)
_KEY = re.compile(r"(?<![\w-])([\w-]+)['\"]?\s*[=:]\s*(?=\S)")
_LOGIN = re.compile(r"\b((?:user(?:[_-]?(?:name|id))?|login)=)\S+", re.I)
_HEADER = re.compile(r"\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=]\s*)\S.*", re.I)
_WORD = re.compile(r"\S+")
_BARE = re.compile(r"(?<![^\s'\"=(<\[,])[^\s/'\"=(<\[,:@]+:(?!//)")


class _Values:
    """Texts that nobody may see, and what they are shown as. Only grows; any thread may look while another adds."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None

    def add(self, forms: set[str], shown: str) -> None:
        known = self._shown | {form: shown for form in forms if len(form) >= SHORTEST and form not in self._shown}
        known[shown] = shown  # what is replaced already stays, whatever a value is part of
        self._shown = known
        self._pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))

    def replace(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(lambda match: self._shown[match[0]], text)


_VALUES = _Values()


def hide(value: str, shown: str) -> None:
    """Have `redact` put `shown`, e.g. the name of a variable, wherever `value` or another spelling of it stands: in
    URIs, in the words of FFmpeg and in logs alike. For the rest of this process; values shorter than SHORTEST stay."""
    spellings = {value, value.lower(), quote(value), quote(value, safe=""), unquote(value), repr(value)[1:-1]}
    _VALUES.add(spellings | {form.strip() for form in spellings}, shown)


def concealed(text: str) -> str:
    """The text without the values that were hidden; all else stays."""
    return _VALUES.replace(text)


def redact(text: str) -> str:
    """The text without user names, passwords and tokens, and without what `hide` was told; hosts and paths stay where
    they can be told apart from them. Doing it twice changes nothing."""
    return "\n".join(map(_line, concealed(text).split("\n")))


def one_line(text: str, most: int) -> str:
    """A stranger's text as one redacted line, at most `most` letters. It is cut before anything looks at it."""
    if len(text) > most:
        text = f"{text[:most]}@"  # as if it had gone on as a login does, for what was cut off may be its end
    return printable(redact(text))[:most]


def printable(text: str) -> str:
    """The text with escapes for all that would end a line, steer a terminal or turn the direction of writing."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _line(text: str) -> str:
    pieces, end = [], len(text)
    for start, body in reversed(_addresses(text)):
        pieces.append(text[start:body] + _address(text[body:end]))
        end = start
    text = _HEADER.sub(rf"\1\2{HIDDEN}", "".join([text[:end], *reversed(pieces)]))
    text = _QUERY.sub(lambda match: match[0] if "=" not in match[1] else match[0][0] + _query(match[1]), text)
    text = _LOGIN.sub(rf"\1{HIDDEN}", _values(text))
    return _WORD.sub(lambda match: _login(match[0]), text)


def _addresses(text: str) -> list[tuple[int, int]]:
    """Where each address starts, and what follows its scheme. One inside another belongs to it: it may be part of a
    password."""
    found: list[tuple[int, int]] = []
    end = 0  # of the word that the last address stands in
    for match in _SCHEME.finditer(text):
        if match[1].lower() not in _LOCAL and match.start() >= end:
            found.append((match.start(), match.end()))
            end = _end(text, match.end())
    return found


def _end(text: str, at: int) -> int:
    """Where the word that `at` stands in ends."""
    space = _SPACE.search(text, at)
    return space.start() if space else len(text)


def _address(text: str) -> str:
    """What follows a scheme, up to the next address. The login ends at the last @, for a password may hold one; with
    a ? before that nobody can tell a password from a query."""
    login, at, rest = text.rpartition("@")
    if at and ("?" in login or "#" in login):
        return HIDDEN + rest[_end(rest, 0) :]
    place, *query = re.split(r"(?=[?#])", rest, maxsplit=1)
    shown = place + "".join(_QUERY.sub(lambda match: match[0][0] + _query(match[1]), part, count=1) for part in query)
    return f"{HIDDEN}@{shown}" if at else shown


def _values(text: str) -> str:
    """The text with the values of secret keys hidden."""
    pieces, at = [], 0
    for match in _KEY.finditer(text):
        if match.start() >= at and _SECRET.search(match[1]):
            pieces += [text[at : match.end()], HIDDEN]
            at = _end(text, match.end())
    return "".join([*pieces, text[at:]])


def _login(word: str) -> str:
    """A word with the login before its last @ hidden, if it has one."""
    at = word.rfind("@")
    login = _BARE.search(word, 0, at + 1) if at > 0 else None
    return f"{word[: login.start()]}{HIDDEN}{word[at:]}" if login else word


def _query(query: str) -> str:
    parts = [part.partition("=") for part in query.split("&")]
    plain = not query or all(
        key.lower() in HARMLESS and re.fullmatch(r"[\w.-]{0,12}", value) for key, _, value in parts
    )
    return query if plain else HIDDEN
