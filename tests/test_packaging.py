"""What users get: the wheel, the direction of imports, what an import drags in, and the README."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge.runtime import ort_cuda
from tests.floors import floors

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("calibration", "export", "runtime")
FOLDERS = ("dycoke_edge", *SIDES)
FRAMEWORKS = {"onnx", "onnxscript", "optimum", "safetensors", "torch", "transformers"}
# A module may import those of a lower rank, and a side its own modules.
ORDER = (
    "errors",
    "ort",
    "partial",
    "config",
    "config_camera",
    "config_serve",
    "parity",
    "dycoke",
    "contract",
    "bundle",
    "template",
)
RANKS = {word: rank for rank, word in enumerate(ORDER)} | dict.fromkeys((*SIDES, "memory", "doctor"), len(ORDER))
TOP = len(ORDER) + 1  # cli*, __main__, and __init__, which hands out the public names
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file names: statements, at any depth, and import_module("...")."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def own_imports(path: Path) -> set[str]:
    """What the file names of dycoke_edge: "config", "runtime"; "" is a public name of it."""
    parts = [[*module.split("."), ""][:2] for module in imports(path)]
    ours = {second for first, second in parts if first == "dycoke_edge"} - {"__version__"}
    return {word if word in RANKS or word.startswith("cli") else "" for word in ours}


def part(path: Path) -> str:
    folder = path.relative_to(ROOT).parts[0]
    return folder if folder in SIDES else path.stem


def python(*args: str, executable: str | Path = sys.executable, **options: Any) -> str:
    """What a fresh process prints; fails with its stderr."""
    done = subprocess.run([executable, *args], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"exit {done.returncode}: {' '.join(args)}\n{done.stderr}"
    return str(done.stdout)


# The package list and the direction of imports


def test_every_folder_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for side in SIDES for path in (ROOT / side).rglob("*.py")}
    names = {"dycoke_edge." + ".".join(folder.parts) for folder in found}
    assert set(listed) == {"dycoke_edge"} | names


@pytest.mark.parametrize("side", SIDES)
def test_links_lead_to_the_folders(side: str) -> None:
    assert (ROOT / "dycoke_edge" / side).resolve() == ROOT / side


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    here = part(path)
    rank = RANKS.get(here, TOP)
    assert here in RANKS or here.startswith(("cli", "__")), f"{here} has no place in RANKS"
    for other in own_imports(path) - {here}:
        assert RANKS.get(other, TOP) < rank or rank == TOP, f"imports dycoke_edge.{other}"


@pytest.mark.parametrize("path", [p for p in SOURCES if part(p) != "export"], ids=name)
def test_only_export_imports_frameworks(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & FRAMEWORKS


# What an import drags in


def test_runtime_does_without_frameworks() -> None:
    files = sorted((ROOT / "runtime").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    loaded = python("-c", f"import sys, dycoke_edge.{', dycoke_edge.'.join(names)}; print(*sys.modules)", cwd=ROOT)
    assert not set(loaded.split()) & FRAMEWORKS


def test_shared_words_and_cli_load_no_side() -> None:
    shared = [f"dycoke_edge.{word}" for word in (*ORDER, "cli") if word != "ort"]
    loaded = python("-c", f"import sys, {', '.join(shared)}; print(*sys.modules)", cwd=ROOT).split()
    assert not set(loaded) & (FRAMEWORKS | {"av", "onnxruntime"})
    assert not [module for module in loaded if module.startswith(tuple(f"dycoke_edge.{s}" for s in SIDES))]


# A library keeps quiet and reads no environment


def offences(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        text = ast.unparse(node)
        if isinstance(node, ast.Attribute) and text in ("os.environ", "os.environb", "os.getenv"):
            yield text
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (a.name for a in node.names if a.name in ("environ", "environb", "getenv"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "print",
            "logging.basicConfig",
            "basicConfig",
        ):
            yield text


@pytest.mark.parametrize("path", [p for p in SOURCES if not part(p).startswith("cli")], ids=name)
def test_library_is_quiet(path: Path) -> None:
    writes = ["os.environ"] if path == ROOT / "dycoke_edge/ort.py" else []  # ONNX Runtime's switch, which is no read
    assert list(offences(path)) == writes


# The wheel


def setuptools_version() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, shipped_bundle: Path) -> Path:
    """Built from a copy of the checkout, as `make wheel` does it: the build/ of an older one would leak into it."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            source / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    shutil.copytree(shipped_bundle, source / "build/tiny-bundle")
    isolation = ["--no-build-isolation"] if setuptools_version() >= 77 else []
    python("-m", "pip", "wheel", "--no-deps", *isolation, "-w", str(source / "dist"), str(source))
    (built,) = (source / "dist").iterdir()
    return built


TINY = {f"dycoke_edge/export/tiny/{file.name}" for file in Path("export/tiny").iterdir()}
KERNELS = {
    f"dycoke_edge/{name(file)}" for ending in ("cu", "cuh", "ptx") for file in ROOT.glob(f"runtime/gpu/*/*.{ending}")
}
DATA = {"dycoke_edge/py.typed", "dycoke_edge/runtime/serve/page.html", *TINY, *KERNELS}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, shipped_bundle: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {entry.split("/")[0] for entry in inside} == {"dycoke_edge", info}
    assert f"{info}/licenses/LICENSE" in inside
    wanted = {f"dycoke_edge/{name(p).removeprefix('dycoke_edge/')}" for p in SOURCES}
    shipped = {f"dycoke_edge/shipped/{p.relative_to(shipped_bundle)}" for p in shipped_bundle.rglob("*") if p.is_file()}
    assert {entry for entry in inside if not entry.startswith(info)} == wanted | DATA | shipped
    assert wheel.stat().st_size < 40 * 2**20


PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def install(wheel: Path, home: Path, executable: str | Path = sys.executable) -> Path:
    """The bin/ of an empty environment of a Python with the wheel and what it depends on."""
    python("-m", "venv", str(home), executable=executable)
    python(*PIP, "-c", str(ROOT / "constraints.txt"), str(wheel), executable=home / "bin/python")
    return home / "bin"


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of this Python."""
    return install(wheel, tmp_path_factory.mktemp("device"))


def interpreter(release: str) -> str:
    """A Python of a release, of the system or pyenv; skips where there is none."""
    found = sorted(Path.home().glob(f".pyenv/versions/{release}.*/bin/python"))
    for candidate in (f"python{release}", *map(str, found)):
        try:
            return python("-c", "import ensurepip, sys, venv; print(sys.executable)", executable=candidate).strip()
        except (OSError, AssertionError):  # pyenv has a shim for each Python, which fails for those not switched on
            continue
    pytest.skip(f"no Python {release} here: apt install python{release}-venv, or pyenv install {release}")


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, Any]:
    """A process that cannot see the checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {"cwd": tmp_path, "env": env}


@pytest.mark.slow
def test_wheel_installs_without_torch(device: Path, wheel: Path, outside: dict[str, Any]) -> None:
    printed = python("--version", executable=device / "dycoke-edge", **outside)
    assert printed.split()[-1] == wheel.name.split("-")[1]
    code = "import dycoke_edge.runtime, importlib.util as u; print(*map(u.find_spec, %s))"
    frameworks = ("torch", "transformers", "onnx")
    found = python("-c", code % (frameworks,), executable=device / "python", **outside)
    assert found.split() == ["None"] * 3


@pytest.mark.slow
def test_wheel_answers_straight_after_it_was_installed(device: Path, outside: dict[str, Any]) -> None:
    answers = python("demo", executable=device / "dycoke-edge", **outside)
    assert answers.splitlines()[0] == "How many objects are there? two" and answers.count("\n") == 3


def answer(device: Path, outside: dict[str, Any], bundle: Path) -> str:
    clip = ("--video", str(ROOT / "examples" / "clip.mp4"), "--num-frames", "4")
    ask = ("--prompt", "What happens?", "--max-new-tokens", "8")
    return python("run", str(bundle), *clip, *ask, executable=device / "dycoke-edge", **outside)


@pytest.mark.slow
def test_wheel_answers_without_torch(device: Path, outside: dict[str, Any], tiny_bundle: Path) -> None:
    told = answer(device, outside, tiny_bundle)
    assert told.strip() and not told.lstrip().startswith(("{", "["))


@pytest.mark.slow
@pytest.mark.parametrize("release", ["3.10", "3.12"])
def test_wheel_answers_on_another_python(
    release: str, wheel: Path, outside: dict[str, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    """JetPack 6 has 3.10, Ubuntu 24.04 3.12; with the pins for that Python."""
    device = install(wheel, tmp_path / "device", interpreter(release))
    version = "import sys; print('%d.%d' % sys.version_info[:2])"
    assert python("-c", version, executable=device / "python", **outside).strip() == release
    assert answer(device, outside, tiny_bundle).strip()


@pytest.mark.slow
def test_wheel_answers_on_the_oldest_packages_it_allows(
    device: Path, outside: dict[str, Any], tiny_bundle: Path
) -> None:
    """After the others of this file that use `device`: it is brought down to the floors of pyproject.toml."""
    pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    before = python("-m", "dycoke_edge", "verify", str(tiny_bundle), executable=device / "python", **outside)
    python("-m", "pip", "install", "--quiet", *floors(), executable=device / "python", **outside)
    after = python("-m", "dycoke_edge", "verify", str(tiny_bundle), executable=device / "python", **outside)
    assert before == after


# The README

README = ROOT / "README.md"


def test_readme_links_exist() -> None:
    targets = re.findall(r"\]\(([^)\s]+)", README.read_text(encoding="utf-8"))
    relative = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert not [target for target in relative if not (ROOT / target).exists()]


def test_readme_starts_with_demo_and_test() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = itertools.chain.from_iterable(block.splitlines() for block in blocks)
    commands = [line.split(" #")[0].strip() for line in lines if line.strip() and line[0] != "#"]
    assert commands[:2] == ["make demo", "make test"]


# onnxruntime and onnxruntime-gpu, which own the same files


def test_the_package_asks_for_one_onnxruntime(wheel: Path) -> None:
    """And no extra for the other: pip would write both to the same files."""
    info = next(entry for entry in zipfile.ZipFile(wheel).namelist() if entry.endswith("/METADATA"))
    asked = re.findall(r"^Requires-Dist: (onnxruntime\S*)", zipfile.ZipFile(wheel).read(info).decode(), re.M)
    assert [requirement.split(">")[0] for requirement in asked] == ["onnxruntime"]


def stand_in(folder: Path, package: str, provider: str) -> None:
    """A wheel that owns onnxruntime's files."""
    module = (
        f"class InferenceSession: pass\ndef get_available_providers(): return [{provider!r}]\n__version__ = '1.99'\n"
    )
    name = package.replace("-", "_")
    info = f"{name}-1.99.dist-info"
    files = {
        "onnxruntime/__init__.py": module,
        f"onnxruntime/{name}.so": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.99-py3-none-any.whl", "w") as out:
        for file, content in {**files, f"{info}/RECORD": record}.items():
            out.writestr(file, content)


@pytest.mark.slow
def test_the_order_of_installing_for_a_gpu_works(wheel: Path, tmp_path: Path) -> None:
    """The command that docs, doctor and errors give, from every state that pip can be in."""
    cpu, gpu = "onnxruntime", "onnxruntime-gpu"
    stand_in(tmp_path, cpu, "CPUExecutionProvider")
    stand_in(tmp_path, gpu, "CUDAExecutionProvider")
    environment = tmp_path / "venv"
    python("-m", "venv", str(environment))
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    env |= {"PATH": f"{environment / 'bin'}:{env['PATH']}"}
    ask = "import dycoke_edge.ort as o; print(*o.onnxruntime.get_available_providers())"

    def install(*packages: str) -> None:
        for package in packages:
            python(*PIP, "--no-deps", package, executable=environment / "bin/python", env=env)

    def providers() -> str:
        return python("-c", ask, executable=environment / "bin/python", cwd=tmp_path, env=env).strip()

    install(str(wheel))
    for before in ([cpu], [cpu], [gpu, cpu]):  # as installed; after an upgrade brought it back; both at once
        install(*before)
        assert providers() == "CPUExecutionProvider"
        subprocess.run(ort_cuda.INSTALL, shell=True, check=True, env=env, capture_output=True)
        assert providers() == "CUDAExecutionProvider"
    subprocess.run(ort_cuda.INSTALL, shell=True, check=True, env=env, capture_output=True)  # once more
    assert providers() == "CUDAExecutionProvider"


def test_docs_give_that_order() -> None:
    assert ort_cuda.INSTALL in README.read_text() and ort_cuda.JETPACK in " ".join(README.read_text().split())


def test_what_pip_leaves_of_onnxruntime_is_no_onnxruntime(outside: dict[str, Any], tmp_path: Path) -> None:
    """After `pip uninstall` of the one that came last the other's own files are still there."""
    (tmp_path / "onnxruntime").mkdir()
    code = "import sys\nsys.path[:0] = sys.argv[1:]\nfrom dycoke_edge.doctor import examine\nfacts = examine()\n"
    code += "print(facts['can_run'], *facts['missing'], facts['to_run'], sep='|')"
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    said = python("-c", code, str(tmp_path), cwd=ROOT)
    assert said == "False|onnxruntime|pip install --force-reinstall onnxruntime\n"
