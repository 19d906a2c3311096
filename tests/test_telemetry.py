"""Nothing is said to anyone: no name is looked up, no address connected to, no file left in the user's folders."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dycoke_edge.ort import SWITCH, TELEMETRY_OFF
from tests.commands import ROOT
from tests.cuda_on_cpu.compiled import require_compiler

FOLDERS = ("benchmarks", "calibration", "dycoke_edge", "examples", "export", "runtime", "tests")
ONE_PLACE = ROOT / "dycoke_edge" / "ort.py"


@pytest.fixture(scope="session")
def notes_lookups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lookups.cpp, to be loaded before everything else of a process."""
    require_compiler()
    library = tmp_path_factory.mktemp("lookups") / "lookups.so"
    source = Path(__file__).with_name("lookups.cpp")
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


Watched = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def watched(notes_lookups: Path, tmp_path: Path) -> Watched:
    """Runs Python with a home of its own; gives what it looked up or connected to, and the files it left at home."""
    home, noted = tmp_path / "home", tmp_path / "lookups"
    home.mkdir()
    noted.touch()
    env = {name: value for name, value in os.environ.items() if name != SWITCH and not name.startswith("XDG_")}
    env |= {"HOME": str(home), "LD_PRELOAD": str(notes_lookups), "LOOKUPS": str(noted), "PYTHONPATH": str(ROOT)}

    def run(*arguments: str | Path) -> tuple[list[str], list[str]]:
        done = subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        left = [str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()]
        return noted.read_text().splitlines(), left

    return run


def test_what_is_looked_up_or_left_is_seen(watched: Watched) -> None:
    """The watch itself: a name, an address and a file."""
    looked, left = watched(
        "-c",
        "import socket, pathlib\n"
        "for call in (lambda: socket.getaddrinfo('name.invalid', 80),\n"
        "             lambda: socket.create_connection(('192.0.2.1', 80)),\n"
        "             lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.2', 80))):\n"
        "    try: call()\n"
        "    except OSError: pass\n"
        "(pathlib.Path.home() / 'file').touch()",
    )
    assert looked[0] == "name.invalid" and {"192.0.2.1", "192.0.2.2"} <= set(looked)
    assert left == ["file"]


ANSWER = ("-m", "dycoke_edge", "run", "BUNDLE", "--prompt", "?", "--max-new-tokens", "2", "--kv-capacity", "256")
COMMANDS = {
    "import": ("-c", "from dycoke_edge.ort import onnxruntime"),
    "runtime": ("-c", "import dycoke_edge.runtime.engine, dycoke_edge.runtime.ort_cuda, time; time.sleep(1)"),
    "benchmarks": ("-c", "import benchmarks.ort_profile, benchmarks.vision_gpu"),
    "doctor": ("-m", "dycoke_edge", "doctor"),
    "run": ANSWER,
    "watch": ("-m", "dycoke_edge", "watch", "BUNDLE", "examples/clip.mp4", "--ask", "?", "--max-new-tokens", "2"),
    "export": ("-m", "dycoke_edge", "export", "CHECKPOINT", "NEW", "--merge-ratio", "0"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_looked_up_or_left(
    name: str, watched: Watched, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    places = {"BUNDLE": tiny_bundle, "CHECKPOINT": tiny_checkpoint, "NEW": tmp_path / "new"}
    assert watched(*(places.get(word, word) for word in COMMANDS[name])) == ([], [])


SERVE = """
import os, signal, sys, threading, time, urllib.request
from dycoke_edge.cli import main

def ask():
    for second in range(60):
        try: urllib.request.urlopen("http://127.0.0.1:" + sys.argv[2] + "/v1/health/live").read()
        except OSError: time.sleep(1)
        else: break
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=ask).start()
try: main(["serve", sys.argv[1], "--config", sys.argv[3]])
except SystemExit: pass
"""


def test_a_server_is_as_quiet(watched: Watched, tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tmp_path / "cameras.yaml"
    config.write_text(f"cameras: {{yard: {{source: 'test://?fps=2'}}}}\nserver: {{port: {port}}}\n")
    assert watched("-c", SERVE, tiny_bundle, port, config) == ([], [])


def test_an_application_that_was_sooner_is_told(watched: Watched) -> None:
    code = "import sys, types\nmade = sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
    code += "made.InferenceSession = object\ncalls = []\nmade.disable_telemetry_events = lambda: calls.append(1)\n"
    code += "from dycoke_edge.ort import TELEMETRY_OFF\nassert not TELEMETRY_OFF and calls == [1]"
    assert watched("-c", code) == ([], [])
    assert TELEMETRY_OFF and os.environ[SWITCH] == "1"  # in this process


def _imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")):
            found += [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return [name for name in found if name.split(".")[0] == "onnxruntime"]


def test_everybody_takes_onnxruntime_from_one_place() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in sources if _imported(path)] == [ONE_PLACE]
