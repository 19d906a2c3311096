"""The test picture: moving things on a textured ground, drawn anew for every frame and always the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.config_camera import ReaderSpec
from dycoke_edge.runtime.camera.clock import Clock
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.frame import Frame, SourceInfo, Tally
from dycoke_edge.runtime.camera.picker import Picker, Picture
from dycoke_edge.runtime.camera.uri import Address
from dycoke_edge.runtime.video import narrowed, resize

COLOURS = ((220, 40, 40), (40, 190, 60), (50, 80, 230))


class PatternSource:
    """test://?fps=10&seconds=0&noise=0&motion=1&width=640&height=480&seed=0&cut=0: `seconds` 0 never ends, `noise` is
    in levels of 255, `motion` in tenths of the width a second (0 is a still), another scene comes every `cut` seconds.
    With `spec.realtime` it is a camera, else a file."""

    def __init__(self, address: Address, spec: ReaderSpec, source_id: str, clock: Clock) -> None:
        self.tally = Tally()
        self._address, self._spec, self._clock = address, spec, clock
        self._stop = threading.Event()
        self._picker = Picker(spec, source_id, True, self.tally, clock, self._stop)
        self._fps = address.number("fps", 10)
        self._scene: tuple[int, NDArray[np.uint8]] | None = None

    def open(self) -> SourceInfo:
        if self._stop.is_set():
            raise SourceError("ended", f"{self._address.shown} was interrupted")
        width, height = int(self._address.number("width", 640)), int(self._address.number("height", 480))
        return SourceInfo(self._address.shown, self._spec.realtime, True, "test", width, height, self._fps)

    def __iter__(self) -> Iterator[Frame]:
        total = round(self._address.number("seconds", 0) * self._fps) or None
        index = 0
        while not self._stop.is_set() and index != total:
            self.tally.last_packet = self._clock.monotonic()
            yield from self._picker.offer(self._picture(index))
            index += 1
        if not self._stop.is_set():
            yield from self._picker.finish()

    def interrupt(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()

    def _picture(self, index: int) -> Picture:
        shape = int(self._address.number("height", 480)), int(self._address.number("width", 640))
        develop, draw = (lambda: self._develop(index)), lambda width: narrowed(self.draw(index), width)
        return Picture(develop, index / self._fps, 1 / self._fps, shape, draw)

    def _develop(self, index: int) -> NDArray[np.uint8]:
        image = self.draw(index)
        return image if self._spec.size is None else resize(image[None], self._spec.size)[0]

    def draw(self, index: int) -> NDArray[np.uint8]:
        """Picture `index`, uint8 [height, width, 3]."""
        time, cut = index / self._fps, self._address.number("cut", 0)
        seed = int(self._address.number("seed", 0))
        scene = int(time / cut) if cut else 0
        kept = self._scene  # for any thread: another one may replace it
        if kept is None or kept[0] != scene:
            self._scene = kept = scene, self._ground(np.random.default_rng((seed, scene)))
        image: NDArray[np.uint8] = kept[1].copy()
        self._things(image, np.random.default_rng((seed, scene, 1)), time)
        noise = self._address.number("noise", 0)
        if noise:
            grain = np.random.default_rng((seed, index, 2)).normal(0, noise, image.shape)
            np.clip(image + grain, 0, 255, out=image, casting="unsafe")
        return image

    def _ground(self, draw: np.random.Generator) -> NDArray[np.uint8]:
        width, height = int(self._address.number("width", 640)), int(self._address.number("height", 480))
        coarse = draw.integers(60, 180, (6, 8, 3), np.uint8)
        rows = np.arange(height) * 6 // height
        ground: NDArray[np.uint8] = coarse[rows][:, np.arange(width) * 8 // width]
        return ground

    def _things(self, image: NDArray[np.uint8], draw: np.random.Generator, time: float) -> None:
        height, width = image.shape[:2]
        speed = self._address.number("motion", 1) / 10
        for colour in COLOURS:
            x, y, slant = draw.random(3)
            side = max(2, height // 8)
            left = int((x + speed * time) % 1 * width)
            top = int((y + speed * (slant - 0.5) * time) % 1 * max(1, height - side))
            columns = np.arange(left, left + side) % width  # what leaves on one side comes in on the other
            image[top : top + side, columns] = colour
