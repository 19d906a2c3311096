"""Credentials never get out: whatever they are made of, wherever they stand."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dycoke_edge.runtime.camera import redact as module
from dycoke_edge.runtime.camera.failure import SourceError
from dycoke_edge.runtime.camera.redact import HIDDEN, hide, one_line, redact
from tests.steps import Counted, Steps, TooManyStepsError

CANARY = "c4n4ry"
PIECES = [
    "@",
    ":",
    "/",
    ".",
    "%40",
    "%",
    "?",
    "#",
    "&",
    "=",
    "//",
    "://",
    "+",
    "-",
    "_",
    "~",
    "!",
    "$",
    "'",
    '"',
    ",",
    "a",
]
# Something that is searched for, in any surroundings.
secrets = st.builds(
    lambda before, after: "".join(before) + CANARY + "".join(after),
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.lists(st.sampled_from(PIECES), max_size=6),
)
schemes = st.sampled_from(["rtsp", "rtsps", "RTSP", "http", "https", "mqtt", "mqtts", "rtmp", "ws"])
hosts = st.sampled_from(["cam", "10.0.0.7", "[fe80::1]", "cam.example.org:8554"])
frames = st.sampled_from(
    [
        *("{}", "'{}'", "401 Unauthorized: '{}'", "opening {} failed (timeout), trying again"),
        *('{{"uri": "{}", "n": 1}}', "{}\nrtsp://other/stream is fine", "rtsp://other/stream is fine, {} is not"),
    ]
)


@given(schemes, secrets, secrets, hosts, frames)
@example("rtsp", "admin", f"p@ss/{CANARY}:x", "cam", "{}")
@example("rtsp", f"john.doe.{CANARY}", "secret", "cam", "{}")
@example("rtsp", "u", f"http://{CANARY}", "cam", "{}")
def test_login_in_a_url(scheme: str, user: str, password: str, host: str, frame: str) -> None:
    text = frame.format(f"{scheme}://{user}:{password}@{host}/stream")
    assert CANARY not in redact(text)


@given(schemes, secrets, hosts, frames)
def test_user_without_password(scheme: str, user: str, host: str, frame: str) -> None:
    assert CANARY not in redact(frame.format(f"{scheme}://{user}@{host}/stream"))


@given(schemes, secrets, hosts, frames, st.sampled_from(["token={}", "user=x&password={}", "user={}&password=y", "{}"]))
def test_query(scheme: str, secret: str, host: str, frame: str, query: str) -> None:
    assert CANARY not in redact(frame.format(f"{scheme}://{host}/stream?" + query.format(secret)))


@given(schemes, secrets, secrets, hosts, frames)
def test_login_and_query(scheme: str, password: str, token: str, host: str, frame: str) -> None:
    text = frame.format(f"{scheme}://admin:{password}@{host}/stream?channel=1&token={token}")
    assert CANARY not in redact(text)


@given(
    secrets,
    st.sampled_from(["password={}", "passwd: {}", "api_key={}", "Authorization: Basic {}", "token: {}", "user-pw={}"]),
)
def test_outside_a_url(secret: str, frame: str) -> None:
    assert CANARY not in redact("mqtt failed, " + frame.format(secret))


@pytest.mark.parametrize("text", ["admin:{}@cam/stream", "open admin:{}@cam failed", "'admin:{}@cam'"])
@given(st.lists(st.sampled_from(["@", ":", ".", "%40", "/", "a"]), max_size=4).map(lambda x: CANARY + "".join(x)))
def test_login_without_a_scheme(text: str, secret: str) -> None:
    assert CANARY not in redact(text.format(secret))


@given(schemes, secrets, secrets, hosts, frames)
def test_twice_is_once(scheme: str, user: str, password: str, host: str, frame: str) -> None:
    once = redact(frame.format(f"{scheme}://{user}:{password}@{host}/stream?token={user}"))
    assert redact(once) == once


@given(st.text())
def test_any_text(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:pw@10.0.0.7:554/live", "rtsp://***@10.0.0.7:554/live"),
        ("rtsp://cam/live?channel=1&subtype=0", "rtsp://cam/live?channel=1&subtype=0"),
        ("rtsp://cam:554/live refused the connection", "rtsp://cam:554/live refused the connection"),
        ("two: rtsp://u:p@a/x and rtsp://u:p@b/y", "two: rtsp://***@a/x and rtsp://***@b/y"),
        ("test://?fps=10&seconds=5&noise=2", "test://?fps=10&seconds=5&noise=2"),
        ("/data/cam:1@2.mp4 does not exist", "/data/cam:1@2.mp4 does not exist"),
        ("file:///home/a@b/clip.mp4", "file:///home/a@b/clip.mp4"),
        ("size=0 (--size) must be 1 or more, e.g. --size 384", "size=0 (--size) must be 1 or more, e.g. --size 384"),
        ("Is the door open? Yes.", "Is the door open? Yes."),
        ("", ""),
    ],
)
def test_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        CANARY.upper(),
        f"{CANARY}@/x",
        f"{CANARY} é",
        f"{CANARY}%20y",
        f"{CANARY}\nx",
        f"{CANARY}'\\",
        f"x={CANARY}",
    ],
)
@pytest.mark.parametrize("text", ["rtsp://cam/{}/x", "file:///x/{}", "gst://{}", "no element {}", "a\n{}\nb", "{0}{0}"])
def test_a_hidden_value_is_shown_by_its_name(value: str, text: str) -> None:
    hide(value, "{DYCOKE_X}")
    for spelled in (value, quote(value), quote(value, safe=""), unquote(value), value.lower(), value.strip()):
        shown = redact(text.format(spelled))
        assert CANARY not in shown.lower() and "{DYCOKE_X}" in shown and redact(shown) == shown
    assert redact("rtsp://cam/other") == "rtsp://cam/other"


def test_short_values_are_hidden_in_their_own_text_only() -> None:
    hide("10", "{DYCOKE_N}")
    hide("rtsp://cam/10/x", "rtsp://cam/{DYCOKE_N}/x")
    assert redact("rtsp://cam/10/x: 10 s") == "rtsp://cam/{DYCOKE_N}/x: 10 s"


def test_a_value_that_is_part_of_a_name_changes_nothing_twice() -> None:
    hide("DYCOKE", "{DYCOKE_X}")
    assert redact("a DYCOKE b") == redact(redact("a DYCOKE b")) == "a {DYCOKE_X} b"


def test_every_source_error_is_redacted() -> None:
    error = SourceError("timeout", f"rtsp://u:{CANARY}@cam/x sent nothing")
    assert CANARY not in str(error) and CANARY not in repr(error) and HIDDEN in str(error)


@pytest.mark.parametrize(
    "part",
    [
        "pw-", "a-a-", "pw_", "user-", ",a:", "a://", "pw ", "pw: ", "pw=", "cookie ", "user=", "?a=&", "a:@", "@ a:",
        "a ", "-", "'", "=a", "api-key_", "é-", "x://a@", "file://", "set-cookie", " ",
    ],
)  # fmt: skip
def test_work_grows_with_the_text_and_no_faster(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Each letter costs so many steps of matching, in a text of 4 or of 64 kB."""
    length = 4096
    text = (part * length)[:length]
    plain = redact(text)
    steps = Steps(most=120 * length)
    for name, value in vars(module).items():
        if isinstance(value, re.Pattern):
            monkeypatch.setattr(module, name, Counted(value, steps))
    assert redact(text) == plain
    assert steps.taken > 5 * length  # they were counted


def test_what_grows_faster_is_counted_so() -> None:
    """The counter would notice: this is what a pattern looks like that tries a word again from each of its letters."""
    steps = Steps(most=120 * 1024)
    with pytest.raises(TooManyStepsError):
        Counted(re.compile(r"[\w-]*[_-]pw="), steps).search("pw-" * 341)


@pytest.mark.parametrize("part", ["pw-", "a-a-", "pw_", "user-", ",a:", "a://"])
def test_64_kilobytes_come_back(part: str) -> None:
    assert len(redact(part * (65536 // len(part)))) > 0  # 31 s for 16 kB once


def test_one_line_of_a_stranger() -> None:
    assert one_line("/a\r\n2026 INFO forged\x1b[2J\u2028\x9b\ud800", 200) == (
        r"/a\r\n2026 INFO forged\x1b[2J\u2028\x9b\ud800"
    )
    assert one_line("Tür \u202e", 200) == r"Tür \u202e"
    assert one_line("x" * 500, 200) == "x" * 200
    assert CANARY not in one_line(f"rtsp://u:{CANARY}" + "x" * 500 + "@cam/", 200)
    assert CANARY not in one_line(f"as u:{CANARY}" + "x" * 500 + "@cam/", 200)


@given(st.text(max_size=300), st.integers(1, 50))
def test_one_line_of_anything(text: str, most: int) -> None:
    line = one_line(text, most)
    assert len(line) <= most and line.isprintable()
