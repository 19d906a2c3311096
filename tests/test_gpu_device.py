"""What every Device does: the emulated one here, and the same on a GPU where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_int64
from pathlib import Path

import numpy as np
import pytest

from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.cuda import CudaDevice
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from tests.cuda_on_cpu import compiled
from tests.emulator import EmulatedDevice

TOYS = compiled.HERE / "toys.ptx"
Make = Callable[[], Device]


def _ptx_on_a_gpu(folder: Path) -> Path:
    """Skips the test where there is no GPU, and says what is missing."""
    try:
        CudaDevice().close()
    except EngineError as error:
        pytest.skip(str(error))
    if "TOYS" not in os.environ:
        return TOYS
    ptx = folder / "toys.ptx"
    ptx.write_text(os.environ["TOYS"])  # test_cuda.py gives something else than PTX
    return ptx


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    if request.param == "emulated":
        kernels = compiled.toy_kernels()
        return lambda: EmulatedDevice(kernels=kernels)
    ptx = _ptx_on_a_gpu(tmp_path_factory.mktemp("toys"))
    return lambda: CudaDevice(ptx=ptx)


@pytest.fixture(scope="module")
def device(make: Make) -> Iterator[Device]:
    opened = make()
    yield opened
    opened.close()


def random(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# Memory


def test_what_it_says_of_itself(device: Device) -> None:
    assert device.name and device.index == 0
    assert device.compute_capability >= (8, 0)
    assert device.multiprocessors > 0 and device.total_bytes > 1 << 28
    assert device.bandwidth is None or 1e9 <= device.bandwidth < 1e14
    assert isinstance(device.stream, int) and device.stream
    assert 0 < device.free_bytes <= device.total_bytes and device.driver_version >= 12020


def test_new_memory_is_zero_and_aligned(device: Device) -> None:
    for nbytes in (1, 511, 513, 1 << 20):
        array = DeviceArray.empty(device, (nbytes,), np.uint8)
        assert array.address % 512 == 0
        assert not array.numpy().any()
        array[...] = np.full(nbytes, 7, np.uint8)  # what the next one may get


def test_there_and_back(device: Device) -> None:
    values = random(5, 3, 2)
    array = DeviceArray.of(device, values)
    sent = values.copy()
    array[1:3] = sent[1:3] * 2
    sent[...] = np.nan  # an upload has read its source when it returns
    assert np.array_equal(array[1:3].numpy(), values[1:3] * 2)
    assert np.array_equal(np.asarray(array)[3:], values[3:])
    device.zero(array[0].address, array[0].nbytes)
    assert not array[0].numpy().any() and array[1].numpy().any()


def test_views(device: Device) -> None:
    values = np.arange(24, dtype=np.int32).reshape(4, 3, 2)
    array = DeviceArray.of(device, values)
    assert (array.shape, array.nbytes, array.size, array.ndim, len(array)) == ((4, 3, 2), 96, 24, 3, 4)
    assert array.dtype == np.int32
    for key in (0, -1, np.int64(2), slice(1, 3), slice(None, 2), slice(-2, None), slice(3, 1), None, ...):
        assert np.array_equal(array[key].numpy(), values[key])
    assert np.array_equal(array.reshape(6, -1).numpy(), values.reshape(6, 4))
    assert np.array_equal(array[1].reshape((-1,)).numpy(), values[1].ravel())
    assert array[2:].address == array.address + 48
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            array[wrong]
    with pytest.raises(AssertionError, match="contiguous"):
        array[::2]
    with pytest.raises(AssertionError, match="broadcast"):
        array[0] = np.zeros((3, 2), np.float32)


def test_copies_on_the_device(device: Device) -> None:
    a, b = DeviceArray.of(device, random(6, 4)), DeviceArray.empty(device, (6, 4), np.float32)
    b[2:4] = a[:2]
    expected = np.zeros((6, 4), np.float32)
    expected[2:4] = a.numpy()[:2]
    assert np.array_equal(b.numpy(), expected)


def test_a_view_keeps_its_memory(device: Device) -> None:
    part, before = 8 << 20, device.bytes_in_use
    view = DeviceArray.of(device, np.full((4, part), 3, np.uint8))[2]
    gc.collect()
    other = DeviceArray.empty(device, (4 * part,), np.uint8)  # would get the same memory
    assert (view.numpy() == 3).all()
    assert device.bytes_in_use >= before + 7 * part  # a GPU's memory goes by blocks
    del view, other
    gc.collect()
    assert device.bytes_in_use < before + part


def test_peak(device: Device) -> None:
    device.take_peak_bytes()
    array = DeviceArray.empty(device, (64 << 20,), np.uint8)
    with_it = device.bytes_in_use
    del array
    gc.collect()
    assert device.bytes_in_use <= with_it - (60 << 20)
    assert device.take_peak_bytes() >= with_it
    assert device.take_peak_bytes() < with_it


def test_memory_out_is_an_error_and_nothing_worse(device: Device) -> None:
    before = device.bytes_in_use
    with pytest.raises(EngineError, match=r"GPU memory is out: .* MiB more are needed, .* use a smaller --kv-capacity"):
        device.alloc(device.total_bytes + 1)
    assert device.bytes_in_use <= before + (64 << 20)
    assert not DeviceArray.empty(device, (16,), np.float32).numpy().any()


def test_pinned_memory(device: Device) -> None:
    array, pinned = DeviceArray.of(device, np.arange(8, dtype=np.int32)), device.pinned(64)
    assert not pinned.any()
    ring = pinned.view(np.int32)
    del pinned
    gc.collect()
    device.download_async(array[2:6].address, ring[4:8])
    event = device.event()
    event.record()
    event.wait()
    assert ring.tolist() == [0, 0, 0, 0, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0]


# Kernels


def test_warp_functions(device: Device) -> None:
    values = random(96)
    sums, most, moved = (DeviceArray.empty(device, (n,), np.float32) for n in (96, 96, 384))
    bits = DeviceArray.empty(device, (192,), np.uint32)
    source = DeviceArray.of(device, values)
    device.kernel("warps", 3, 32, *(a.pointer for a in (source, sums, most, bits, moved)))()
    lanes, rows = np.arange(32), values.reshape(3, 32)
    tree = rows
    for half in (16, 8, 4, 2, 1):
        tree = tree[:, :half] + tree[:, half:]
    assert np.array_equal(sums.numpy().reshape(3, 32), np.broadcast_to(tree, (3, 32)))  # bit by bit, in every lane
    assert np.array_equal(most.numpy().reshape(3, 32), np.broadcast_to(rows.max(1, keepdims=True), (3, 32)))
    ballots = [(int(bit) << int(lane)) for row in rows for lane, bit in enumerate(row > 0)]
    assert bits.numpy()[::2].tolist() == [sum(ballots[32 * w : 32 * w + 32]) for w in range(3) for _ in range(32)]
    assert (bits.numpy()[1::2] == 0xFF).all()
    sources = (lanes * 7 % 32, np.where(lanes < 3, lanes, lanes - 3), np.where(lanes > 26, lanes, lanes + 5), lanes ^ 9)
    for column, lane in enumerate(sources):
        assert np.array_equal(moved.numpy().reshape(3, 32, 4)[..., column], rows[:, lane])


@pytest.mark.parametrize("kind", ["f32", "i32"])
def test_barriers_with_threads_that_have_returned(device: Device, kind: str) -> None:
    values = np.random.default_rng(1).integers(-9, 9, (5, 96)).astype(np.float32 if kind == "f32" else np.int32)
    out, source = DeviceArray.empty(device, (5,), values.dtype), DeviceArray.of(device, values)
    device.kernel(f"sum_{kind}", 5, 256, source.pointer, out.pointer, c_int32(96))()
    assert out.numpy().tolist() == values.sum(1).tolist()


@pytest.mark.parametrize("times", [1, 2, 5])
def test_dynamic_shared_memory(device: Device, times: int) -> None:
    values = random(4, 128)
    array = DeviceArray.of(device, values)
    device.kernel("turn", 4, 128, array.pointer, c_int32(times), shared=512)()
    assert np.array_equal(array.numpy(), values[:, ::-1] if times % 2 else values)


def test_grids_and_the_last_block(device: Device) -> None:
    out = DeviceArray.empty(device, (24, 64), np.int32)
    device.kernel("places", (2, 3, 4), 64, out.pointer)()
    assert np.array_equal(out.numpy(), np.arange(24)[:, None] * 1000 + np.arange(64))
    parts, counters = DeviceArray.empty(device, (50,), np.int32), DeviceArray.empty(device, (2,), np.int32)
    device.kernel("last_block", 50, 32, parts.pointer, counters.pointer, counters[1:].pointer)()
    assert counters.numpy().tolist() == [50, 1275]


def test_every_half_becomes_the_float_it_is(device: Device) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    out, source = DeviceArray.empty(device, halves.shape, np.float32), DeviceArray.of(device, halves)
    device.kernel("to_floats", 256, 256, source.pointer, out.pointer, c_int64(halves.size))()
    same_values(out.numpy(), halves.astype(np.float32))


def test_floats_are_rounded_to_the_nearest_half(device: Device) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32)
    with np.errstate(over="ignore"):
        ties = (exact + np.nextafter(halves[np.isfinite(halves)], np.float16(np.inf)).astype(np.float32)) / 2
    near = [np.nextafter(ties, np.float32(side * np.inf)) for side in (-1, 1)]
    edges = np.array([65504, 65519.996, 65520, 65536, 3e38, 1e-45, 2**-25, 2**-24, 6e-8, np.inf, np.nan], np.float32)
    scattered = np.random.default_rng(3).integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    floats = np.concatenate([exact, ties, *near, edges, -edges, scattered])
    out, source = DeviceArray.empty(device, floats.shape, np.float16), DeviceArray.of(device, floats)
    blocks = -(-floats.size // 256)
    device.kernel("to_halves", blocks, 256, source.pointer, out.pointer, c_int64(floats.size))()
    with np.errstate(over="ignore", invalid="ignore"):
        same_values(out.numpy(), floats.astype(np.float16))


def same_values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Bit by bit, signs of zeros too; a nan is a nan."""
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    whole, numbers = np.dtype(f"u{ours.itemsize}"), ~np.isnan(ours)
    assert np.array_equal(ours.view(whole)[numbers], theirs.view(whole)[numbers])


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_sixteen_bytes_at_once(device: Device, kind: str, dtype: type) -> None:
    values = random(32 * 16 // np.dtype(dtype).itemsize, dtype=dtype)
    out, source = DeviceArray.empty(device, values.shape, np.float32), DeviceArray.of(device, values)
    device.kernel(f"unpack_{kind}", 1, 32, source.pointer, out.pointer)()
    assert np.array_equal(out.numpy(), values.astype(np.float32))


# Products


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtypes", [("f4", "f4"), ("f2", "f2"), ("f2", "f4")], ids="-".join)
def test_product(device: Device, dtypes: tuple[str, str], beta: float) -> None:
    m, n, k = 5, 8, 24
    kind, out_kind = map(np.dtype, dtypes)
    x, matrix = random(m, k, seed=1).astype(kind), random(n, k, seed=2).astype(kind)
    out = random(m, n, seed=3).astype(out_kind)
    on = [DeviceArray.of(device, array) for array in (x, matrix, out)]
    device.product(on[0], on[1], on[2], beta)
    expected = x.astype(np.float64) @ matrix.astype(np.float64).T + beta * out.astype(np.float64)
    assert np.abs(on[2].numpy() - expected).max() < (3e-5 if out_kind == np.float32 else 1e-2)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_what_follows_a_product(device: Device, kind: str, gelu: bool, beta: float) -> None:
    x, matrix = (random(40, 64, seed=6) / 8).astype(kind), random(48, 64, seed=16).astype(kind)
    before = random(40, 48, seed=26).astype(kind)
    given, of, out = (DeviceArray.of(device, array) for array in (x, matrix, before))
    for seed in (7, 8):  # the second time with another bias and the same plan
        bias = random(48, seed=seed).astype(kind)
        out[...] = before
        device.product(given, of, out, beta, DeviceArray.of(device, bias), gelu)
        wide = x.astype(np.float64) @ matrix.astype(np.float64).T + bias + beta * before.astype(np.float64)
        near = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
        close = 2e-5 + gelu * 1e-5 * np.abs(wide) if kind == "f4" else 5e-3  # the instruction's tanh is 1.1e-5 off
        assert (np.abs(out.numpy() - (near if gelu else wide)) < close).all()  # GELU itself is 5e-4 from this form


def test_products_of_rows_that_begin_anywhere(device: Device) -> None:
    x, matrix = random(9, 8, seed=9).astype("f2"), random(16, 8, seed=10).astype("f2")
    given, of = DeviceArray.of(device, x), DeviceArray.of(device, matrix)
    out = DeviceArray.empty(device, (9, 16), np.float16)
    for row in range(9):
        device.product(given[row : row + 1], of, out[row : row + 1])
    assert np.abs(out.numpy() - x.astype(np.float32) @ matrix.astype(np.float32).T).max() < 1e-2


def test_a_product_is_not_tf32_and_does_not_read_out(device: Device) -> None:
    x, matrix = random(64, 512, seed=4), random(128, 512, seed=5)
    on = [DeviceArray.of(device, array) for array in (x, matrix, np.full((64, 128), np.nan, np.float32))]
    device.product(on[0], on[1], on[2])
    expected = x.astype(np.float64) @ matrix.astype(np.float64).T
    assert np.abs(on[2].numpy() - expected).max() < 5e-4  # TF32 is wrong by 1e-2


# Graphs and events


def test_a_graph_does_what_was_recorded_when_it_is_launched(device: Device) -> None:
    values = random(2, 64)
    array, copy = DeviceArray.of(device, values), DeviceArray.empty(device, (2, 64), np.float32)
    ring = device.pinned(512).view(np.float32)
    turn = device.kernel("turn", 2, 64, array.pointer, c_int32(1), shared=256)
    halves = DeviceArray.empty(device, (128,), np.float16)
    with device.capture() as graph:
        turn()
        device.copy(copy.address, array.address, array.nbytes)
        device.zero(array[1].address, array[1].nbytes)
        device.kernel("to_halves", 1, 128, copy.pointer, halves.pointer, c_int64(128))()
        device.download_async(copy.address, ring)
    assert np.array_equal(array.numpy(), values) and not copy.numpy().any()
    graph.launch()
    device.synchronize()
    assert np.array_equal(ring.reshape(2, 64), values[:, ::-1])
    assert np.array_equal(halves.numpy(), values[:, ::-1].astype(np.float16).ravel())
    array[...] = values * 3  # the graph has addresses, not values
    graph.launch()
    graph.launch()
    assert np.array_equal(copy.numpy(), np.stack([values[0] * 3, np.zeros(64)]).astype(np.float32))
    graph.close()
    graph.close()
    with pytest.raises(AssertionError):
        graph.launch()


def test_a_product_in_a_graph(device: Device) -> None:
    on = [DeviceArray.of(device, array) for array in (random(8, 16), random(8, 16, seed=1), random(8, 8))]

    def multiply() -> None:
        device.product(on[0], on[1], on[2])

    multiply()
    first = on[2].numpy()
    with device.capture() as graph:
        multiply()
    device.zero(on[2].address, on[2].nbytes)
    graph.launch()
    assert np.array_equal(on[2].numpy(), first)


def test_an_error_while_recording_leaves_the_stream_usable(device: Device) -> None:
    array = DeviceArray.empty(device, (64,), np.float32)
    with pytest.raises(KeyError), device.capture():
        device.zero(array.address, array.nbytes)
        raise KeyError
    array[...] = random(64)
    assert array.numpy().any()


def test_events_say_when_they_were(device: Device) -> None:
    array, events = DeviceArray.empty(device, (1 << 20,), np.float32), [device.event(timed=True) for _ in range(3)]
    for count, event in zip((0, 1, 20), events, strict=True):
        for _ in range(count):
            device.zero(array.address, array.nbytes)
        event.record()
    events[-1].wait()
    first, second = events[1].since(events[0]), events[2].since(events[1])
    assert 0 <= first < 60 and 0 < second < 60
    assert events[2].since(events[0]) == pytest.approx(first + second, rel=1e-3, abs=2e-6)
    with pytest.raises((EngineError, AssertionError)):  # nobody noted when it was
        device.event().since(events[0])


def test_an_event_is_recorded_again_and_again(device: Device) -> None:
    array, pinned, event = DeviceArray.empty(device, (64,), np.float32), device.pinned(256), device.event()
    for number in range(3):
        array[...] = np.full(64, number, np.float32)
        device.download_async(array.address, pinned.view(np.float32))
        event.record()
        event.wait()
        assert (pinned.view(np.float32) == number).all()


def test_from_any_thread(device: Device) -> None:
    found: list[list[float]] = []
    array = DeviceArray.of(device, np.arange(64, dtype=np.float32))

    def work() -> None:  # a thread that CUDA has not seen
        device.kernel("turn", 1, 64, array.pointer, c_int32(1), shared=256)()
        found.append(DeviceArray.of(device, array.numpy()).numpy().tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == [list(range(63, -1, -1))]


# The end


def test_close(make: Make) -> None:
    device = make()
    array, pinned = DeviceArray.of(device, random(64)), device.pinned(64)
    device.close()
    device.close()
    del array, pinned  # given back to a closed device: nothing happens
    gc.collect()
    again = make()
    assert not DeviceArray.empty(again, (64,), np.float32).numpy().any()
    again.close()


@pytest.mark.gpu
def test_a_lost_context_stays_lost(tmp_path: Path) -> None:
    """In a process of its own, for its context cannot be had back."""
    ptx = _ptx_on_a_gpu(tmp_path)
    code = f"""
import ctypes, pathlib, numpy as np
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.cuda import CudaDevice
from dycoke_edge.runtime.gpu.device import DeviceArray
device = CudaDevice(ptx=pathlib.Path({str(ptx)!r}))
kept = DeviceArray.empty(device, (8,), np.float32)
device.kernel("turn", 1, 64, ctypes.c_void_p(64), ctypes.c_int32(1), shared=256)()
def launch():
    device.kernel("turn", 1, 64, ctypes.c_void_p(kept.address), ctypes.c_int32(1), shared=256)()
for call in (device.synchronize, kept.numpy, lambda: device.alloc(8), device.event, launch):
    try:
        call()
    except EngineError as error:
        print(error)
del kept
device.close()
print("closed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "closed", done.stderr
    assert len(set(lines[:-1])) == 1 and len(lines) == 6, done.stdout
    assert lines[0].startswith("the GPU context is lost (CUDA_ERROR_") and "start the process anew" in lines[0]


@pytest.mark.gpu
def test_kernels_ptx() -> None:
    try:
        device = CudaDevice()
    except EngineError as error:
        pytest.skip(str(error))
    for dtype, name in ((np.float32, "widen_f32"), (np.float16, "widen_f16")):
        values, out = np.arange(999).astype(dtype), DeviceArray.empty(device, (1000,), np.float32)
        device.kernel(name, 8, 128, DeviceArray.of(device, values), out, c_int64(999))()
        assert out.numpy().tolist() == [*range(999), 0.0]
    device.close()
