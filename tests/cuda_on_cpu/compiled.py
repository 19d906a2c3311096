"""Kernel sources as a library for the CPU: g++ with cuda_on_cpu.h in place of CUDA."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "runtime/gpu/kernels"
# Nothing beyond the machine's floor and no fused multiply-add: the same bits everywhere.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{KERNELS}"),
)
TO_OWN_SECTION = ("--set-section-flags", ".bss=alloc,load,contents,data", "--rename-section", ".bss=cuda_shared")


class Tail(ctypes.Structure):
    """Bytes after a memory's end that a kernel must leave alone."""

    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_int))


@functools.cache
def project_kernels() -> ctypes.CDLL:
    """The project's kernels, compiled once a process; skips the test where g++ is absent, but fails it in CI."""
    return compile_kernels(sorted(KERNELS.glob("*.cu")), _new_folder())


@functools.cache
def toy_kernels() -> ctypes.CDLL:
    """Those of toys.cu; its file stays until the process ends."""
    return compile_kernels([HERE / "toys.cu"], _new_folder())


def require_compiler() -> None:
    """Skip the test without g++ (and the objcopy that comes with it)."""
    if shutil.which("g++") and shutil.which("objcopy"):
        return
    if os.environ.get("CI") == "true":
        pytest.fail("CI must have g++")
    pytest.skip("g++ is not installed: sudo apt install g++")


def compile_kernels(sources: Sequence[Path], folder: Path) -> ctypes.CDLL:
    """Every __global__ function of these files, callable by name; one translation unit, as kernels.ptx is."""
    require_compiler()
    wrapper, kernels, fibers, library = (folder / name for name in ("k.cpp", "k.o", "fibers.o", "k.so"))
    wrapper.write_text(_wrapper(sources, ()))
    plain = _run("g++", *FLAGS, "-E", "-P", "-D__global__=__global__", wrapper)
    names = re.findall(r"__global__\s+void\s+(\w+)\s*\(", plain)
    wrapper.write_text(_wrapper(sources, names))
    _run("g++", *FLAGS, "-c", wrapper, "-o", kernels)
    _run("objcopy", *TO_OWN_SECTION, kernels)
    _run("g++", *FLAGS, "-c", HERE / "fibers.cpp", "-o", fibers)
    _run("g++", "-shared", kernels, fibers, "-o", library)
    return _declared(ctypes.CDLL(str(library)))


def compile_driver(folder: Path, cuda: int) -> None:
    """libcuda.so.1 and libcublasLt.so.N of CUDA N (its major version), with the CPU for a GPU."""
    driver, blas = folder / "libcuda.so.1", folder / f"libcublasLt.so.{cuda}"
    options = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", f"-I{HERE}")
    version = f"-DDRIVER_VERSION={cuda}020"
    _run("g++", *options, version, "-Wl,-soname,libcuda.so.1", HERE / "libcuda.cpp", "-o", driver, "-ldl")
    _run("g++", *options, f"-Wl,-soname,{blas.name}", HERE / "libcublaslt.cpp", driver, "-o", blas)


def _wrapper(sources: Sequence[Path], names: Sequence[str]) -> str:
    # in a namespace without a name, __shared__ arrays of templates are local to this file and all lie in its .bss
    includes = "\n".join(f'#include "{source}"' for source in sources)
    entries = "".join(f"    KERNEL_ENTRY({name}),\n" for name in names)
    return f"""#include "cuda_on_cpu.h"
namespace {{
{includes}
}}
namespace cuda_on_cpu {{
extern "C" const Kernel kernels[] = {{
{entries}    {{}},
}};
extern "C" const int kernel_count = {len(names)};
}}
"""


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stderr}"
    return done.stdout


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    unsigned, pointers, tails = ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(Tail)
    library.kernel_name.restype = library.kernel_signature.restype = library.launch.restype = ctypes.c_char_p
    grid = ctypes.POINTER(unsigned)
    library.launch.argtypes = (ctypes.c_int, grid, unsigned, unsigned, pointers, tails, ctypes.c_int, unsigned)
    library.allocate.restype = ctypes.c_void_p
    library.allocate.argtypes = (ctypes.c_size_t,)
    library.release.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library
