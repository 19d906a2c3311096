"""Makes kernels.ptx from the .cu files: `python -m dycoke_edge.runtime.gpu.kernels.compile`. Needs no GPU.

NVRTC 12.2, because a driver reads PTX of its own CUDA version and older, and JetPack 6.0 has 12.2; for compute_80,
because drivers compile that for every newer GPU: Orin, Hopper, Thor. Nobody who only runs the package needs this.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dycoke_edge.errors import EngineError

HERE = Path(__file__).resolve().parent
PTX = HERE / "kernels.ptx"
WANTED = (12, 2)
PACKAGE = "nvidia-cuda-nvrtc-cu12==12.2.140"
OPTIONS = ("--gpu-architecture=compute_80", "--std=c++17", "--extra-device-vectorization", f"--include-path={HERE}")


def main(files: Sequence[str]) -> None:
    """Write kernels.ptx, or for each .cu file named a .ptx beside it; EngineError if NVRTC is missing, another, or does
    not accept a source."""
    for file in map(Path, files):
        file.with_suffix(".ptx").write_text(compile_sources([file.resolve()]), encoding="ascii")
    if not files:
        PTX.write_text(compile_sources(sources()), encoding="ascii")


def sources() -> list[Path]:
    """All .cu files here."""
    return sorted(HERE.glob("*.cu"))


def compile_sources(files: Sequence[Path]) -> str:
    """The PTX text of .cu files, as one translation unit."""
    with _own_locale():
        return _compile(files)


@contextmanager
def _own_locale() -> Iterator[None]:
    """NVRTC 12.2 leaves its thread with the C locale, after which Python reads every file as ASCII."""
    uselocale = ctypes.CDLL(None).uselocale
    uselocale.argtypes, uselocale.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = uselocale(None)
    try:
        yield
    finally:
        uselocale(before)


def _compile(files: Sequence[Path]) -> str:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    source = "".join(f'#include "{path if path.parent != HERE else path.name}"\n' for path in files)
    _call(nvrtc, "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options):
            raise EngineError(f"NVRTC does not accept the kernels: {_text(nvrtc, 'ProgramLog', program)}")
        return _text(nvrtc, "PTX", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> Any:
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"NVRTC is not installed: pip install {PACKAGE}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC looks for it by name only
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(nvrtc, "nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != WANTED:
        raise EngineError(f"NVRTC is {major.value}.{minor.value}, its PTX may be too new: pip install {PACKAGE}")
    return nvrtc


def _text(nvrtc: Any, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _call(nvrtc, f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(nvrtc, f"nvrtcGet{what}", program, text)
    return text.value.decode()


def _call(nvrtc: Any, name: str, *arguments: object) -> None:
    status = getattr(nvrtc, name)(*arguments)
    if status:
        raise EngineError(f"{name} failed: status {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
