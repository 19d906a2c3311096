"""Small pictures of alerts: what the model saw when they began."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict

import anyio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge.runtime.camera.events import Event
from dycoke_edge.runtime.camera.redact import redact
from dycoke_edge.runtime.camera.watcher import CameraWatcher
from dycoke_edge.runtime.serve.service import Service

LOGGER = logging.getLogger("dycoke_edge.serve")
KEPT = 200
WIDTH = 320
LOOK_S = 0.2  # between two looks at the ring of events


class Thumbnails:
    """JPEGs of the latest alerts, by alert id; none where the server shows no frames."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, alert_id: str) -> bytes | None:
        """None for an alert that is unknown, too long ago, or began before this server."""
        return self._kept.get(alert_id)

    async def follow(self) -> None:
        """Take a picture of every alert that begins, until the server stops."""
        service, last = self._service, ""
        while service.spec.shows_frames and not service.closing.is_set():
            for event in service.watcher.events.since(last):
                last = event.id
                if event.type == "alert" and event.phase == "new" and event.alert_id is not None:
                    await self._take(event.alert_id, event)
            with anyio.move_on_after(LOOK_S):
                await service.closing.wait()

    async def _take(self, alert_id: str, event: Event) -> None:
        try:
            taken = await self._service.apart(picture, self._service.watcher, event.camera)
        except Exception as error:  # the camera may be gone; the next alert has its picture all the same
            LOGGER.warning("no picture of alert %s: %s", alert_id, redact(str(error)))
            return
        if taken is not None:
            self._kept[alert_id] = taken
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def picture(watcher: CameraWatcher, camera: str) -> bytes | None:
    """The frame that the model was given last, in the camera's own shape."""
    frame, own = watcher.snapshot(camera), watcher.picture(camera, WIDTH)
    if frame is None:
        return None
    height, width = (own if own is not None else frame.image).shape[:2]
    return jpeg(np.asarray(Image.fromarray(frame.image).resize((width, height))))


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] as JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=80)
    return file.getvalue()
