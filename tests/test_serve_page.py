"""The page, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.runtime.camera.events import Event
from tests.browser import CHROMIUM, Page, browsing
from tests.serving import Served, serving, wait_for

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium here: make services"
)
KEY = "0123456789abcdef"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
WINDOW: dict[str, Any] = {"fps": 5.0, "window_s": 2.0, "every_s": 1.0}
CAMERAS = [
    Camera(
        "yard",
        "test://?fps=10&motion=3&width=1600&height=900",
        realtime=True,
        prompt="What?",
        max_new_tokens=12,
        **WINDOW,
    ),
    Camera("gate", "test://?fps=10&motion=0&noise=3&seed=4", realtime=True, **WINDOW),
    Camera("dead", "rtsp://user:hunter2@127.0.0.1:9/live", **WINDOW),
]
RULES = [
    Rule("person", "Is a person in view?", threshold=0.0, min_mass=0, consecutive=1, cameras=("yard",)),
    Rule("parcel", "Is a parcel at the gate?", threshold=1.0, clear_threshold=1.0, cameras=("gate", "yard")),
]


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=2048), CAMERAS, RULES) as server:
        wait_for(lambda: server.watcher.status()["cameras"]["yard"]["text"])
        yield server


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path / "profile") as page:
        page.view(1400, 900)
        yield page


def text(page: Page, selector: str) -> str:
    found = page.run(f"(document.querySelector({selector!r}) || {{}}).innerText || ''")
    assert isinstance(found, str)
    return found


def shown(page: Page, selector: str, part: str) -> None:
    wait_for(lambda: part in text(page, selector))


def test_the_page_shows_what_happens(served: Served, page: Page, tmp_path: Path) -> None:
    page.open(served.url)
    yard, gate, dead = (f"[data-camera={name}]" for name in ("yard", "gate", "dead"))
    shown(page, f"{yard} .state", "online")
    shown(page, f"{yard} [data-role=tokens]", "% saved")
    shown(page, f"{yard} [data-rule=person]", "ALERT")
    shown(page, f"{gate} [data-rule=parcel]", "yes")
    shown(page, dead, "rtsp://***@127.0.0.1:9/live")
    shown(page, "#ready", "ready")
    shown(page, "#saved", "visual tokens kept")
    wait_for(lambda: page.run(f"document.querySelector('{yard} img').naturalWidth") == 1280)
    assert page.run(f"document.querySelector('{yard} img').naturalHeight") == 720
    first = page.run(f"document.querySelector('{yard} img').src")
    wait_for(lambda: page.run(f"document.querySelector('{yard} img').src") not in (first, ""))
    wait_for(lambda: page.run("document.querySelectorAll('#log li').length") > 2)
    answer = served.watcher.status()["cameras"]["yard"]["text"]
    assert answer and text(page, f"{yard} [data-role=answer]")
    assert page.run(f"document.querySelector('{yard}').classList.contains('alarm')")
    assert not page.run(f"document.querySelector('{gate}').classList.contains('alarm')")
    assert "hunter2" not in page.run("document.documentElement.innerHTML")
    assert text(page, dead).count("127.0.0.1:9/live") == 1, "no address twice"
    page.shoot(tmp_path / "light.png")
    page.view(1400, 900, "dark")
    page.shoot(tmp_path / "dark.png")
    page.view(400, 900)
    assert page.run("document.documentElement.scrollWidth <= 400")
    page.shoot(tmp_path / "narrow.png")
    assert page.complaints == []


def test_alerts_come_first_each_with_its_picture(served: Served, page: Page) -> None:
    page.open(served.url)
    shown(page, "#alerts li", "person")
    wait_for(lambda: page.run("document.querySelector('#alerts img').naturalWidth") == 320)
    assert page.run("document.querySelector('#alerts img').naturalHeight") == 180, "in the camera's shape"
    (item,) = page.run("[...document.querySelectorAll('#alerts li')].map((item) => item.innerText)")
    assert "yard" in item and "since" in item, "one line an alert, however often it is updated"
    wait_for(lambda: page.run("document.querySelectorAll('#log li').length") > 0)
    for width in (1280, 400):
        page.view(width, 900)
        boxes = "['#alerts', '#log'].map((id) => document.querySelector(id).getBoundingClientRect().top)"
        alerts, log = page.run(boxes)
        assert alerts < log
    card = "[...document.querySelector('[data-camera=yard] .inside').children].map((part) => part.className)"
    parts = page.run(card)
    assert parts.index("rules") < parts.index("said")


def test_filters_by_camera_and_kind(served: Served, page: Page) -> None:
    page.open(served.url)
    shown(page, "#alerts li", "person")
    wait_for(lambda: page.run("following && document.querySelectorAll('#log li').length") > 0)
    hub = served.watcher._hub
    hub.emit("error", "new", "gate", reason="out of memory")
    shown(page, "#log ol", "out of memory")

    def choose(camera: str, kind: str) -> dict[str, list[str]]:
        for box, value in (("which", camera), ("kind", kind)):
            page.run(
                f"(() => {{ const box = document.getElementById('{box}'); box.value = '{value}';"
                "box.dispatchEvent(new Event('change', { bubbles: true })); })()"
            )
        visible = "[...document.querySelectorAll('%s')].filter((one) => one.checkVisibility()).map((one) => one.%s)"
        return {
            "cards": page.run(visible % ("#cameras > *", "dataset.camera")),
            "alerts": page.run(visible % ("#alerts li", "dataset.of")),
            "log": sorted(set(page.run(visible % ("#log li", "dataset.of + ' ' + one.dataset.kind")))),
        }

    everything = choose("", "")
    assert everything["cards"] == ["yard", "gate", "dead"] and everything["alerts"] == ["yard"]
    assert {"yard description", "gate error"} <= set(everything["log"])
    assert choose("gate", "") == {"cards": ["gate"], "alerts": [], "log": ["gate error"]}
    assert choose("", "alert")["log"] == [] and choose("", "alert")["alerts"] == ["yard"]
    assert choose("", "error")["alerts"] == [] and choose("", "error")["log"] == ["gate error"]
    assert choose("yard", "description") == {"cards": ["yard"], "alerts": [], "log": ["yard description"]}
    assert choose("", "") == everything


def test_a_rule_that_knows_nothing_says_so(served: Served, page: Page) -> None:
    page.open(served.url)
    wait_for(lambda: page.run("document.readyState === 'complete' && typeof rule === 'function'"))
    state = "{on: false, score: 0.9, verdict: 'unknown', reason: 'neither yes nor no'}"
    said = page.run(f"[...rule('fire', {state}).children].map((part) => part.textContent)")
    assert said == ["", "fire", "unknown · yes 90 %", "neither yes nor no"]


def test_a_question_from_the_page(served: Served, page: Page) -> None:
    page.open(served.url)
    yard = "[data-camera=yard]"
    wait_for(lambda: page.run(f"!!document.querySelector('{yard} form')"))
    page.run(
        f"document.querySelector('{yard} input').value = 'Is the gate open?';"
        f"document.querySelector('{yard} form').requestSubmit()"
    )
    wait_for(lambda: text(page, f"{yard} [data-role=reply]").strip("…"))
    assert not page.run(f"document.querySelector('{yard} [data-role=reply]').classList.contains('bad')")
    page.run(
        "document.querySelector('[data-camera=dead] input').value = 'Is it?';"
        "document.querySelector('[data-camera=dead] form').requestSubmit()"
    )
    wait_for(
        lambda: page.run("document.querySelector('[data-camera=dead] [data-role=reply]').classList.contains('bad')")
    )


def test_the_page_takes_nothing_for_markup(served: Served, page: Page) -> None:
    page.open(served.url)
    shown(page, "#ready", "ready")
    wait_for(lambda: page.run("following"))
    hub = served.watcher._hub
    served.watcher.events.add(Event("error", "new", EVIL, hub.new_id(), 0.0, reason=EVIL, text=EVIL))
    shown(page, "#log ol", "onerror")
    assert page.run("document.title") == "dycoke-edge" and page.run("document.querySelectorAll('#log img').length") == 0
    refused = "(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } })()"
    assert page.run(refused)  # even a mistake in the page could not do it
    assert page.run("fetch('https://example.org/').then(() => false, () => true)")


def test_the_page_asks_for_the_key(tiny_bundle: Path, page: Page) -> None:
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=1024), CAMERAS[1:2], api_key=KEY) as locked:
        page.open(locked.url)
        wait_for(lambda: page.run("document.readyState === 'complete' && !document.getElementById('key').hidden"))
        assert page.run("document.getElementById('all').hidden")
        page.run(
            f"document.querySelector('#key input').value = {KEY!r};document.querySelector('#key form').requestSubmit()"
        )
        shown(page, "[data-camera=gate] .state", "online")
        wait_for(lambda: page.run("document.querySelector('[data-camera=gate] img').naturalWidth") > 0)
        assert page.run("document.getElementById('key').hidden")
