"""The vision encoder in numpy, in fp64, from a bundle's table of weights: what kernels for it are held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import VisionTable
from dycoke_edge.export.vision import pooling_matrix

Array = NDArray[Any]


def weights_of(bundle: Bundle) -> dict[str, Array]:
    """Every weight of the table by its name, as it lies in its file."""
    dtype, found = np.dtype(bundle.model.numpy_dtype), {}
    for name, placed in bundle.vision_table().weights.items():
        content = (bundle.path / "onnx" / placed.file).read_bytes()
        array = np.frombuffer(content, dtype, math.prod(placed.shape), placed.offset)
        found[name] = array.reshape(placed.shape)
    return found


def encode(table: VisionTable, weights: Mapping[str, Array], pixels: Array) -> Array:
    """pixels [F, 3, R, R] -> tokens fp64 [F, N, hidden]."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def linear(x: Array, name: str) -> Array:
        product: Array = x @ w[f"{name}.weight"] + w[f"{name}.bias"]
        return product

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + table.epsilon)
        whole: Array = scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
        return whole

    x = patches(table, pixels.astype(np.float64)) @ w["patch.weight"].T + w["patch.offset"]
    for i in range(table.layers):
        at, normed = f"layers.{i}", norm(x, f"layers.{i}.norm1")
        q, k, v = (split(linear(normed, f"{at}.{part}"), table) for part in "qkv")
        context = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(table.head_dim)) @ v
        x = x + linear(context.swapaxes(1, 2).reshape(x.shape), f"{at}.out")
        inner = gelu(linear(norm(x, f"{at}.norm2"), f"{at}.fc1"), "gelu_pytorch_tanh")
        x = x + linear(inner, f"{at}.fc2")
    projected = gelu(linear(x, "projector.1"), table.projector_act)
    return linear(pooling_matrix(table.side).double().numpy() @ projected, "projector.2")  # its rows add up to 1


def patches(table: VisionTable, pixels: Array) -> Array:
    """[F, 3, R, R] -> [F, side^2, 3 P P]; what is left at the right and at the bottom is not seen."""
    side, patch, whole = table.side, table.patch, table.side * table.patch
    cells = pixels[:, :, :whole, :whole].reshape(-1, 3, side, patch, side, patch)
    found: Array = cells.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), side**2, -1)
    return found


def split(x: Array, table: VisionTable) -> Array:
    """[F, S, H D] -> [F, H, S, D]."""
    found: Array = x.reshape(len(x), -1, table.heads, table.head_dim).swapaxes(1, 2)
    return found


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def gelu(x: Array, kind: str) -> Array:
    """As torch has it under that name."""
    near = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    found: Array = x / 2 * (1 + (near if kind == "gelu_pytorch_tanh" else np.vectorize(math.erf)(x / math.sqrt(2))))
    return found
