"""The kernels' PTX text: made from these sources, and accepted for every GPU it is meant for."""

from __future__ import annotations

import ctypes
import importlib.util
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.decode import ATTEND_BLOCK, CHOOSE_BLOCK
from dycoke_edge.runtime.gpu.kernels import BLOCK
from dycoke_edge.runtime.gpu.kernels import compile as kernels
from tests.cuda_on_cpu.compiled import HERE, project_kernels

TOYS = HERE / "toys.cu"
HAS_WHEELS = platform.system() == "Linux" and platform.machine() == "x86_64"  # pyproject.toml's test extra
ORIN, HOPPER, THOR = 87, 90, 110
MAX_REGISTERS, MAX_SHARED = 65536, 48 << 10


def missing(what: str) -> None:
    """Skip the test, but not in CI where the wheels are."""
    if HAS_WHEELS and os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def made() -> str:
    try:
        return kernels.compile_sources(kernels.sources())
    except EngineError as error:
        if "not installed" in str(error):
            missing(str(error))
        raise


def test_the_text_is_made_from_these_sources(made: str) -> None:
    same = kernels.PTX.read_text(encoding="ascii") == made  # not compared by assert: a diff of megabytes
    assert same, "kernels.ptx is old: python -m dycoke_edge.runtime.gpu.kernels.compile"
    toys = (TOYS.with_suffix(".ptx")).read_text(encoding="ascii") == kernels.compile_sources([TOYS])
    assert toys, f"python -m dycoke_edge.runtime.gpu.kernels.compile {TOYS.relative_to(TOYS.parents[2])}"


def test_a_compilation_leaves_the_locale_alone(made: str) -> None:
    assert (
        locale.nl_langinfo(locale.CODESET)
        == subprocess.run(
            [sys.executable, "-c", "import locale; print(locale.nl_langinfo(locale.CODESET))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )


def test_the_oldest_driver_and_gpu_can_read_it() -> None:
    text = kernels.PTX.read_text(encoding="ascii")
    assert "\n.version 8.2\n" in text  # CUDA 12.2: JetPack 6.0
    assert "\n.target sm_80\n" in text


def entries(ptx: str) -> dict[str, str]:
    """Parameters of every kernel: i, f, or q for what takes 8 bytes (pointers too)."""
    found = re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)
    letters = {"u32": "i", "f32": "f", "u64": "q"}
    return {name: "".join(letters[kind] for kind in re.findall(r"\.param \.(\w+)", text)) for name, text in found}


def test_it_has_the_kernels_that_the_other_tests_run() -> None:
    library = project_kernels()
    count = ctypes.c_int.in_dll(library, "kernel_count").value
    signature = {library.kernel_name(i).decode(): library.kernel_signature(i).decode() for i in range(count)}
    wanted = {name: letters.replace("p", "q") for name, letters in signature.items()}
    assert entries(kernels.PTX.read_text(encoding="ascii")) == wanted, "kernels.ptx is old, see above"


def ptxas_for(architecture: int) -> Path:
    """One that knows the GPU: that of the test extra, or a newer one of a CUDA toolkit."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        spec = None
    places = [Path(folder) / "bin/ptxas" for folder in spec.submodule_search_locations or ()] if spec else []
    if toolkit := shutil.which("ptxas"):
        places.append(Path(toolkit))
    for place in places:
        known = subprocess.run([place, "--help"], capture_output=True, text=True, timeout=60).stdout
        if f"sm_{architecture}'" in known:
            return place
    if architecture <= HOPPER:
        missing("no ptxas: pip install nvidia-cuda-nvcc-cu12==12.2.140")
    pytest.skip(f"no ptxas here knows sm_{architecture}: CUDA 13 has one")


@pytest.mark.parametrize("architecture", [80, ORIN, HOPPER, THOR])
def test_it_assembles_without_spilling(architecture: int, tmp_path: Path) -> None:
    ptxas, out = ptxas_for(architecture), tmp_path / "kernels.cubin"
    command = [str(ptxas), "-v", f"-arch=sm_{architecture}", str(kernels.PTX), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"Compiling entry function '(\w+)'", done.stderr)[1:]
    report = dict(zip(parts[::2], parts[1::2], strict=True))
    assert report.keys() == entries(kernels.PTX.read_text(encoding="ascii")).keys()
    for name, text in report.items():
        spilled = re.findall(r"(\d+) bytes spill", text)
        registers, shared = re.findall(r"Used (\d+) registers", text), re.findall(r"(\d+) bytes smem", text)
        threads = CHOOSE_BLOCK if name == "choose" else max(BLOCK, ATTEND_BLOCK)
        assert spilled == ["0", "0"], f"{name}: {text}"
        a_thread = -(-int(registers[0]) // 8) * 8  # they are given out by eights
        assert a_thread * threads <= MAX_REGISTERS, f"{name}: {registers} registers for each of {threads} threads"
        assert sum(map(int, shared)) <= MAX_SHARED, f"{name}: {shared} bytes of static shared memory"


def test_nvcc_accepts_the_sources_too(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc is not installed; NVRTC, which makes what is shipped, was asked above")
    whole = tmp_path / "kernels.cu"
    whole.write_text("".join(f'#include "{path}"\n' for path in kernels.sources()))
    out = tmp_path / "kernels.ptx"
    command = [nvcc, "-ptx", "-std=c++17", "-arch=compute_80", f"-I{kernels.HERE}", str(whole), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert entries(out.read_text()) == entries(kernels.PTX.read_text(encoding="ascii"))


def test_a_source_with_a_mistake_is_named(tmp_path: Path, made: str) -> None:
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('#include "dialect.cuh"\nextern "C" __global__ void KERNEL(wrong)(float *out) { out = 1.5; }\n')
    with pytest.raises(EngineError, match=r"NVRTC does not accept the kernels: .*wrong.cu\(2\): error"):
        kernels.compile_sources([wrong])
