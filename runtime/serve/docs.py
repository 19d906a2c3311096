"""GET /docs: the interface, read out of its OpenAPI schema. No script, nothing from elsewhere: it is there offline."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/"
STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #5d6672; --link: #2358b8; --ground: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --line: #333a44; --soft: #9aa4b1; --link: #79a8ff; --ground: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.2rem 4rem;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font: 600 1rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
code, pre { font: .9em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  white-space: pre-wrap; }
b { display: inline-block; min-width: 4.2em; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .4rem 0; }
td { border-top: 1px solid var(--line); padding: .35rem .9rem .35rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
@media (max-width: 40rem) { tr { display: block; border-top: 1px solid var(--line); padding: .3rem 0; }
  td { display: block; border: 0; padding: 0; } }
"""
EXAMPLE = """curl http://HOST:PORT/v1/chat/completions -H 'Content-Type: application/json' \\
  -H 'Authorization: Bearer KEY' -d '{"model": "MODEL", "messages": [{"role": "user", "content": [
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}},
    {"type": "text", "text": "What happens?"}]}]}'"""


def router(schema: Callable[[], Schema]) -> APIRouter:
    """The route; `schema` gives the application's OpenAPI schema."""
    routes = APIRouter()
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; "
    headers = {"Content-Security-Policy": policy + "frame-ancestors 'none'"}

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page(schema()), media_type="text/html", headers=headers)

    return routes


def page(schema: Schema) -> str:
    """The whole page."""
    title, schemas = escape(schema["info"]["title"]), schema.get("components", {}).get("schemas", {})
    bodies = {name: found for name, found in schemas.items() if "properties" in found and "Error" not in name}
    return "".join(
        (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: HTTP interface</title>',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
            f'<h1>{title} {escape(schema["info"]["version"])}</h1><p class="soft">The HTTP interface. ',
            'The same for programs: <a href="/openapi.json">/openapi.json</a>. ',
            'What the cameras show: <a href="/">the page</a>.</p>',
            f"<pre>{escape(EXAMPLE)}</pre>",
            "<p>The key is needed where the server has one. <code>GET /v1/models</code> names the model. ",
            "A key of a body that is null is as if left out; an unknown one is a 400.</p>",
            "<h2>Requests</h2>",
            *(part for path, methods in schema["paths"].items() for part in _requests(path, methods)),
            "<h2>What they hold</h2>",
            *(part for name, found in bodies.items() for part in _body(name, found)),
            "</body></html>",
        )
    )


def _requests(path: str, methods: Schema) -> Iterator[str]:
    for method, about in methods.items():
        yield f"<h3><b>{escape(method.upper())}</b>{escape(path)}</h3>"
        yield f"<p>{_plain(about.get('description', about.get('summary', '')))}</p>"
        body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        if body is not None:
            yield f'<p class="soft">Body: {_kind(body)}</p>'
        yield from _table(
            (one["name"], one["schema"], one.get("required", False), one.get("description", f"in the {one['in']}"))
            for one in about.get("parameters", [])
        )


def _body(name: str, schema: Schema) -> Iterator[str]:
    yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_plain(schema.get("description", ""))}</p>'
    needed = schema.get("required", [])
    yield from _table((key, one, key in needed, _note(one)) for key, one in schema["properties"].items())


def _table(rows: Iterable[tuple[str, Schema, bool, str]]) -> Iterator[str]:
    lines = [_row(*row) for row in rows]
    if lines:
        yield f'<div class="table"><table>{"".join(lines)}</table></div>'


def _row(name: str, schema: Schema, needed: bool, note: str) -> str:
    usual = schema.get("default")
    more = ["needed"] if needed else [f"default {json.dumps(usual)}"] if isinstance(usual, str | int | float) else []
    told = "; ".join(part for part in (_plain(note), *map(escape, more)) if part)
    return f'<tr><td><code>{escape(name)}</code></td><td>{_kind(schema)}</td><td class="soft">{told}</td></tr>'


def _note(schema: Schema) -> str:
    """A description, also of one form of several."""
    found = [schema, *schema.get("anyOf", [])]
    return next((str(one["description"]) for one in found if "description" in one), "")


def _kind(schema: Schema) -> str:
    """The type of a value, with its range; null goes without saying."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(REFERENCE))
        return f'<a href="#{name}">{name}</a>'
    forms = [one for one in schema.get("anyOf") or schema.get("oneOf") or [] if one.get("type") != "null"]
    if forms:
        return " or ".join(_kind(one) for one in forms)
    if "const" in schema or "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(one))}</code>" for one in schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}{_range(schema)}"
    return escape(str(schema.get("type", "anything"))) + _range(schema)


def _range(schema: Schema) -> str:
    names = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
        "minItems": "at least",
        "maxItems": "at most",
        "maxLength": "letters, at most",
    }
    found = [f"{word} {schema[key]:g}" for key, word in names.items() if key in schema]
    return f" ({', '.join(found)})" if found else ""


def _plain(text: str) -> str:
    """A docstring as one line, `names` as code."""
    parts = escape(" ".join(text.split())).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
