"""README's commands and code run as they stand, on the tiny model."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from dycoke_edge import cli_demo
from dycoke_edge.cli import main

README = Path("README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("dycoke-edge ")
]


@pytest.fixture
def places(
    tiny_bundle: Path,
    shipped_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """What the names in README stand for, and what is typed there."""
    monkeypatch.setattr(cli_demo, "SHIPPED", shipped_bundle)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n/quit\n"))
    for name in ("DYCOKE_USER", "DYCOKE_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    cameras = tmp_path / "cameras.yaml"
    cameras.write_text(blocks("yaml")[0])
    Image.new("RGB", (64, 48), "green").save(tmp_path / "frame.jpg")
    return {
        "MODEL_DIR": str(tiny_checkpoint),
        "BUNDLE": str(tiny_bundle),
        "clip.mp4": "examples/clip.mp4",
        "frame.jpg": str(tmp_path / "frame.jpg"),
        "events.jsonl": str(tmp_path / "events.jsonl"),
        "kept.png": str(tmp_path / "kept.png"),
        "cameras.yaml": str(cameras),
        "bench.json": str(tmp_path / "bench.json"),
        "bench.csv": str(tmp_path / "bench.csv"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [places.get(word, word) for word in shlex.split(command, comments=True)[1:]]
    if words[0] == "export":
        words[2] = str(tmp_path / "new")
    if words[0] in ("run", "ask", "watch", "chat"):
        words += ["--max-new-tokens", "4"]
    if words[0] == "bench":
        words += ["--new-tokens", "4", "--rounds", "1", "--warmup", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(command)[1] for command in COMMANDS}
    assert shown == {
        "demo",
        "export",
        "run",
        "chat",
        "inspect",
        "verify",
        "doctor",
        "watch",
        "ask",
        "probe",
        "serve",
        "bench",
        "build",
    }


def test_the_python_of_the_readme_runs(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("python"))
    for name, place in places.items():
        code = code.replace(f'"{name}"', repr(place))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
