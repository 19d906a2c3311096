"""URLs in the one form that every parser reads alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address

# RFC 3986 without what programs disagree on: brackets, \, % and blanks in or around a host, letters in a port,
# a host that is not ASCII. People do write an @ in a password: the last one ends it.
_URL = re.compile(
    r"(?P<scheme>[A-Za-z]+)://"
    r"(?:(?P<login>[^][/?#\\\s]*)@)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>(?:[/?#].*)?)"
)


@dataclass(frozen=True)
class Place:
    """A URL's parts. `str()` puts them together again, and nothing else. `host` has no brackets; `login` is as it was
    written, with %40 for an @ in it; `rest` begins with the path; `usual` is the scheme's own port."""

    scheme: str
    login: str
    host: str
    port: int
    rest: str
    usual: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.login}{'@' if self.login else ''}{self.netloc}{self.rest}"

    @property
    def netloc(self) -> str:
        """Host, and port if it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == self.usual else f"{host}:{self.port}"


def place(url: str, ports: Mapping[str, int]) -> Place:
    """The parts of a URL whose scheme is a key of `ports`, which has the port to take where none is named. Raises
    ValueError for what one program could read otherwise than another."""
    found = _URL.fullmatch(url)
    if found is None or not url.isprintable() or "\\" in url:
        raise ValueError("malformed URL")
    if found["host"].startswith("["):
        IPv6Address(found["host"][1:-1])
    scheme, host = found["scheme"].lower(), found["host"].lower().strip("[]")
    login = (found["login"] or "").replace("@", "%40")
    port = int(found["port"]) if found["port"] else ports.get(scheme, 0)
    if scheme not in ports or not 0 < port < 65536:
        raise ValueError("malformed URL")
    return Place(scheme, login, host, port, found["rest"], ports[scheme])
