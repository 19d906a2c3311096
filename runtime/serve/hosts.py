"""Which hosts may be connected to: an allow-list of names and networks, checked against what a name resolves to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

from dycoke_edge.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """Every address of a host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class AllowedHosts:
    """Names and networks out of the configuration, e.g. "cdn.example.org" or "10.0.0.0/24".

    A name is good for public addresses only; any other address must lie in a network that is named too. So a name
    whose owner points it at this machine or its neighbours leads nowhere.
    """

    def __init__(self, key: str, entries: Sequence[str], resolver: Resolver = resolve) -> None:
        self.key, self._resolve = key, resolver
        self._names: set[str] = set()
        self._networks = list[ipaddress.IPv4Network | ipaddress.IPv6Network]()
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.add(_name(key, entry))

    def addresses(self, host: str, port: int) -> list[str]:
        """The addresses to connect to, all of them checked. Raises UsageError for a host that is not allowed."""
        literal = _address(host)
        if literal is not None:
            if not self._inside(literal):
                raise self._refused()
            return [str(literal)]
        if host.lower().rstrip(".") not in self._names:
            raise self._refused()
        try:
            found = self._resolve(host, port)
        except (OSError, UnicodeError):
            raise UsageError("the host of this URL has no address") from None
        for text in found:
            address = _address(text)
            if address is None or (not (address.is_global and not address.is_multicast) and not self._inside(address)):
                raise self._refused()
        if not found:
            raise UsageError("the host of this URL has no address")
        return found

    def _inside(self, address: Address) -> bool:
        return any(address in network for network in self._networks)

    def _refused(self) -> UsageError:
        return UsageError(f"the host of this URL is not allowed; add it, or its network, to server.{self.key}")


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def _name(key: str, entry: str) -> str:
    name = entry.lower().rstrip(".")
    if not name or not all(part and part.isascii() and part.replace("-", "a").isalnum() for part in name.split(".")):
        raise UsageError(f"server.{key}: {entry!r} is neither a host name nor a network, e.g. 10.0.0.0/24")
    return name
