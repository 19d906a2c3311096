"""FileSource: a file, read by FFmpeg or, as `run` does, an animated WebP or PNG by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.errors import InputError
from dycoke_edge.runtime import images
from dycoke_edge.runtime.budget import TooLarge
from dycoke_edge.runtime.camera.av_source import AvSource
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo
from dycoke_edge.runtime.camera.picker import Picture
from dycoke_edge.runtime.video import narrowed, resize

OPTION = "URI"  # what errors call the file


class FileSource(AvSource):
    """A file of pictures. What it holds is found out when it is opened. Of an animation one picture at a time is in
    memory; each is shown for as long as the file says."""

    _animated = False

    def open(self) -> SourceInfo:
        path = Path(self._address.target)
        try:
            self._animated = path.is_file() and images.kind(path, self._spec.max_pixels, OPTION) == "animation"
            return self._about(path) if self._animated else super().open()
        except TooLarge as error:
            raise SourceError("unreadable", str(error)) from None

    def __iter__(self) -> Iterator[Frame]:
        if not self._animated:
            yield from super().__iter__()
            return
        for picture in self._pictures():
            if self._stop.is_set():
                return
            self.tally.last_packet = self._clock.monotonic()
            yield from self._picker.offer(picture)
        if not self._stop.is_set():
            yield from self._picker.finish()

    def _about(self, path: Path) -> SourceInfo:
        if self._stop.is_set():
            raise SourceError("ended", f"{self._address.shown} was interrupted")
        with images.opened(path, OPTION, self._spec.max_pixels) as image:
            codec = "apng" if image.format == "PNG" else "webp"  # as FFmpeg calls them
            return SourceInfo(self._address.shown, self._live, True, codec, image.width, image.height)

    def _pictures(self) -> Iterator[Picture]:
        stamp = 0.0
        try:
            with images.opened(Path(self._address.target), OPTION, self._spec.max_pixels) as image:
                for frame in images.frames(image):
                    length = images.length(frame)
                    yield self._shown_for(np.asarray(images.rgb(frame)), stamp, length)
                    stamp += length
        except InputError as error:
            raise SourceError("unreadable", str(error)) from None

    def _shown_for(self, image: NDArray[np.uint8], stamp: float, length: float) -> Picture:
        size = self._spec.size
        return Picture(
            develop=lambda: image if size is None else resize(image[None], size)[0],
            stamp=stamp,
            length=length,
            shape=(image.shape[0], image.shape[1]),
            draw=lambda width: narrowed(image, width),
        )
