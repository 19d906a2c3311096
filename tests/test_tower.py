"""The vision tower's own kernels, each against numpy, and the whole against the encoder written in numpy."""

from __future__ import annotations

import math
from ctypes import c_float, c_int32
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dycoke_edge.export.vision import pooling_matrix
from dycoke_edge.runtime.gpu.device import Device, DeviceArray
from dycoke_edge.runtime.gpu.kernels import BLOCK, suffix, warps

Array = NDArray[Any]
TYPES = [np.float32, np.float16]


def close(dtype: Any) -> float:
    return 4e-3 if dtype == np.float16 else 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("patch", "side", "size"), [(8, 4, 32), (14, 3, 45)])
def test_patches_are_what_a_convolution_sees(device: Device, patch: int, side: int, size: int, dtype: Any) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(dtype)
    depth = -(-3 * patch**2 // 8) * 8
    out = DeviceArray.empty(device, (2, side**2, depth), dtype)
    grid, sizes = (-(-(side**2) * depth // BLOCK), 2, 1), map(c_int32, (size, patch, side, depth))
    device.kernel(f"patches_{suffix(dtype)}", grid, BLOCK, DeviceArray.of(device, pixels), out, *sizes)()
    unfolded = torch.nn.functional.unfold(torch.from_numpy(pixels.astype(np.float32)), patch, stride=patch)
    found = out.numpy()
    np.testing.assert_array_equal(found[..., : 3 * patch**2], unfolded.transpose(1, 2).numpy())
    assert not found[..., 3 * patch**2 :].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (9, 160), (17, 1152), (3, 2048)])
def test_layer_norm(device: Device, rows: int, width: int, dtype: Any) -> None:
    random = np.random.default_rng(width)
    x = (random.standard_normal((rows, width)) * 3 + 5).astype(dtype)
    gain, bias = random.standard_normal((2, width)).astype(dtype)
    out = DeviceArray.empty(device, (rows, width), dtype)
    given = [DeviceArray.of(device, array) for array in (x, gain, bias)]
    sizes = c_int32(rows), c_int32(width)
    device.kernel(f"layer_norm_{suffix(dtype)}", warps(rows), BLOCK, *given, c_float(1e-6), out, *sizes)()
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.numpy(), normed * gain + bias, rtol=close(dtype), atol=close(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("each", [8, 5000])
def test_places_are_added_to_every_frame(device: Device, each: int, dtype: Any) -> None:
    random = np.random.default_rng(each)
    x, offset = random.standard_normal((3, each)).astype(dtype), random.standard_normal(each).astype(dtype)
    given = DeviceArray.of(device, x)
    grid = -(-each * np.dtype(dtype).itemsize // (16 * BLOCK)), 3, 1
    args = given, DeviceArray.of(device, offset), c_int32(each)
    device.kernel(f"add_places_{suffix(dtype)}", grid, BLOCK, *args)()
    np.testing.assert_allclose(given.numpy(), x.astype(np.float32) + offset, rtol=close(dtype), atol=close(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("side", "near"), [(27, 0), (14, 1), (5, 0), (1, 0)])
def test_pooling_of_gelu(device: Device, side: int, near: int, dtype: Any) -> None:
    half, width = -(-side // 2), 24
    x = np.random.default_rng(side).standard_normal((2, side**2, width)).astype(dtype) * 3
    out = DeviceArray.empty(device, (2, half**2, width), dtype)
    sizes = map(c_int32, (side, half, width, near))
    device.kernel(f"gelu_pool_{suffix(dtype)}", (1, half**2, 2), BLOCK, DeviceArray.of(device, x), out, *sizes)()
    wide = x.astype(np.float64)
    inner = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    act = wide / 2 * (1 + (inner if near else np.vectorize(math.erf)(wide / math.sqrt(2))))
    want = pooling_matrix(side).numpy() @ act
    np.testing.assert_allclose(out.numpy(), want, rtol=close(dtype), atol=close(dtype))
