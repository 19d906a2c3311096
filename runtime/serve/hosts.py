"""Where a request may lead, in the words of `runtime.hosts`."""

from __future__ import annotations

from dycoke_edge.runtime.hosts import AllowedHosts, resolve

__all__ = ["AllowedHosts", "resolve"]
