"""/v1/alerts: rules, in VSS' names, and the latest alerts they raised."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.runtime.camera.events import rfc3339
from dycoke_edge.runtime.serve.bodies import route_class
from dycoke_edge.runtime.serve.errors import ApiError, Json
from dycoke_edge.runtime.serve.messages import Finite, Strict
from dycoke_edge.runtime.serve.service import Service
from dycoke_edge.runtime.serve.streams import FREE_TEXT
from dycoke_edge.runtime.serve.thumbnails import Thumbnails

RECENT = 100
SETTINGS = ("alert_type", "threshold", "clear_threshold", "min_mass", "consecutive", "cooldown_s", "severity")


class AlertRule(Strict):
    """A rule. Windows belong to cameras: `chunk_duration` and `chunk_overlap_duration` must be what the camera has."""

    stream_id: Annotated[str, Field(max_length=64, description="one camera; all of them without")] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=FREE_TEXT, description="a question for yes or no")]
    alert_type: Annotated[str, Field(min_length=1, max_length=64)] = "alert"
    system_prompt: Annotated[str, Field(max_length=FREE_TEXT, description="stands before the question")] | None = None
    chunk_duration: Finite | None = None
    chunk_overlap_duration: Finite | None = None
    threshold: Annotated[Finite, Field(ge=0, le=1)] | None = None
    clear_threshold: Annotated[Finite, Field(ge=0, le=1)] | None = None
    min_mass: Annotated[Finite, Field(ge=0, le=1)] | None = None
    consecutive: Annotated[int, Field(ge=1, le=1000)] | None = None
    cooldown_s: Annotated[Finite, Field(ge=0, le=86400)] | None = None
    severity: Literal["info", "warning", "critical"] | None = None


@dataclass(frozen=True)
class Added:
    """A rule that came over HTTP, as it came."""

    rule: AlertRule
    created: float


class Rules:
    """The watcher's rules and what was said of those that came over HTTP."""

    def __init__(self, service: Service, utc: Callable[[], float]) -> None:
        self._service, self._watcher, self._utc = service, service.watcher, utc
        self._added: dict[str, Added] = {}
        self._lock = asyncio.Lock()

    def all(self) -> list[dict[str, Any]]:
        """Every rule, those of the configuration and of single cameras too."""
        own = [(rule, name) for name, camera in self._watcher.cameras.items() for rule in camera.rules]
        shared = [(rule, None) for rule in self._watcher.rules.values()]
        return [self._shown(rule, name) for rule, name in [*shared, *own]]

    def one(self, rule_id: str) -> dict[str, Any]:
        """ApiError 404 if there is none."""
        for shown in self.all():
            if shown["id"] == rule_id:
                return shown
        raise ApiError(404, "no such rule; GET /v1/alerts lists them", "id", "not_found")

    async def add(self, new: AlertRule) -> dict[str, Any]:
        """A new rule, and when it was made."""
        async with self._lock:
            count = len(self.all())
            if count >= self._service.spec.max_rules:
                raise ApiError(409, f"{count} rules, which is server.max_rules; remove one", code="limit")
            return await self._put(str(uuid.uuid4()), new)

    async def change(self, rule_id: str, new: AlertRule) -> dict[str, Any]:
        """Replace a rule; its open alerts end. The old one stays if the new one is no good."""
        async with self._lock:
            before = self._watcher.rules[self._changeable(rule_id)]
            await self._service.apart(self._watcher.check_rule, self._rule(rule_id, new))
            await self._service.apart(self._watcher.remove_rule, rule_id)
            try:
                return await self._put(rule_id, new)
            except Exception:
                await self._service.apart(self._watcher.add_rule, before)
                raise

    async def remove(self, rule_id: str) -> None:
        """Its open alerts end."""
        async with self._lock:
            await self._service.apart(self._watcher.remove_rule, self._changeable(rule_id))
            self._added.pop(rule_id, None)

    async def _put(self, rule_id: str, new: AlertRule) -> dict[str, Any]:
        await self._service.apart(self._watcher.add_rule, self._rule(rule_id, new))
        self._added[rule_id] = added = Added(new, self._utc())
        return {"id": rule_id, "created_at": rfc3339(added.created)}

    def _changeable(self, rule_id: str) -> str:
        if rule_id not in self._watcher.rules:
            self.one(rule_id)
            raise ApiError(409, "this rule belongs to its camera; change it in the configuration", "id", "in_use")
        return rule_id

    def _rule(self, rule_id: str, new: AlertRule) -> Rule:
        camera = self._watcher.cameras.get(new.stream_id or "")
        if new.stream_id is not None and camera is None:
            raise ApiError(404, "stream_id: no such camera; GET /v1/live-stream lists them", "stream_id", "not_found")
        for one in [camera] if camera else self._watcher.cameras.values():
            _check_window(new, one)
        given = {name: getattr(new, name) for name in SETTINGS if getattr(new, name) is not None}
        prompt = f"{new.system_prompt}\n{new.prompt}" if new.system_prompt else new.prompt
        return Rule(rule_id, prompt, cameras=(camera.id,) if camera else (), **given)

    def _shown(self, rule: Rule, camera: str | None) -> dict[str, Any]:
        added = self._added.get(rule.id)
        shown = {"id": rule.id, "stream_id": camera or (rule.cameras[0] if len(rule.cameras) == 1 else None)}
        if len(rule.cameras) > 1:
            shown["stream_ids"] = list(rule.cameras)  # type: ignore[assignment]
        asked = replace(rule, prompt=added.rule.prompt) if added else rule
        names = ("prompt", *SETTINGS)
        more = {"system_prompt": added.rule.system_prompt, "created_at": rfc3339(added.created)} if added else {}
        return shown | {name: getattr(asked, name) for name in names} | more


def _check_window(new: AlertRule, camera: Camera) -> None:
    overlap = camera.window_s - camera.every_s
    for key, given, has in (
        ("chunk_duration", new.chunk_duration, camera.window_s),
        ("chunk_overlap_duration", new.chunk_overlap_duration, overlap),
    ):
        if given is not None and given != has:
            raise ApiError(400, f"{key}: camera {camera.id} has {has:g}; give that, or leave it out", key)


def router(service: Service, thumbnails: Thumbnails, utc: Callable[[], float]) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/alerts", route_class=route_class(service))
    rules = Rules(service, utc)

    @routes.get("")
    async def listed() -> Response:
        """Every rule."""
        return Json(rules.all())

    @routes.post("", status_code=201)
    async def add(new: AlertRule) -> Response:
        """Ask one more yes/no question of every window."""
        made = await rules.add(new)
        return Json(made, 201, {"Location": f"/v1/alerts/{made['id']}"})

    @routes.get("/recent")
    async def recent(
        stream_id: Annotated[str, Query(max_length=64)] | None = None,
        limit: Annotated[int, Query(ge=1, le=RECENT)] = 20,
    ) -> Response:
        """The latest alerts, newest first."""
        found = [e for e in service.watcher.events.since() if e.type == "alert" and stream_id in (None, e.camera)]
        return Json([event.to_dict() for event in found[: -limit - 1 : -1]])

    @routes.get("/recent/{alert_id}/snapshot.jpg", response_class=Response)
    async def snapshot(alert_id: str) -> Response:
        """A small picture of when an alert began, where `server.snapshots` allows it."""
        service.check_shows_frames()
        taken = thumbnails.get(alert_id)
        if taken is None:
            raise ApiError(404, "no picture of this alert; GET /v1/alerts/recent lists them", "alert_id", "not_found")
        return Response(taken, media_type="image/jpeg")

    @routes.get("/{rule_id}")
    async def one(rule_id: str) -> Response:
        """One rule."""
        return Json(rules.one(rule_id))

    @routes.put("/{rule_id}")
    async def change(rule_id: str, new: AlertRule) -> Response:
        """Replace a rule that came over HTTP; its open alerts end."""
        return Json(await rules.change(rule_id, new))

    @routes.delete("/{rule_id}")
    async def remove(rule_id: str) -> Response:
        """Ask it no more; its open alerts end."""
        await rules.remove(rule_id)
        return Json({"id": rule_id, "deleted": True})

    return routes
