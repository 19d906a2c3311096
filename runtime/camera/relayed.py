"""RelayedSource: an RTSP camera that may be at some hosts only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from av.container import InputContainer

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.av_source import AvSource
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo
from dycoke_edge.runtime.camera.relay import Relay
from dycoke_edge.runtime.camera.uri import Address
from dycoke_edge.runtime.hosts import AllowedHosts


class RelayedSource(AvSource):
    """An RTSP stream that FFmpeg reads through a relay, which looks the host up, checks it and refuses redirects, at
    every connection anew."""

    def __init__(self, address: Address, spec: ReaderSpec, source_id: str, clock: Clock) -> None:
        super().__init__(address, replace(spec, transport="tcp"), source_id, clock)  # UDP would go past the relay
        hosts = AllowedHosts("stream_hosts", spec.hosts)
        self._relay = Relay(address.target, hosts, address.shown, spec.open_timeout)

    def open(self) -> SourceInfo:
        try:
            return super().open()
        except SourceError as error:
            raise self._relay.failure or error from None

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from super().__iter__()
        except SourceError as error:
            raise self._relay.failure or error from None
        if self._relay.failure is not None:
            raise self._relay.failure

    def close(self) -> None:
        super().close()
        self._relay.close()

    def _opened(self) -> InputContainer:
        self._address = replace(self._address, target=self._relay.open())
        return super()._opened()
