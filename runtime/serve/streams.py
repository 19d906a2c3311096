"""/v1/live-stream: the cameras, what they show and say, and adding and removing them."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from dycoke_edge.config_camera import Camera
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.events import rfc3339
from dycoke_edge.runtime.place import place
from dycoke_edge.runtime.serve.bodies import route_class
from dycoke_edge.runtime.serve.errors import ApiError, Json
from dycoke_edge.runtime.serve.hosts import AllowedHosts
from dycoke_edge.runtime.serve.messages import Finite, Strict
from dycoke_edge.runtime.serve.service import Service
from dycoke_edge.runtime.serve.thumbnails import jpeg

SCHEMES = {"rtsp": 554, "rtsps": 322}
FREE_TEXT = 2000  # letters
WIDTH = 1280  # of a snapshot, at most


class NewStream(Strict):
    """JPS' and VSS' names, and what a camera of the configuration may say."""

    liveStreamUrl: Annotated[str, Field(max_length=2000, description="rtsp:// or rtsps:// with an allowed host")]
    description: Annotated[str, Field(max_length=FREE_TEXT)] = ""
    id: Annotated[str, Field(max_length=64)] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=FREE_TEXT)] | None = None
    fps: Annotated[Finite, Field(gt=0)] | None = None
    window_s: Annotated[Finite, Field(gt=0)] | None = None
    every_s: Annotated[Finite, Field(gt=0)] | None = None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/live-stream", route_class=route_class(service))
    adding = dict[str, Camera]()  # that the watcher may not know yet
    allowed = AllowedHosts("stream_hosts", service.spec.stream_hosts)

    @routes.get("")
    async def cameras() -> Response:
        """Every camera: its state, its last answer, its alerts, what compression saved."""
        status = await service.apart(service.watcher.status)
        return Json([_shown(service, name, found) for name, found in status["cameras"].items()])

    @routes.post("", status_code=201)
    async def add(new: NewStream) -> Response:
        """Watch one more camera."""
        url = await service.apart(_checked, new.liveStreamUrl, allowed)
        camera = _camera(new, url, service.spec.stream_hosts)
        known = adding | service.watcher.cameras
        if camera.id in known:
            raise ApiError(409, f"id: there is a camera {camera.id}; remove it first", "id", "duplicate")
        if any(other.uri == camera.uri for other in known.values()):
            raise ApiError(409, "liveStreamUrl: watched already; GET /v1/live-stream", "liveStreamUrl", "duplicate")
        if len(known) >= service.spec.max_cameras:
            raise ApiError(409, f"{len(known)} cameras, which is server.max_cameras; remove one", code="limit")
        adding[camera.id] = camera  # nothing is awaited between looking and this
        try:
            await service.apart(service.watcher.add, camera)
        finally:
            del adding[camera.id]
        service.descriptions[camera.id] = new.description
        return Json(await _one(service, camera.id), 201, {"Location": f"/v1/live-stream/{camera.id}"})

    @routes.get("/{stream_id}")
    async def camera(stream_id: str) -> Response:
        """One camera."""
        return Json(await _one(service, stream_id))

    @routes.delete("/{stream_id}")
    async def remove(stream_id: str) -> Response:
        """Watch a camera no more; its open alerts end."""
        _known(service, stream_id)
        await service.apart(service.watcher.remove, stream_id)
        service.descriptions.pop(stream_id, None)
        return Json({"id": stream_id, "deleted": True})

    @routes.get("/{stream_id}/snapshot.jpg", response_class=Response)
    async def snapshot(stream_id: str) -> Response:
        """The camera's latest picture in its own shape, where `server.snapshots` allows it."""
        service.check_shows_frames()
        _known(service, stream_id)
        image = await service.apart(service.watcher.picture, stream_id, WIDTH)
        if image is None:
            raise ApiError(404, "no frame of this camera yet; ask again", "stream_id", "no_frame")
        return Response(await service.apart(jpeg, image), media_type="image/jpeg")

    return routes


def _checked(url: str, allowed: AllowedHosts) -> str:
    """The URL, put together anew from what was checked. Refuses, with 400 or 403, all but rtsp(s) to an allowed
    host."""
    try:
        parts = place(url, SCHEMES)
    except ValueError:
        parts = None
    if parts is None or not parts.host or " " in url:
        raise ApiError(400, "liveStreamUrl: give rtsp://host/path or rtsps://host/path", "liveStreamUrl")
    try:
        allowed.addresses(parts.host, parts.port)
    except UsageError as error:
        raise ApiError(403, f"liveStreamUrl: {error}", "liveStreamUrl", "host_not_allowed") from None
    return str(parts)


def _camera(new: NewStream, url: str, hosts: tuple[str, ...]) -> Camera:
    given = {"prompt": new.prompt, "fps": new.fps, "window_s": new.window_s, "every_s": new.every_s}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return Camera(new.id or str(uuid.uuid4()), url, hosts=hosts, **options)


def _known(service: Service, stream_id: str) -> None:
    if stream_id not in service.watcher.cameras:
        raise ApiError(404, "no such camera; GET /v1/live-stream lists them", "stream_id", "not_found")


async def _one(service: Service, stream_id: str) -> dict[str, Any]:
    status = await service.apart(service.watcher.status)
    found = status["cameras"].get(stream_id)
    if found is None:
        _known(service, stream_id)
        raise ApiError(503, "the camera is being added; ask again", "stream_id", "starting", retry_after=1.0)
    return _shown(service, stream_id, found)


def _shown(service: Service, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A camera's status in this interface's words; times as RFC 3339."""
    times = {key: rfc3339(found.get(key)) for key in ("since", "last_frame_time", "text_time")}
    url = {"id": name, "liveStreamUrl": found.get("uri", ""), "description": service.descriptions.get(name, "")}
    alerts = {rule: state | {"since": rfc3339(state["since"])} for rule, state in found.get("alerts", {}).items()}
    return url | {key: value for key, value in found.items() if key != "uri"} | times | {"alerts": alerts}
