"""The vision encoder as kernels of our own and a library's matrix products: SigLIP's tower, LLaVA-OneVision's projector
and pooling. Bias, GELU and residual are in the products; attention keeps no scores in memory."""

from __future__ import annotations

from ctypes import c_float, c_int32
from dataclasses import dataclass

import numpy as np

from dycoke_edge.bundle import Bundle
from dycoke_edge.contract import Placed
from dycoke_edge.errors import EngineError
from dycoke_edge.runtime.gpu.device import Argument, CudaGraph, Device, DeviceArray
from dycoke_edge.runtime.gpu.flash import FLASH_BLOCK, FRAMES_DIMS, frames_dim, queries
from dycoke_edge.runtime.gpu.kernels import BLOCK, VECTOR, suffix, warps
from dycoke_edge.runtime.gpu.stored import Stored

MOST_GRAPHS = 8  # numbers of frames that are launched at once
MOST_WIDE = 2048  # of rows that kernels/tower.cu norms


@dataclass(frozen=True)
class Linear:
    """A matrix [out, in] and a bias [out]."""

    matrix: DeviceArray
    bias: DeviceArray


@dataclass(frozen=True)
class Norm:
    """A layer norm's gain and bias [E]."""

    gain: DeviceArray
    bias: DeviceArray


@dataclass(frozen=True)
class Layer:
    """One layer of the tower."""

    norm1: Norm
    qkv: Linear  # [3 E, E]
    out: Linear  # [E, E]
    norm2: Norm
    fc1: Linear  # [mlp, E]
    fc2: Linear  # [E, mlp]


class Tower:
    """pixels [B, 3, R, R] -> tokens [B, N, hidden]. Weights are uploaded once; scratch memory is for the largest B."""

    def __init__(self, device: Device, bundle: Bundle) -> None:
        """BundleError for files that do not fit, EngineError for a tower that the kernels do not cover."""
        table, self.spec = bundle.vision_table(), bundle.model
        self.device, self.table, self.dtype = device, table, np.dtype(self.spec.numpy_dtype)
        self._suffix, self._rows = suffix(self.dtype), table.side**2
        self.half = -(-table.side // 2)
        self._check()
        stored, weights = Stored(device, bundle), table.weights
        kernel = np.asarray(stored.read(weights["patch.weight"]))
        width = VECTOR // self.dtype.itemsize
        self._depth = -(-kernel.shape[1] // width) * width  # of a patch, in whole vectors
        self.patch = DeviceArray.of(device, np.pad(kernel, ((0, 0), (0, self._depth - kernel.shape[1]))))
        self.places = stored.vector(weights["patch.offset"])  # [side * side, E]
        self.layers = [self._layer(stored, weights, f"layers.{i}") for i in range(table.layers)]
        self.first, self.second = (_linear(stored, weights, f"projector.{i}") for i in (1, 2))
        self._scratch: dict[str, DeviceArray] = {}
        self._graphs: dict[int, CudaGraph | None] = {}  # by B; None after the first time

    def run(self, pixels: DeviceArray, tokens: DeviceArray) -> None:
        """Encode B frames; returns before it is done."""
        self._reserve(frames := len(pixels))
        rows, hidden = frames * self._rows, self.spec.hidden_size
        patches, grid = self._of("wide", rows, self._depth), (-(-self._rows * self._depth // BLOCK), frames, 1)
        sizes = self.spec.image_size, self.table.patch, self.table.side, self._depth
        self._launch("patches", grid, pixels, patches, *map(c_int32, sizes))
        self._middle(frames)
        pooled = self._of("normed", frames * self.half**2, hidden)
        self.device.product(pooled, self.second.matrix, tokens.reshape(-1, hidden), bias=self.second.bias)

    def _middle(self, frames: int) -> None:
        """What is in scratch memory only, some 180 kernels and products: in one launch from the second time on, for a
        camera's frames come one by one."""
        graph = self._graphs.get(frames)
        if graph is None and frames in self._graphs:
            with self.device.capture() as graph:
                self._encode(frames)
        if graph is None:
            self._encode(frames)
        else:
            graph.launch()
        self._graphs[frames] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def _encode(self, frames: int) -> None:
        """Patches to pooled rows."""
        table, rows, product = self.table, frames * self._rows, self.device.product
        patches, x = self._of("wide", rows, self._depth), self._of("x", rows, table.width)
        product(patches, self.patch, x)
        each = self._rows * table.width
        self._launch("add_places", (self._vectors(each), frames, 1), x, self.places, c_int32(each))
        for layer in self.layers:
            self._run_layer(layer, x, frames)
        hidden, act = self.spec.hidden_size, int(table.projector_act != "gelu")
        projected, pooled = self._of("wide", rows, hidden), self._of("normed", frames * self.half**2, hidden)
        product(x, self.first.matrix, projected, bias=self.first.bias)
        grid = self._vectors(hidden), self.half**2, frames
        sizes = table.side, self.half, hidden, act
        self._launch("gelu_pool", grid, projected, pooled, *map(c_int32, sizes))

    def _run_layer(self, layer: Layer, x: DeviceArray, frames: int) -> None:
        table, rows, product = self.table, len(x), self.device.product
        normed, qkv = self._of("normed", rows, table.width), self._of("wide", rows, 3 * table.width)
        inner = self._of("wide", rows, table.mlp)
        self._norm(layer.norm1, x, normed)
        product(normed, layer.qkv.matrix, qkv, bias=layer.qkv.bias)
        self._attend(qkv, normed, frames)
        product(normed, layer.out.matrix, x, 1.0, bias=layer.out.bias)
        self._norm(layer.norm2, x, normed)
        product(normed, layer.fc1.matrix, inner, bias=layer.fc1.bias, gelu=True)
        product(inner, layer.fc2.matrix, x, 1.0, bias=layer.fc2.bias)

    def _norm(self, norm: Norm, x: DeviceArray, out: DeviceArray) -> None:
        rows, width = x.shape
        args = x, norm.gain, norm.bias, c_float(self.table.epsilon), out, c_int32(rows), c_int32(width)
        self._launch("layer_norm", warps(rows), *args)

    def _attend(self, qkv: DeviceArray, context: DeviceArray, frames: int) -> None:
        heads, dim = self.table.heads, self.table.head_dim
        kernel = frames_dim(self.dtype, dim)
        grid = -(-self._rows // queries(self.dtype, kernel)), heads, frames
        args = qkv, context, c_int32(self._rows), c_int32(heads), c_int32(dim), c_float(dim**-0.5)
        self.device.kernel(f"attend_frames_{self._suffix}_{kernel}", grid, FLASH_BLOCK, *args)()

    def _reserve(self, frames: int) -> None:
        """Scratch memory: the residual, what goes into products, what comes out of the wide ones."""
        rows, width, hidden = frames * self._rows, self.table.width, self.spec.hidden_size
        widest = max(3 * width, self.table.mlp, self._depth, hidden)
        sizes = {"x": rows * width, "normed": max(rows * width, frames * self.half**2 * hidden), "wide": rows * widest}
        for name, size in sizes.items():
            if name not in self._scratch or self._scratch[name].size < size:
                self._graphs.clear()  # they have addresses in them
                self._scratch.pop(name, None)
                self._scratch[name] = DeviceArray.empty(self.device, (size,), self.dtype)

    def _of(self, name: str, rows: int, width: int) -> DeviceArray:
        """A view [rows, width] of scratch memory, in which nothing else is needed any more."""
        return self._scratch[name][: rows * width].reshape(rows, width)

    def _vectors(self, elements: int) -> int:
        """Blocks of threads that take a vector each."""
        return -(-elements * self.dtype.itemsize // (VECTOR * BLOCK))

    def _launch(self, name: str, grid: int | tuple[int, int, int], *args: Argument | DeviceArray) -> None:
        self.device.kernel(f"{name}_{self._suffix}", grid, BLOCK, *args)()

    def _check(self) -> None:
        table, width = self.table, VECTOR // self.dtype.itemsize
        sizes = {"width": table.width, "MLP": table.mlp, "projector": self.spec.hidden_size, "head": table.head_dim}
        wrong = [f"{name} {size}" for name, size in sizes.items() if size % (8 if name == "head" else width)]
        if table.width > MOST_WIDE:
            wrong.append(f"width {table.width}")
        if table.head_dim > FRAMES_DIMS[-1]:
            wrong.append(f"head {table.head_dim}")
        if wrong:
            raise EngineError(
                f"the CUDA kernels are not made for a vision tower with {', '.join(wrong)}; use --vision graph"
            )

    def _layer(self, stored: Stored, weights: dict[str, Placed], at: str) -> Layer:
        return Layer(
            _norm(stored, weights, f"{at}.norm1"),
            _linear(stored, weights, *(f"{at}.{part}" for part in "qkv")),
            _linear(stored, weights, f"{at}.out"),
            _norm(stored, weights, f"{at}.norm2"),
            _linear(stored, weights, f"{at}.fc1"),
            _linear(stored, weights, f"{at}.fc2"),
        )


def _linear(stored: Stored, weights: dict[str, Placed], *names: str) -> Linear:
    """Linear layers of one input as one."""
    matrices, biases = ([weights[f"{name}.{part}"] for name in names] for part in ("weight", "bias"))
    return Linear(stored.matrix(*matrices), stored.vector(*biases))


def _norm(stored: Stored, weights: dict[str, Placed], name: str) -> Norm:
    return Norm(stored.vector(weights[f"{name}.weight"]), stored.vector(weights[f"{name}.bias"]))
