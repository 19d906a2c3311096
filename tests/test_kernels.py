"""Kernels alone, at sizes that no tiny model has: long caches, other head sizes, many visual tokens, ties."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_void_p
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge.dycoke import KeepPolicy
from dycoke_edge.runtime.gpu.decode import ATTEND_BLOCK, CHOOSE_BLOCK
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.flash import FLASH_BLOCK, frames_dim, queries
from dycoke_edge.runtime.gpu.kernels import suffix
from dycoke_edge.runtime.gpu.rows import NULL, DeviceRows
from dycoke_edge.runtime.gpu.state import PART, STATE
from dycoke_edge.runtime.kv import KVBuffer
from tests.test_kv import model_spec

Array = NDArray[Any]


def stated(device: Device, **values: float) -> DeviceArray:
    state = np.zeros(1, STATE)
    for name, value in values.items():
        state[name] = value
    return DeviceArray.of(device, state.view(np.uint8))


def read(state: DeviceArray) -> Any:
    return state.numpy().view(STATE)[0]


@pytest.mark.parametrize(("cached", "weighed"), [(0, False), (1, True), (31, False), (200, True), (700, False)])
@pytest.mark.parametrize(("dim", "dtype", "heads"), [(64, "f2", 14), (128, "f2", 7), (64, "f4", 6), (128, "f4", 8)])
def test_attention_is_softmax_over_all_rows(
    device: Device, dim: int, dtype: str, heads: int, cached: int, weighed: bool
) -> None:
    groups = 1 if heads == 7 else 2
    group, capacity, parts, position = heads // groups, 800, 9, 37
    random = np.random.default_rng(cached)
    slab = DeviceArray.of(device, random.standard_normal((2, capacity, groups, dim)).astype(dtype))
    before = slab.numpy().astype(np.float32)
    qkv = random.standard_normal((heads + 2 * groups, dim)).astype(np.float32)
    qkv[:heads] /= dim**0.5
    inverse = (1e-3 ** (np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    turn = np.concatenate((np.cos(position * inverse), np.sin(position * inverse))).astype(np.float32)
    state = stated(device, origin=400, num_visual=cached // 2, num_text=cached - cached // 2)
    context = DeviceArray.empty(device, (heads, dim), dtype)
    scores = DeviceArray.empty(device, (heads, capacity), np.float32)
    softmax = DeviceArray.empty(device, (heads * PART.itemsize,), np.uint8)
    sums = DeviceArray.empty(device, (parts * heads * dim,), np.float32)
    split = DeviceArray.empty(device, (parts * heads * PART.itemsize,), np.uint8)
    tickets = DeviceArray.empty(device, (groups,), np.int32)
    bias = random.uniform(0, 3, capacity).astype(np.float32) * weighed
    given = [state, DeviceArray.of(device, qkv), DeviceArray.of(device, turn), slab[0], slab[1]]
    added = DeviceArray.of(device, bias) if weighed else NULL
    pointers = [*given, added, context, sums, split, tickets, scores, softmax]
    name = f"attend_f{'16' if dtype == 'f2' else '32'}_{dim}"
    sizes = c_int32(group), c_int32(capacity), c_int32(0)
    launch = device.kernel(name, (parts, groups, 1), ATTEND_BLOCK, *pointers, *sizes)
    for _ in range(2):  # the second finds the tickets as the first did
        launch()
    turned = rotated(qkv[: heads + groups], position * inverse)
    first, row = 400 - cached // 2, 400 + cached - cached // 2
    keys, values = before[0, first:row], before[1, first:row]
    keys = np.concatenate((keys, turned[heads:].astype(dtype).astype(np.float32)[None]))
    values = np.concatenate((values, qkv[heads + groups :].astype(dtype).astype(np.float32)[None]))
    np.testing.assert_allclose(slab.numpy()[0, row], keys[-1], atol=2e-3 if dtype == "f2" else 1e-5)
    np.testing.assert_array_equal(slab.numpy()[1, row], values[-1].astype(dtype))
    want = np.einsum("hd,shd->hs", turned[:heads], np.repeat(keys, group, 1)) + bias[first : row + 1]
    weight = np.exp(want - want.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    np.testing.assert_allclose(scores.numpy()[:, : cached + 1], want, atol=5e-3 if dtype == "f2" else 1e-4)
    whole = softmax.numpy().view(PART)
    np.testing.assert_allclose(np.exp(want - whole["most"][:, None]) / whole["total"][:, None], weight, atol=1e-3)
    out = np.einsum("hs,shd->hd", weight, np.repeat(values, group, 1))
    np.testing.assert_allclose(context.numpy(), out, atol=5e-3 if dtype == "f2" else 1e-5)


def rotated(rows: Array, angle: Array) -> Array:
    half = rows.shape[-1] // 2
    a, b = rows[..., :half], rows[..., half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)


def weights_of(count: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Attention with many ties, as rounding makes them."""
    return (random.integers(0, max(2, count // 3), count) / count).astype(np.float32)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 33, 1024, 1025, 3000])
def test_the_kept_set_and_its_rows_are_those_of_the_host(device: Device, count: int, ratio: float) -> None:
    spec, random = model_spec(head_dim=16), np.random.default_rng(count)
    host, own = KVBuffer(spec, count + 8), KVBuffer(spec, count + 8, rows := DeviceRows(device, spec, count + 8))
    for kv in (host, own):
        kv.reset(8)
        kv.grow_left(count)
    content = random.standard_normal(host.slab.shape).astype(np.float32)
    host.slab[...], rows.slab[...] = content, content
    policy = KeepPolicy(count, ratio)
    state = stated(device, keep=1, num_keep=policy.num_active, origin=host.origin, num_visual=count, num_active=count)
    rows.decide(own.slot[:count])
    counts = random.integers(1, 9, (2, count))
    for kv in (host, own):
        kv.weigh(counts)
    assert rows.bias is not None
    attention, lists = DeviceArray.empty(device, (count,), np.float32), DeviceArray.empty(device, (2, count), np.int32)
    chosen = [state, attention, rows.slot, lists[0], lists[1], rows.pairs]
    choose = device.kernel("choose", 1, CHOOSE_BLOCK, *(array.pointer for array in chosen))
    swaps = STATE.fields["swaps"][1] if STATE.fields else 0
    exchange = rows.exchange(state[swaps : swaps + 4])
    for step in range(3):
        weight = weights_of(count, random)
        policy._previous = None  # every step chooses
        active = policy.step(weight)
        moved = host.refresh(active) if policy.refreshed else 0
        now = read(state)
        device.upload(state.address, turned(now).view(np.uint8))
        attention[...] = weight
        choose()
        exchange()
        now = read(state)
        assert (now["swaps"], bool(now["refreshed"]), now["num_active"]) == (moved, policy.refreshed, host.num_active)
        np.testing.assert_array_equal(rows.slot[:count].numpy(), host.slot[:count])
        np.testing.assert_array_equal(rows.slab.numpy(), host.slab)
        np.testing.assert_array_equal(rows.bias.numpy()[:, :count], host.bias(slice(0, count)))
        assert step or count < 3 or ratio in (0.0, 1.0) or moved


def turned(state: Any) -> Array:
    """The same state in a step whose attention turned."""
    fresh = np.array([state], STATE)
    fresh["turned"], fresh["swaps"], fresh["refreshed"] = 1, 0, 0
    return fresh


@pytest.mark.parametrize("count", [1, 50, 5000])
def test_what_tokens_weigh_and_whether_it_turned(device: Device, count: int) -> None:
    heads, capacity, random = 3, count + 4, np.random.default_rng(0)
    state = stated(device, keep=1, first=1, origin=capacity - 2, num_visual=count, threshold=0.9)
    slot = random.permutation(count)
    scores = random.standard_normal((heads, capacity)).astype(np.float32)
    softmax = np.zeros(heads, PART)
    softmax["most"], softmax["total"] = 3.0, random.uniform(1, 2, heads)
    attention = DeviceArray.empty(device, (count,), np.float32)
    partial, ticket = DeviceArray.empty(device, (9,), np.float32), DeviceArray.empty(device, (1,), np.int32)
    of = DeviceArray.of
    first = capacity - 2 - count
    given = of(device, scores), of(device, softmax.view(np.uint8)), of(device, (slot + first).astype(np.int32))
    pointers = [array.pointer for array in (state, *given, attention, partial, ticket)]
    weigh = device.kernel("weigh", 3, 256, *pointers, c_int32(heads), c_int32(capacity))
    want = (np.exp(scores[:, slot] - 3.0) / softmax["total"][:, None]).mean(0)
    for turned_now in (True, False):  # the first step, and one with the same attention
        weigh()
        assert bool(read(state)["turned"]) == turned_now
        np.testing.assert_allclose(attention.numpy(), want, rtol=1e-5)
    if count > 1:
        given[0][...] = np.ascontiguousarray(scores[:, ::-1] * 3)
        weigh()
        assert read(state)["turned"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(5, 8), (37, 264), (9, 1032)])
def test_products_with_one_token(device: Device, dtype: type[np.floating], shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    random = np.random.default_rng(1)
    x = random.standard_normal(inputs).astype(np.float32)
    gain, bias = random.uniform(0.5, 1.5, inputs).astype(dtype), random.standard_normal(outputs).astype(dtype)
    matrix = random.standard_normal((2 * outputs, inputs)).astype(dtype) / np.dtype(dtype).type(inputs**0.5)
    suffix, eps = "f16" if dtype == np.float16 else "f32", 1e-6
    out, act = DeviceArray.empty(device, (outputs,), np.float32), DeviceArray.empty(device, (outputs,), dtype)
    of = [DeviceArray.of(device, array) for array in (x, gain, matrix, bias)]
    sizes, shared = (c_int32(inputs), c_int32(outputs)), inputs * np.dtype(dtype).itemsize
    normed = (x / np.sqrt((x * x).mean() + eps)).astype(dtype) * gain
    product = matrix.astype(np.float32) @ normed.astype(np.float32)
    tolerance = 2e-2 if dtype == np.float16 else 1e-5
    args = of[0].pointer, of[1].pointer, c_float(eps), of[2].pointer
    blocks = -(-outputs // 8)
    device.kernel(f"norm_project_{suffix}", blocks, 256, *args, of[3].pointer, out.pointer, *sizes, shared=shared)()
    np.testing.assert_allclose(out.numpy(), product[:outputs] + bias, atol=tolerance)
    device.kernel(f"norm_project_{suffix}", blocks, 256, *args, c_void_p(0), out.pointer, *sizes, shared=shared)()
    np.testing.assert_allclose(out.numpy(), product[:outputs], atol=tolerance)
    device.kernel(f"gate_up_{suffix}", blocks, 256, *args, act.pointer, *sizes, shared=shared)()
    gate, up = product[:outputs], product[outputs:]
    np.testing.assert_allclose(act.numpy(), gate / (1 + np.exp(-gate)) * up, atol=tolerance)
    before, vector = out.numpy(), DeviceArray.of(device, normed.astype(dtype))
    device.kernel(f"add_project_{suffix}", blocks, 256, vector.pointer, of[2].pointer, out.pointer, *sizes)()
    np.testing.assert_allclose(out.numpy(), before + product[:outputs], atol=tolerance)


@pytest.mark.parametrize("size", [1, 300, 20000])
def test_the_largest_logit_and_the_lower_of_two(device: Device, size: int) -> None:
    random = np.random.default_rng(2)
    logits = np.round(random.standard_normal(size)).astype(np.float32)  # so that many share the first place
    given, state = DeviceArray.of(device, logits), stated(device)
    ring = DeviceArray.empty(device, (4, 32), np.uint8)
    best, ids = DeviceArray.empty(device, (8,), np.float32), DeviceArray.empty(device, (8,), np.int32)
    ticket = DeviceArray.empty(device, (1,), np.int32)
    pointers = [array.pointer for array in (best, ids, ticket, state, ring)]
    pick = device.kernel("pick", 8, 256, given.pointer, c_int32(size), *pointers, c_int32(4), c_int32(1))
    pick()
    now = read(state)
    assert (now["token"], now["step"], now["position"], now["num_text"]) == (logits.argmax(), 1, 1, 1)
    record = ring.numpy()[0].view(np.int32)
    assert (record[0], record[4]) == (logits.argmax(), 1)
    for bad in (np.nan, np.inf):
        logits[size // 2] = bad
        given[...] = logits
        pick()
        assert ring.numpy()[read(state)["step"] - 1].view(np.int32)[4] == 0


@pytest.mark.parametrize(("cached", "weighed"), [(0, False), (3, True), (64, False), (200, True), (0, True)])
@pytest.mark.parametrize(("tokens", "left"), [(1, 0), (1, 1), (70, 70), (70, 0), (131, 100), (300, 299), (140, 1)])
@pytest.mark.parametrize(("dim", "dtype"), [(32, "f2"), (64, "f2"), (128, "f2"), (64, "f4")])
def test_attention_of_many_tokens(
    device: Device, dim: int, dtype: str, tokens: int, left: int, cached: int, weighed: bool
) -> None:
    heads, groups = 4, 2
    columns, width, random = cached + tokens, (heads + 2 * groups) * dim, np.random.default_rng(tokens)
    qkv = (random.standard_normal((tokens, width)) / dim**0.25).astype(dtype)
    keys, values = random.standard_normal((2, columns, groups, dim)).astype(dtype)
    context = DeviceArray.empty(device, (tokens, heads, dim), dtype)
    bias = random.uniform(0, 3, columns).astype(np.float32) * weighed
    arrays = [DeviceArray.of(device, array) for array in (qkv, keys, values)]
    added = DeviceArray.of(device, bias) if weighed else NULL
    sizes = map(c_int32, (width, tokens, columns, left, heads, groups))
    grid = heads, -(-tokens // queries(np.dtype(dtype), dim)), 1
    device.kernel(f"attend_rows_{suffix(np.dtype(dtype))}_{dim}", grid, FLASH_BLOCK, *arrays, added, context, *sizes)()
    number = np.full(columns, -1)  # of the new token that a column is
    number[:left], number[left + cached :] = np.arange(left), np.arange(left, tokens)
    hidden = number[None] > np.arange(tokens)[:, None]
    keys, values = (np.repeat(rows, heads // groups, 1) for rows in (keys, values))
    query = qkv[:, : heads * dim].reshape(tokens, heads, dim)
    np.testing.assert_allclose(
        context.numpy(), attention(query, keys, values, bias, hidden), atol=5e-3 if dtype == "f2" else 1e-5
    )


def attention(
    query: Array, keys: Array, values: Array, bias: Array | float = 0.0, hidden: Array | None = None
) -> Array:
    """[T, H, D] of queries [T, H, D] over keys and values [S, H, D] with bias [S], but for hidden [T, S], in fp32."""
    query, keys, values = (array.astype(np.float32) for array in (query, keys, values))
    scores = np.einsum("thd,shd->hts", query, keys) + bias
    if hidden is not None:
        scores[:, hidden] = -np.inf
    weight = np.exp(scores - scores.max(2, keepdims=True))
    return np.asarray(np.einsum("hts,shd->thd", weight / weight.sum(2, keepdims=True), values))


@pytest.mark.parametrize("patches", [1, 64, 150, 729])
@pytest.mark.parametrize(("dim", "dtype"), [(16, "f2"), (40, "f2"), (64, "f2"), (72, "f2"), (96, "f2"), (72, "f4")])
def test_attention_in_frames(device: Device, dim: int, dtype: str, patches: int) -> None:
    frames, heads, random = 2, 3, np.random.default_rng(patches)
    qkv = (4 * random.standard_normal((frames, patches, 3, heads, dim)) / dim**0.25).astype(dtype)
    context = DeviceArray.empty(device, (frames, patches, heads, dim), dtype)
    of, scale = np.dtype(dtype), dim**-0.5
    grid = -(-patches // queries(of, kernel_dim := frames_dim(of, dim))), heads, frames
    sizes = c_int32(patches), c_int32(heads), c_int32(dim), c_float(scale)
    given = DeviceArray.of(device, qkv)
    device.kernel(f"attend_frames_{suffix(of)}_{kernel_dim}", grid, FLASH_BLOCK, given, context, *sizes)()
    for frame in range(frames):
        query, keys, values = (qkv[frame, :, i] for i in range(3))
        want = attention(query.astype(np.float32) * scale, keys, values)
        np.testing.assert_allclose(context.numpy()[frame], want, atol=1e-2 if dtype == "f2" else 1e-5)


@pytest.mark.parametrize("rise", [-30.0, 0.0, 2.0, 7.0, 30.0])
def test_attention_whose_scores_rise_from_tile_to_tile(device: Device, rise: float) -> None:
    patches, dim, random = 500, 64, np.random.default_rng(5)
    qkv = random.standard_normal((1, patches, 3, 1, dim)).astype("f2")
    qkv[0, :, 0, 0, 0] = 4.0
    qkv[0, :, 1, 0, 0] = rise / 4 * np.arange(patches) / 64  # nats a tile of 64 keys
    context = DeviceArray.empty(device, (1, patches, 1, dim), "f2")
    grid = -(-patches // queries(np.dtype("f2"), dim)), 1, 1
    given, sizes = DeviceArray.of(device, qkv), (c_int32(patches), c_int32(1), c_int32(dim), c_float(1.0))
    device.kernel("attend_frames_f16_64", grid, FLASH_BLOCK, given, context, *sizes)()
    want = attention(*(qkv[0, :, i] for i in range(3)))
    np.testing.assert_allclose(context.numpy()[0], want, atol=1e-2)
