"""GET /docs: every request and key is on it, and nothing from elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.runtime.serve.docs import page
from tests.browser import CHROMIUM, browsing
from tests.serving import Served, serving


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=512), api_key="0123456789abcdef") as server:
        yield server


def test_it_says_all_that_the_schema_says(served: Served) -> None:
    """Without the key, as the page: a browser cannot send one, and nothing of the server is on it."""
    shown = served.http.get("/docs")
    assert shown.status_code == 200 and shown.headers["content-type"].startswith("text/html")
    key = {"Authorization": "Bearer 0123456789abcdef"}
    schema = served.http.get("/openapi.json", headers=key).json()
    assert all(f"</b>{path}</h3>" in shown.text for path in schema["paths"])
    bodies = {name: body for name, body in schema["components"]["schemas"].items() if "Error" not in name}
    assert {"ChatRequest", "AlertRule", "NewStream"} <= set(bodies)
    for name, body in bodies.items():
        assert f'id="{name}"' in shown.text
        assert all(f"<code>{key}</code>" in shown.text for key in body.get("properties", {}))
    links = re.findall(r'(?:href|src)="([^"]*)"', shown.text)
    assert links and all(link.startswith(("#", "/")) for link in links) and "<script" not in shown.text
    targets = set(re.findall(r'id="([^"]*)"', shown.text))
    assert {link[1:] for link in links if link.startswith("#")} <= targets


def test_texts_are_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    body = {"title": evil, "description": evil, "properties": {evil: {"type": evil, "default": evil}}}
    schema = {
        "info": {"title": evil, "version": evil},
        "paths": {evil: {evil: {"description": evil, "parameters": [{"name": evil, "in": evil, "schema": {}}]}}},
        "components": {"schemas": {evil: body}},
    }
    assert "<script" not in page(schema) and page(schema).count("&lt;script&gt;") > 8


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: make services")
def test_a_browser_shows_it_on_a_desk_and_on_a_phone(served: Served, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        for width in (1280, 400):
            page.view(width, 800)
            page.open(f"{served.url}/docs")
            while not page.run("document.readyState === 'complete' && !!document.querySelector('#ChatRequest')"):
                time.sleep(0.05)
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            assert page.run("getComputedStyle(document.querySelector('h3')).fontWeight") == "600", "its style holds"
        assert page.complaints == []
