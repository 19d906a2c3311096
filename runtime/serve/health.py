"""/v1/health/live, /v1/health/ready and /metrics."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response

from dycoke_edge.errors import ReplacedError
from dycoke_edge.runtime.camera.redact import redact
from dycoke_edge.runtime.serve.errors import Json, body
from dycoke_edge.runtime.serve.metrics import WatcherMetrics
from dycoke_edge.runtime.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(WatcherMetrics(service.watcher.status))

    @routes.get("/v1/health/live")
    async def live() -> Response:
        """200 while the process lives."""
        return Json({"status": "live"})

    @routes.get("/v1/health/ready")
    async def ready(request: Request) -> Response:
        """200 while answers can be expected, else 503 with reasons."""
        with suppress(ReplacedError):  # the status says so
            await service.apart(service.watcher.check_bundle)
        status = await service.apart(service.watcher.status)
        if status["ready"] and not service.closing.is_set():
            return Json({"status": "ready", "reasons": []})
        reasons = [redact(str(reason)) for reason in status["reasons"]] or ["the server is stopping"]
        shown = reasons if request.scope["state"].get("authorized") else []
        return Json(body(503, "; ".join(["not ready", *shown]), code="not_ready") | {"reasons": shown}, 503)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(await service.apart(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)

    return routes
