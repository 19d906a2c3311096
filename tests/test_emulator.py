"""The emulated GPU: that kernels do there what they do on a GPU, and that what a GPU would not forgive is found."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64
from pathlib import Path

import numpy as np
import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from tests.cuda_on_cpu import compiled
from tests.emulator import EmulatedDevice, GpuFault


@pytest.fixture
def toys() -> ctypes.CDLL:
    return compiled.toy_kernels()


@pytest.fixture(params=[0, 1, 2026], ids=["in-order", "last-first", "shuffled"])
def device(request: pytest.FixtureRequest, toys: ctypes.CDLL) -> EmulatedDevice:
    return EmulatedDevice(order=request.param, kernels=toys)


@pytest.fixture
def one(toys: ctypes.CDLL) -> EmulatedDevice:
    return EmulatedDevice(kernels=toys)


def test_it_is_a_device(one: EmulatedDevice) -> None:
    checked: Device = one  # mypy holds this
    assert checked.stream


# What kernels need (test_gpu_device.py has the rest, there on a GPU too)


def test_a_missing_barrier_shows(toys: ctypes.CDLL) -> None:
    values = np.arange(1, 65, dtype=np.float32)
    found = []
    for order in (0, 1, 7):
        device = EmulatedDevice(order=order, kernels=toys)
        memory = DeviceArray.of(device, values)
        device.kernel("race", 1, 64, memory.pointer, shared=256)()
        found.append(memory.numpy())
    assert any(not np.array_equal(one, values[::-1]) for one in found)
    assert not np.array_equal(found[0], found[1])


def test_shared_memory_is_dirty(one: EmulatedDevice) -> None:
    memory = DeviceArray.of(one, np.ones(64, np.float32))
    one.kernel("race", 1, 64, memory.pointer, shared=256)()
    assert np.isnan(memory.numpy()[:32]).all()  # read before they were written: not what an earlier kernel left


def test_a_block_of_1024_threads_and_blocks_that_follow(device: EmulatedDevice) -> None:
    memory = DeviceArray.of(device, np.arange(3 * 1024, dtype=np.float32))
    device.kernel("turn", 3, 1024, memory.pointer, c_int32(3), shared=4096)()
    assert np.array_equal(memory.numpy(), np.arange(3 * 1024, dtype=np.float32).reshape(3, 1024)[:, ::-1].ravel())


# What a GPU does not forgive


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("half_a_warp", "warp"),
        ("two_barriers", "different __syncthreads"),
        ("never", "wait for each other for ever"),
        ("two_functions", "different warp functions"),
    ],
)
def test_threads_that_do_not_meet(device: EmulatedDevice, kernel: str, said: str) -> None:
    memory = DeviceArray.empty(device, (64,), np.float32)
    launch = device.kernel(kernel, 1, 64, memory.pointer)
    for _ in range(2):  # and the next launch begins afresh
        with pytest.raises(GpuFault, match=f"kernel {kernel}.*{said}"):
            launch()
    device.kernel("turn", 1, 64, memory.pointer, c_int32(1), shared=256)()


def test_memory_that_is_not_the_kernels(one: EmulatedDevice) -> None:
    halves, floats = DeviceArray.empty(one, (8,), np.float16), DeviceArray.empty(one, (1024,), np.float32)
    launch = one.kernel("to_floats", 32, 32, halves.pointer, floats.pointer, c_int64(1024))
    with pytest.raises(GpuFault, match="touches memory that is not its own"):
        launch()  # reads 2048 bytes where 16 are
    few = DeviceArray.empty(one, (8,), np.float32)
    launch = one.kernel("to_floats", 1, 32, floats.pointer, few.pointer, c_int64(9))
    with pytest.raises(GpuFault, match="past the end of a memory it was given, byte 0 after"):
        launch()
    few[...] = np.ones(8, np.float32)  # and the process lives on
    assert few.numpy().sum() == 8


def test_freed_memory(one: EmulatedDevice) -> None:
    memory = DeviceArray.empty(one, (64,), np.float32)
    launch, address = one.kernel("turn", 1, 64, memory.pointer, c_int32(1), shared=256), memory.address
    del memory
    gc.collect()
    assert one.bytes_in_use == 0
    with pytest.raises(GpuFault, match="touches memory"):
        launch()
    with pytest.raises(GpuFault, match="not in live memory"):
        one.zero(address, 4)
    with pytest.raises(GpuFault, match="no live memory"):
        one.kernel("turn", 1, 64, ctypes.c_void_p(address), c_int32(1), shared=256)


def test_misaligned_and_past_an_array(one: EmulatedDevice) -> None:
    memory, out = DeviceArray.empty(one, (1024,), np.float32), DeviceArray.empty(one, (1024,), np.float32)
    with pytest.raises(GpuFault, match="not a multiple of the type's size"):
        one.kernel("unpack_f32", 1, 32, memory[1:].pointer, out.pointer)()
    with pytest.raises(GpuFault, match="leaves an array"):
        one.kernel("past_an_array", 1, 32, out.pointer, c_int32(32))()
    one.kernel("past_an_array", 1, 32, out.pointer, c_int32(31))()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda d, p: d.kernel("turn", 1, 64, p), r"takes \(pi\), not \(p\)"),
        (lambda d, p: d.kernel("turn", 1, 64, p, c_float(1)), r"takes \(pi\), not \(pf\)"),
        (lambda d, p: d.kernel("turn", 1, 64, p, c_int64(1)), r"takes \(pi\), not \(pq\)"),
        (lambda d, p: d.kernel("turn", 1, 2048, p, c_int32(1)), "2048 threads"),
        (lambda d, p: d.kernel("turn", 1, 40, p, c_int32(1)), "40 threads"),
        (lambda d, p: d.kernel("turn", 1, 64, p, c_int32(1), shared=50_000), "50000 bytes"),
        (lambda d, p: d.kernel("turn", 0, 64, p, c_int32(1)), "grid"),
        (lambda d, p: d.kernel("turn", (1, 70_000, 1), 64, p, c_int32(1)), "grid"),
        (lambda d, p: d.copy(p.value, p.value + 512, 1024), "onto itself"),
        (lambda d, p: d.copy(p.value, p.value + 4096, 4), "not in live memory"),
        (lambda d, p: d.upload(p.value + 4000, np.zeros(100, np.uint8)), "not in live memory"),
        (lambda d, p: d.download_async(p.value, np.zeros(4, np.uint8)), "not in live memory"),  # not pinned
    ],
)
def test_calls_that_cannot_be(one: EmulatedDevice, call: Callable[..., object], said: str) -> None:
    memory = DeviceArray.empty(one, (1024,), np.float32)
    with pytest.raises(GpuFault, match=said):
        call(one, memory.pointer)


def test_what_must_not_be_recorded(one: EmulatedDevice) -> None:
    memory = DeviceArray.empty(one, (4,), np.float32)
    calls: list[Callable[[], object]] = [
        lambda: one.alloc(4),
        memory.numpy,
        one.synchronize,
        lambda: memory.__setitem__(..., np.zeros(4, np.float32)),
    ]
    for call in calls:
        with pytest.raises(GpuFault, match="while work is recorded"), one.capture():
            call()


def test_kernels_are_found_in_the_sources(one: EmulatedDevice, tmp_path: Path) -> None:
    assert {"warps", "sum_f32", "race"} <= set(one.kernels)
    made_by_a_macro = tmp_path / "macro.cu"
    made_by_a_macro.write_text(
        '#include "dialect.cuh"\n#define BOTH(name) extern "C" __global__ void KERNEL(name##_f32)(float *at) '
        '{ *at = 1; } extern "C" __global__ void __launch_bounds__(128) KERNEL(name##_f16)(half_t *) {}\n'
        "BOTH(a)\nBOTH(b)\n"
    )
    library = compiled.compile_kernels([made_by_a_macro], tmp_path)
    assert EmulatedDevice(kernels=library).kernels == ("a_f32", "a_f16", "b_f32", "b_f16")


def test_memory_runs_out(toys: ctypes.CDLL) -> None:
    device = EmulatedDevice(total_bytes=10 << 20, kernels=toys)
    kept = DeviceArray.empty(device, (6 << 20,), np.uint8)
    with pytest.raises(EngineError, match="5 MiB more are needed, 4 MiB of 10 MiB are free; use a smaller --kv-cap"):
        device.alloc(5 << 20)
    assert kept.nbytes == device.bytes_in_use
