"""The CUDA libraries that other libraries are linked to: of pip's nvidia packages, or of the system."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

ORDER = ("cudart", "cublasLt", "cublas")  # those that others need come first
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


def needed_by(library: Path) -> list[str]:
    """The CUDA libraries that a 64-bit shared library is linked to, such as libcublas.so.13, in the order to load
    them in."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        names = [name for name in _linked(content) if name.startswith(("libcu", "libnv"))]
    return sorted(names, key=lambda name: (*(f"lib{stem}." not in name for stem in ORDER), name))


def load(names: Iterable[str]) -> list[str]:
    """Load libraries for all that comes after; returns those that are not there."""
    missing = []
    for name in names:
        try:
            ctypes.CDLL(next(in_packages(name), name), ctypes.RTLD_GLOBAL)
        except OSError:
            missing.append(name)
    return missing


def _linked(elf: mmap.mmap) -> Iterator[str]:
    """The names in the dynamic section of an ELF file; none for any other file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return
    (table,), (size, count) = struct.unpack_from("<Q", elf, 32), struct.unpack_from("<HH", elf, 54)
    segments = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    at, length = next((offset, size) for kind, _, offset, _, _, size in segments if kind == PT_DYNAMIC)
    entries = [struct.unpack_from("<QQ", elf, at + i) for i in range(0, length, 16)]
    strings = next(value for tag, value in entries if tag == DT_STRTAB)
    start = next(strings - v + o for kind, _, o, v, _, size in segments if kind == PT_LOAD and v <= strings < v + size)
    for tag, value in entries:
        if tag == DT_NEEDED:
            yield elf[start + value : elf.find(b"\0", start + value)].decode()


def in_packages(name: str) -> Iterator[str]:
    """Where pip's nvidia packages have a library: nvidia/cu13/lib, or nvidia/cublas/lib before CUDA 13."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{name}")))
