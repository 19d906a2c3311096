"""What a strict H.265 decoder is given: pictures and what they are decoded with, nothing that stands beside them."""

from __future__ import annotations

import av
from av.bitstream import BitStreamFilterContext

KEPT = "filter_units=pass_types=0-34|36|37"  # slices, parameter sets, ends of a sequence; no SEI, delimiter or filler


class PictureUnits:
    """A filter for the packets of one stream. A decoder that refuses pictures whose references are missing refuses
    those beside a broken message too, and cameras send broken messages."""

    def __init__(self, stream: av.VideoStream) -> None:
        """Also takes the messages out of what the stream was announced with. Before the decoder is opened."""
        self._filter = BitStreamFilterContext(KEPT, stream)
        context = stream.codec_context
        if context.extradata:
            context.extradata = b"".join(bytes(kept) for kept in self._filter.filter(av.Packet(context.extradata)))
            self._filter.flush()

    def of(self, packet: av.Packet[av.VideoStream]) -> list[av.Packet[av.VideoStream]]:
        """The packet without messages; none if there is nothing else in it. The last one, which is empty, stays."""
        return self._filter.filter(packet) if packet.size else [packet]
