"""Commands and code of README, docs and examples run as they stand, on the tiny model, after the set-up before them."""

from __future__ import annotations

import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from dycoke_edge import cli_demo
from dycoke_edge.cli import main
from tests.commands import ROOT

README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
NOT_RUN = ("pip install ",)  # tests/test_packaging.py installs


def blocks(doc: Path, language: str) -> list[str]:
    """Fenced code blocks of a language: what runs stands in `sh`, what needs a GPU or a network in `text`."""
    return re.findall(rf"^```{language}\n(.*?)^```", doc.read_text(), re.MULTILINE | re.DOTALL)


def lines(doc: Path) -> list[str]:
    """The commands of a document's `sh` blocks."""
    joined = (line for block in blocks(doc, "sh") for line in block.replace("\\\n", " ").splitlines())
    return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


RUN = [(doc, line) for doc in DOCS for line in lines(doc) if not line.startswith(NOT_RUN)]
COMMANDS = {f"{doc.relative_to(ROOT)}: {line}": (doc, line) for doc, line in RUN}


@pytest.fixture
def places(
    tiny_bundle: Path,
    shipped_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """What the names in the documents stand for, and what is typed there."""
    monkeypatch.setattr(cli_demo, "SHIPPED", shipped_bundle)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n/quit\n"))
    for name in ("DYCOKE_USER", "DYCOKE_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    cameras = tmp_path / "cameras.yaml"
    cameras.write_text(blocks(README, "yaml")[0])
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


@pytest.mark.parametrize("title", COMMANDS)
def test_a_command_of_the_documents_runs(
    title: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    doc, command = COMMANDS[title]
    program, *words = [places.get(word, word) for word in shlex.split(command, comments=True)]
    assert program == "dycoke-edge", "what no test runs stands in a ```text block"
    if doc != README and (own := blocks(doc, "yaml")):
        Path(places["cameras.yaml"]).write_text(own[0])
    if words[0] == "export":
        words[2] = str(tmp_path / "new")
    if words[0] in ("run", "ask", "watch", "chat"):
        words += ["--max-new-tokens", "4"]
    if words[0] == "bench":
        words += ["--new-tokens", "4", "--rounds", "1", "--warmup", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(command)[1] for doc, command in COMMANDS.values() if doc == README}
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


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_the_python_of_a_document_runs(doc: Path, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks(doc, "python"))
    for name, place in places.items():
        code = code.replace(f'"{name}"', repr(place))
    exec(compile(code, doc.name, "exec"), {})
    assert not code or capsys.readouterr().out.strip()


# After `make demo` alone: its packages, its bundle, and no others


def installed_by_demo() -> set[str]:
    """Names of the packages of dycoke-edge[export] and of what they ask for."""
    found = set[str]()
    todo: list[tuple[str, tuple[str, ...]]] = [("dycoke-edge", ("export",))]
    while todo:
        name, extras = todo.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found:
            continue
        found.add(name)
        try:
            asked = [Requirement(each) for each in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for each in asked:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                todo.append((each.name, tuple(each.extras)))
    return found


def absent_after_demo() -> set[str]:
    """Modules that only other extras install."""
    there = installed_by_demo()
    owners = importlib.metadata.packages_distributions()
    own = {"dycoke_edge", "setuptools", "pkg_resources", "_distutils_hack", "pip"}
    return {
        module
        for module, packages in owners.items()
        if module not in own and not there & {re.sub(r"[-_.]+", "-", name).lower() for name in packages}
    }


WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
sys.argv[:] = sys.argv[2:]
sys.path.insert(0, "")
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def demo(shipped_bundle: Path, tmp_path: Path) -> Path:
    """A checkout as `make demo` leaves it."""
    for tracked in ("benchmarks", "dycoke_edge", "examples", "export"):
        (tmp_path / tracked).symlink_to(ROOT / tracked)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "tiny-bundle").symlink_to(shipped_bundle)
    return tmp_path


def after_demo(demo: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python -m` prints there."""
    command = [sys.executable, "-c", WITHOUT, ",".join(absent_after_demo()), module, *arguments]
    done = subprocess.run(command, cwd=demo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_demo_has_its_packages_and_no_others() -> None:
    assert {"matplotlib", "fastapi", "pytest"} <= absent_after_demo()
    assert not absent_after_demo() & {"torch", "transformers", "yaml", "onnxruntime", "numpy", "av"}


@pytest.mark.slow
def test_examples_run_after_demo(demo: Path) -> None:
    assert re.search("asked: '[a-z ]+'", after_demo(demo, "examples.camera_app").stdout)
    assert "two" in after_demo(demo, "examples.demo").stdout
    after_demo(demo, "examples.make_scene", "build/scene.mp4")
    after_demo(demo, "examples.make_clip", "build/clip.mp4")


@pytest.mark.slow
def test_accuracy_runs_after_demo_and_leaves_the_tracked_results(demo: Path) -> None:
    few = ("--questions", "1", "--methods", "no compression", "--workers", "1", "--kinds", "count")
    done = after_demo(demo, "benchmarks.accuracy", *few)
    assert "pip install matplotlib" in done.stderr
    left = sorted(file.name for file in (demo / "build/accuracy/results").iterdir())
    assert left == ["accuracy.json", "accuracy.md"]
    status = ["git", "status", "--porcelain", "--", "benchmarks/results"]
    assert subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout == ""


def test_every_example_is_run() -> None:
    names = {file.stem for file in (ROOT / "examples").glob("*.py")}
    assert names == {"camera_app", "demo", "make_scene", "make_clip"}
