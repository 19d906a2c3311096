"""GET /: one plain page for people. It asks the interface that everybody has, and is trusted with nothing more."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response


def router() -> APIRouter:
    """The route."""
    routes = APIRouter()
    html = files("dycoke_edge.runtime.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy(html)}

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    @routes.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    return routes


def policy(html: str) -> str:
    """What a browser lets the page do: run its own script and style, ask this server, show pictures it was given."""
    script, style = (_hash(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(contents: list[str]) -> str:
    (content,) = contents
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
