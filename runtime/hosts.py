"""Which hosts may be connected to: an allow-list of names and networks, checked against what a name resolves to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

from dycoke_edge.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], list[str]]

# Written out, for what `is_global` says differs between releases of Python.
PUBLIC = [ipaddress.ip_network(text) for text in ("0.0.0.0/0", "2000::/3")]
SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
# IPv6 addresses that lead to the IPv4 address in them: where it stands, as right shifts, and what it is XORed with.
LEADING: list[tuple[Network, list[tuple[int, int]]]] = [
    (ipaddress.ip_network(prefix), places)
    for prefix, places in (
        ("::/96", [(0, 0)]),  # IPv4-compatible
        ("::ffff:0:0/96", [(0, 0)]),  # IPv4-mapped
        ("::ffff:0:0:0/96", [(0, 0)]),  # IPv4-translated
        ("64:ff9b::/96", [(0, 0)]),  # NAT64
        ("2002::/16", [(80, 0)]),  # 6to4
        ("2001::/32", [(64, 0), (0, 0xFFFFFFFF)]),  # Teredo: a server, and the client in complement
    )
]
NOWHERE = ipaddress.ip_network("64:ff9b:1::/48")  # NAT64 of a site; nobody else knows where in it the address stands


def resolve(host: str, port: int) -> list[str]:
    """Every address of a host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class AllowedHosts:
    """Names and networks out of the configuration, e.g. "cdn.example.org" or "10.0.0.0/24".

    A name is good for public addresses only; any other address must lie in a network that is named too. So a name
    whose owner points it at this machine or its neighbours leads nowhere. An IPv6 address that leads to an IPv4
    address (mapped, NAT64, 6to4, Teredo) counts as that one.
    """

    def __init__(self, key: str, entries: Sequence[str], resolver: Resolver | None = None) -> None:
        self.key, self._resolve = key, resolver or resolve
        self._names: set[str] = set()
        self._networks = list[Network]()
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.add(_name(key, entry))

    def addresses(self, host: str, port: int) -> list[str]:
        """The addresses to connect to, all of them checked. Raises UsageError for a host that is not allowed."""
        literal = None if "%" in host else _address(host)
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
            if address is None or not (all(map(_is_public, _ends(address))) or self._inside(address)):
                raise self._refused()
        if not found:
            raise UsageError("the host of this URL has no address")
        return found

    def _inside(self, address: Address) -> bool:
        return all(any(end in network for network in self._networks) for end in _ends(address)) or any(
            address in network and network.prefixlen >= prefix.prefixlen  # named by its own, not within all of IPv6
            for network in self._networks
            for prefix in [*(prefix for prefix, _ in LEADING), NOWHERE]
            if address in prefix
        )

    def _refused(self) -> UsageError:
        return UsageError(f"the host of this URL is not allowed; add it, or its network, to server.{self.key}")


def _ends(address: Address) -> list[Address]:
    """Where packets to an address end up."""
    for prefix, places in LEADING:
        if address in prefix and int(address) > 1:  # not :: and ::1
            return [ipaddress.IPv4Address((int(address) >> shift & 0xFFFFFFFF) ^ turned) for shift, turned in places]
    return [ipaddress.IPv4Address(0)] if address in NOWHERE else [address]


def _is_public(address: Address) -> bool:
    return any(address in network for network in PUBLIC) and not any(address in network for network in SPECIAL)


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
