"""The KV buffer against a naive model, its overflow, and the memory it does and does not take."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import KVOverflow
from dycoke_edge.runtime import host_rows
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.rows import DeviceRows
from dycoke_edge.runtime.kv import KVBuffer
from tests.emulator import EmulatedDevice
from tests.gpu import no_gpu

Array = NDArray[Any]
Mask = NDArray[np.bool_]
MB = 1 << 20


def model_spec(
    dtype: Literal["fp32", "fp16"] = "fp32", layers: int = 3, split: int = 1, head_dim: int = 4
) -> ModelSpec:
    return ModelSpec(
        dtype=dtype,
        image_size=100,
        tokens_per_frame=16,
        hidden_size=128,
        num_layers=layers,
        num_heads=4,
        kv_heads=2,
        head_dim=head_dim,
        vocab_size=264,
        rope_theta=1e6,
        max_positions=1024,
        split_layer=split,
    )


def address(array: Array | DeviceArray) -> int:
    return array.address if isinstance(array, DeviceArray) else int(array.ctypes.data)


def write(buffer: KVBuffer, rows: slice, content: Array) -> None:
    """content [2 * layers, n, G, D] into `rows` of every layer."""
    for layer in range(buffer.spec.num_layers):
        buffer.keys(layer, rows)[...] = content[2 * layer]
        buffer.values(layer, rows)[...] = content[2 * layer + 1]


def fill(buffer: KVBuffer, visual: int, text: int, value: float = 1.0) -> None:
    """Grow both ways, every row written."""
    shape = (2 * buffer.spec.num_layers, 1, buffer.spec.kv_heads, buffer.spec.head_dim)
    content = np.full(shape, value, buffer.slab.dtype)
    write(buffer, buffer.left(visual), content)
    buffer.grow_left(visual)
    write(buffer, buffer.right(text), content)
    buffer.grow_right(text)


def first_of(count: int, total: int) -> Mask:
    return np.arange(total) < count


# against a naive model


class Machine(RuleBasedStateMachine):
    """Every row's content is known by the token it belongs to; the buffer must agree after each operation."""

    dtype: Literal["fp32", "fp16"] = "fp32"
    CAPACITY = 20

    def __init__(self) -> None:
        super().__init__()
        self.kv = self.made()
        self.base = address(self.kv.slab), address(self.kv.slot)
        self.random = np.random.default_rng(0)
        self.forget(0)

    def made(self) -> KVBuffer:
        return KVBuffer(model_spec(self.dtype), self.CAPACITY)

    @property
    def slab(self) -> Array:
        """What the buffer holds, wherever it lies."""
        return np.asarray(self.kv.slab)

    def forget(self, text_rows: int) -> None:
        self.text_rows = text_rows
        self.visual: list[Array] = []  # [2 * layers, G, D] each, oldest first
        self.text: list[Array] = []
        self.active: list[bool] = []
        self.freed = False

    def fresh(self, count: int) -> Array:
        shape = (2 * self.kv.spec.num_layers, count, self.kv.spec.kv_heads, self.kv.spec.head_dim)
        return self.random.standard_normal(shape).astype(self.kv.slab.dtype)

    @property
    def left_room(self) -> int:
        return self.CAPACITY - self.text_rows - len(self.visual)

    @property
    def right_room(self) -> int:
        return self.text_rows - len(self.text)

    @initialize(text_rows=st.integers(0, CAPACITY))
    def start(self, text_rows: int) -> None:
        self.reset(text_rows)

    @rule(text_rows=st.integers(0, CAPACITY))
    def reset(self, text_rows: int) -> None:
        self.kv.reset(text_rows)
        self.forget(text_rows)

    @precondition(lambda self: not self.freed)
    @rule(data=st.data())
    def grow_left(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.left_room))
        content = self.fresh(count)
        write(self.kv, self.kv.left(count), content)
        self.kv.grow_left(count)
        self.visual += [content[:, row] for row in range(count)]
        self.active = [True] * len(self.visual)

    @rule(data=st.data())
    def grow_right(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.right_room))
        content = self.fresh(count)
        write(self.kv, self.kv.right(count), content)
        self.kv.grow_right(count)
        self.text += [content[:, row] for row in range(count)]

    @precondition(lambda self: not self.freed)
    @rule(data=st.data())
    def refresh(self, data: st.DataObject) -> None:
        size = len(self.visual)
        active = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), np.bool_)
        before, slots = np.array(self.active, np.bool_), self.kv.slot[:size].copy()
        moved = self.kv.refresh(active)
        if active.sum() == before.sum():  # only the difference moves
            assert moved == (active & ~before).sum()
            np.testing.assert_array_equal(self.kv.slot[:size][active == before], slots[active == before])
        self.active = active.tolist()

    @precondition(lambda self: not self.freed)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.visual)))
        self.kv.evict(count)
        del self.visual[:count], self.active[:count]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.text)))
        self.kv.truncate(count)
        del self.text[count:]

    @precondition(lambda self: not self.freed)
    @rule(quarters=st.integers(-3, 3))
    def rotate(self, quarters: int) -> None:
        """By quarter turns, which are exact: the first half of D trades places with the second."""
        half = self.kv.spec.head_dim // 2
        angles = np.full(half, quarters * np.pi / 2)
        self.kv.rotate(np.cos(angles).round(), np.sin(angles).round())
        for content in self.visual:
            for _ in range(quarters % 4):
                content[::2] = np.concatenate([-content[::2, :, half:], content[::2, :, :half]], -1)

    @precondition(lambda self: not self.freed)
    @rule()
    def free_parked(self) -> None:
        self.kv.free_parked()
        self.freed = True

    @rule(over=st.integers(1, 5))
    def ask_for_too_much(self, over: int) -> None:
        with pytest.raises(KVOverflow) as left:
            self.kv.left(self.left_room + over)
        assert (left.value.needed, left.value.capacity) == (self.CAPACITY + over, self.CAPACITY)
        with pytest.raises(KVOverflow) as right:
            self.kv.right(self.right_room + over)
        assert (right.value.needed, right.value.capacity) == (self.CAPACITY + over, self.CAPACITY)

    @invariant()
    def counts_agree(self) -> None:
        kv = self.kv
        assert (kv.num_visual, kv.num_text, kv.num_active) == (len(self.visual), len(self.text), sum(self.active))
        assert kv.active().tolist() == self.active
        assert (address(kv.slab), address(kv.slot)) == self.base

    @invariant()
    def every_visual_token_is_where_its_slot_says(self) -> None:
        slab = self.slab
        for token, content in enumerate(self.visual):
            planes = slice(2 * self.kv.spec.split_layer) if self.freed and not self.active[token] else slice(None)
            row = int(self.kv.slot[token])
            np.testing.assert_array_equal(slab[planes, row], content[planes])

    @invariant()
    def text_is_in_order_right_of_the_origin(self) -> None:
        slab = self.slab
        for place, content in enumerate(self.text):
            np.testing.assert_array_equal(slab[:, self.kv.origin + place], content)

    @invariant()
    def slices_hold_exactly_what_layers_attend_to(self) -> None:
        kv = self.kv
        text = list(range(kv.origin, kv.origin + len(self.text)))
        slots = kv.slot[: len(self.visual)]
        assert list(range(kv.capacity))[kv.shallow] == sorted(slots.tolist()) + text
        assert list(range(kv.capacity))[kv.deep] == sorted(slots[np.array(self.active, np.bool_)].tolist()) + text


class HalfMachine(Machine):
    """The same in fp16."""

    dtype = "fp16"


class DeviceMachine(Machine):
    """The same in a GPU's memory: kernels exchange the rows and turn the keys."""

    def made(self) -> KVBuffer:
        spec = model_spec(self.dtype)
        return KVBuffer(spec, self.CAPACITY, DeviceRows(self.device(), spec, self.CAPACITY))

    def device(self) -> Device:
        return EmulatedDevice()


class HalfDeviceMachine(DeviceMachine):
    """That in fp16."""

    dtype = "fp16"


class CudaMachine(DeviceMachine):
    """That on a real one."""

    def device(self) -> Device:
        from dycoke_edge.runtime.gpu.cuda import CudaDevice

        return CudaDevice()

    def teardown(self) -> None:
        self.kv.rows.device.close()  # type: ignore[attr-defined]


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
HalfMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase
TestHalfMachine = HalfMachine.TestCase
for one in (DeviceMachine, HalfDeviceMachine, CudaMachine):
    one.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestDeviceMachine = DeviceMachine.TestCase
TestHalfDeviceMachine = HalfDeviceMachine.TestCase
TestCudaMachine = pytest.mark.gpu(pytest.mark.skipif(bool(no_gpu()), reason=no_gpu())(CudaMachine.TestCase))


@pytest.mark.parametrize("where", ["host", "device"])
def test_weights_go_where_their_tokens_go(where: str) -> None:
    spec, size, random = model_spec(), 24, np.random.default_rng(0)
    kv = KVBuffer(spec, size, DeviceRows(EmulatedDevice(), spec, size) if where == "device" else None)
    counts = np.empty((2, 0), np.int64)
    for step in range(300):
        move, room = random.choice(["see", "see", "refresh", "evict", "reset"], p=[0.2, 0.2, 0.3, 0.2, 0.1]), kv.left(0)
        if move == "reset" or not step:
            kv.reset(int(random.integers(1, 12)))
            kv.grow_right(1)
            counts = counts[:, :0]
            assert not kv.weighed and not (isinstance(kv.rows, DeviceRows) and kv.rows.bias)
            continue
        if move == "see":  # what comes changes what older tokens stand for
            coming = int(random.integers(0, room.start + 1))
            counts = random.integers(0, 9, (2, counts.shape[1] + coming))
            kv.weigh(counts[:, : kv.num_visual])
            kv.weigh_next(counts[:, kv.num_visual :])
            kv.grow_left(coming)
        elif move == "evict":
            gone = int(random.integers(0, counts.shape[1] + 1))
            kv.evict(gone)
            counts = counts[:, gone:]
        else:
            kv.refresh(random.random(counts.shape[1]) < 0.5)
        if not kv.weighed:
            continue
        assert kv.counts.tolist() == counts.tolist()
        want = np.zeros((2, size), np.float32)
        want[:, kv.slot[: counts.shape[1]]] = np.log(np.maximum(counts, 1))  # a parked token counts nothing
        np.testing.assert_array_equal(kv.bias(kv.shallow), want[:, kv.shallow])
        np.testing.assert_array_equal(kv.covering(), counts[1] > 0)
        if isinstance(kv.rows, DeviceRows):
            np.testing.assert_array_equal(np.asarray(kv.rows.bias)[:, kv.shallow], want[:, kv.shallow])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_refresh_of_more_rows_than_the_scratch_holds(dtype: Literal["fp32", "fp16"]) -> None:
    count = 2 * host_rows.SWAP_ROWS + 88
    buffer = KVBuffer(model_spec(dtype), 2 * count)
    buffer.reset(text_rows=0)
    content = np.random.default_rng(0).standard_normal((6, 2 * count, 2, 4)).astype(buffer.slab.dtype)
    write(buffer, buffer.left(2 * count), content)
    buffer.grow_left(2 * count)
    assert buffer.refresh(first_of(count, 2 * count)) == count, "the oldest lie farthest left"
    assert buffer.refresh(~first_of(count, 2 * count)) == count
    np.testing.assert_array_equal(buffer.slab[:, buffer.slot], content)


# positions that move


def turned(keys: Array, positions: Array) -> Array:
    """RoPE in fp64. keys: [n, G, D]."""
    half = keys.shape[-1] // 2
    angles = positions[:, None, None] * 1e6 ** -(np.arange(half) / half)
    a, b = keys[..., :half].astype(np.float64), keys[..., half:].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize(("dtype", "worst", "typical"), [("fp32", 2e-6, 3e-7), ("fp16", 3e-3, 7e-4)])
@pytest.mark.parametrize("times", [1, 5])
def test_rotated_keys_are_those_of_the_new_positions(
    dtype: Literal["fp32", "fp16"], worst: float, typical: float, times: int
) -> None:
    """Five is the most often that a live video turns a row. Errors are shares of the largest K."""
    rows, offset = 2 * host_rows.SWAP_ROWS + 88, 6000
    buffer = KVBuffer(model_spec(dtype, head_dim=64), rows + 2)
    buffer.reset(text_rows=2)
    keys = np.random.default_rng(0).standard_normal((rows, 2, 64))
    positions = np.arange(rows) + offset * times
    for layer in range(3):
        buffer.keys(layer, buffer.left(rows))[...] = turned(keys * (layer + 1), positions)
        buffer.values(layer, slice(None))[...] = 7
        buffer.keys(layer, buffer.right(2))[...] = 7
    buffer.grow_left(rows)
    buffer.grow_right(2)
    angles = -offset * 1e6 ** -(np.arange(32) / 32)
    for _ in range(times):
        buffer.rotate(np.cos(angles), np.sin(angles))
    for layer in range(3):
        got = buffer.keys(layer, buffer.shallow)[:rows].astype(np.float64) / (layer + 1)
        error = np.abs(got - turned(keys, np.arange(rows))) / np.abs(keys).max()
        assert error.max() < worst and np.sqrt((error**2).mean()) < typical
        assert (buffer.values(layer, slice(None)) == 7).all(), "V has no positions"
        assert (buffer.keys(layer, slice(rows, None)) == 7).all(), "text stays where it is"


# overflow


def test_overflow_names_numbers_and_an_option_that_works() -> None:
    buffer = KVBuffer(model_spec(), 10)
    buffer.reset(text_rows=4)
    with pytest.raises(KVOverflow, match=r"kv_capacity=10 rows .*--kv-capacity 12") as error:
        buffer.left(8)
    assert "\n" not in str(error.value)
    assert (error.value.needed, error.value.capacity) == (12, 10)
    with pytest.raises(KVOverflow) as error:
        buffer.reset(text_rows=11)
    assert (error.value.needed, error.value.capacity) == (11, 10)


def test_overflow_leaves_the_buffer_as_it_was() -> None:
    buffer = KVBuffer(model_spec(), 10)
    buffer.reset(text_rows=4)
    fill(buffer, visual=5, text=3)
    buffer.refresh(first_of(2, 5))
    before = buffer.slab.copy(), buffer.slot.copy(), buffer.shallow, buffer.deep, buffer.origin
    for grow, count in ((buffer.grow_left, 2), (buffer.grow_right, 2), (buffer.reset, 11)):
        with pytest.raises(KVOverflow):
            grow(count)
    np.testing.assert_array_equal(buffer.slab, before[0])
    np.testing.assert_array_equal(buffer.slot, before[1])
    assert (buffer.shallow, buffer.deep, buffer.origin) == before[2:]
    fill(buffer, visual=1, text=1)  # what does fit, still fits
    assert (buffer.num_visual, buffer.num_text) == (6, 4)


# memory


def use(buffer: KVBuffer, visual: int) -> None:
    """A long use: chunks come in, the kept set turns, old frames go, answers are forgotten."""
    random = np.random.default_rng(0)
    for _ in range(4):
        buffer.reset(text_rows=64)
        for _ in range(8):
            buffer.grow_left(visual // 8)
        for _ in range(10):
            active = np.zeros(visual, np.bool_)
            active[random.permutation(visual)[: visual // 3]] = True
            buffer.refresh(active)
            buffer.grow_right(3)
        buffer.truncate(2)
        buffer.evict(visual // 4)
        buffer.grow_left(visual // 4)


def test_nothing_is_allocated_after_construction() -> None:
    """Bookkeeping only: the bound is two arrays of one int64 a row, a 32nd of one layer's K; a copy of 128 rows would
    be beyond it, and so of what a refresh exchanges at a time."""
    capacity = 4096
    buffer = KVBuffer(model_spec(layers=4, split=2, head_dim=64), capacity)
    one_layer, bound = buffer.keys(0, slice(None)).nbytes, 2 * capacity * 8
    assert (buffer.nbytes, one_layer) == (16 * MB, 32 * bound)
    base = address(buffer.slab), address(buffer.slot)
    use(buffer, visual=3000)  # what numpy imports on first use is not the buffer's
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        use(buffer, visual=3000)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < bound
    assert after - before < 4 * 1024, "and all of it is given back"
    assert (address(buffer.slab), address(buffer.slot)) == base


def resident() -> int:
    """Bytes of this process's own memory that are in RAM."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match.group(1)) * 1024


@pytest.fixture
def large() -> KVBuffer:
    """48 MB in planes of 4 MB: six layers, two of them shallow; 7168 visual rows and 1024 of text, all written."""
    buffer = KVBuffer(model_spec(layers=6, split=2, head_dim=64), 8192)
    buffer.reset(text_rows=1024)
    fill(buffer, visual=7168, text=1024)
    return buffer


def test_rows_never_written_cost_no_memory() -> None:
    before = resident()
    buffer = KVBuffer(model_spec(layers=6, split=2, head_dim=64), 8192)
    assert buffer.nbytes == 48 * MB
    assert resident() - before < 4 * MB


def test_freed_rows_return_to_the_system(large: KVBuffer) -> None:
    row = 2 * 64 * 4
    large.refresh(first_of(1024, 7168))
    parked_bytes = 2 * 4 * (7168 - 1024) * row  # K and V of the four deep layers: 24 MB
    resident_before, live_before = resident(), large.live_nbytes
    assert live_before == 48 * MB
    large.free_parked()
    assert large.freed
    assert live_before - large.live_nbytes == parked_bytes == 24 * MB
    assert abs(resident_before - resident() - parked_bytes) < 2 * MB


def test_freeing_touches_only_parked_rows_of_deep_layers(large: KVBuffer) -> None:
    large.refresh(first_of(1024, 7168))
    large.free_parked()
    parked = slice(large.shallow.start, large.deep.start)
    assert parked == slice(0, 6144)
    assert not large.slab[2 * 2 :, parked].any()
    assert (large.slab[2 * 2 :, large.deep] == 1).all()
    assert (large.slab[: 2 * 2, large.shallow] == 1).all()


def test_reset_gives_everything_back(large: KVBuffer) -> None:
    before = resident()
    large.reset(text_rows=10)
    assert before - resident() > 46 * MB
    assert (large.live_nbytes, large.freed, large.num_visual, large.num_text) == (0, False, 0, 0)
    assert not large.slab.any()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("capacity", [20, 1000, 4099])
def test_after_a_reset_every_row_is_zero(dtype: Literal["fp32", "fp16"], capacity: int) -> None:
    """Also where planes do not end at page borders: 0 x NaN is NaN, and nothing leaks into the next answer."""
    buffer = KVBuffer(model_spec(dtype), capacity)
    buffer.reset(text_rows=capacity // 2)
    fill(buffer, visual=capacity - capacity // 2, text=capacity // 2, value=np.nan)
    buffer.reset(text_rows=3)
    assert not buffer.slab.any()


def test_a_freed_buffer_can_be_used_again_after_a_reset() -> None:
    buffer = KVBuffer(model_spec(), 10)
    buffer.reset(text_rows=4)
    fill(buffer, visual=6, text=2)
    buffer.refresh(first_of(2, 6))
    buffer.free_parked()
    buffer.grow_right(1)  # text still comes
    buffer.reset(text_rows=4)
    fill(buffer, visual=6, text=4)
    assert buffer.refresh(first_of(3, 6)) == 3


def test_live_bytes_count_rows_in_use() -> None:
    buffer = KVBuffer(model_spec(layers=3, split=1), 20)
    buffer.reset(text_rows=5)
    row = 2 * 2 * 4 * 4  # K and V, G, D, fp32
    fill(buffer, visual=8, text=3)
    assert buffer.live_nbytes == 3 * row * 11
    buffer.refresh(first_of(2, 8))
    assert buffer.live_nbytes == 3 * row * 11, "parked rows count until they are given back"
    buffer.free_parked()
    assert buffer.live_nbytes == row * (11 + 2 * 5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_one_token_is_as_large_as_the_contract_says(dtype: Literal["fp32", "fp16"]) -> None:
    buffer = KVBuffer(model_spec(dtype), 10)
    assert buffer.nbytes == 10 * buffer.spec.kv_bytes_per_token
