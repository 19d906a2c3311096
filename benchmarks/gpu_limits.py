"""The floor under every stage: operations over the measured matrix rate, bytes over the measured copy bandwidth.

Fewest operations and bytes, whoever computes: weights are read once, causal attention looks at half of the pairs, of
the last layer only one row is wanted. The larger of the two times is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage has to do."""

    flop: float
    nbytes: float

    def seconds(self, ceilings: Line) -> float:
        """The limit."""
        return float(max(self.flop / ceilings["matmul_flop_per_s"], self.nbytes / ceilings["copy_bytes_per_s"]))


@dataclass(frozen=True)
class Floors:
    """Of a model by its config.json, and bytes of a number."""

    config: Line
    itemsize: int

    def vision(self, frames: int) -> Work:
        """The tower, the projector on every patch, pooling not counted."""
        v, e = self.config["vision_config"], self.config["text_config"]["hidden_size"]
        h, m, layers = v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"]
        patches, pixels = (v["image_size"] // v["patch_size"]) ** 2, 3 * v["patch_size"] ** 2
        weights = layers * (4 * h * h + 2 * h * m) + pixels * h + h * e + e * e
        attention = layers * 4 * patches * patches * h
        flop = frames * (2 * patches * weights + attention)
        inputs, outputs = 3 * v["image_size"] ** 2, -(-patches // 4) * e
        return Work(flop, self.itemsize * (weights + frames * (inputs + outputs)))

    def prefill(self, rows: int) -> Work:
        """`rows` tokens of a prompt."""
        t = self.config["text_config"]
        layers, dim = t["num_hidden_layers"], self._dim
        new = self._kv_weights + self._mixing_weights
        flop = (layers - 1) * (2 * rows * new + 2 * rows * (rows + 1) * t["num_attention_heads"] * dim)
        flop += 2 * rows * self._kv_weights
        stored = layers * 2 * rows * t["num_key_value_heads"] * dim
        return Work(flop, self.itemsize * (layers * new + self._head + stored))

    def step(self, rows: float, hidden: float, split_layer: int) -> Work:
        """One token behind `rows` of which the layers from the cut on do not see `hidden`."""
        t = self.config["text_config"]
        layers, row = t["num_hidden_layers"], 2 * t["num_key_value_heads"] * self._dim
        read = row * (layers * rows - (layers - split_layer) * hidden)
        weights = layers * (self._kv_weights + self._mixing_weights) + self._head
        attended = read / row * 4 * t["num_attention_heads"] * self._dim
        return Work(2 * weights + attended, self.itemsize * (weights + read))

    @property
    def _dim(self) -> int:
        t = self.config["text_config"]
        return int(t["hidden_size"] // t["num_attention_heads"])

    @property
    def _kv_weights(self) -> int:
        t = self.config["text_config"]
        return int(2 * t["hidden_size"] * t["num_key_value_heads"] * self._dim)

    @property
    def _mixing_weights(self) -> int:
        """Of a layer, what comes after K and V: queries, output, MLP."""
        t = self.config["text_config"]
        return int(2 * t["hidden_size"] ** 2 + 3 * t["hidden_size"] * t["intermediate_size"])

    @property
    def _head(self) -> int:
        t = self.config["text_config"]
        return int(t["hidden_size"] * t["vocab_size"])


def reached(found: Line, floors: Floors, ceilings: Line, case: Line) -> Line:
    """Limit in seconds and the share of it that a side reached, a stage."""
    rows = found["rows"] + case["new_tokens"] / 2
    works = {
        "vision": floors.vision(case["frames"]),
        "prefill": floors.prefill(found["rows"]),
        "inter_token": floors.step(rows, found["visual"] - found["active"], case["split_layer"]),
    }
    limits = {name: work.seconds(ceilings) for name, work in works.items()}
    return {name: {"limit": limit, "reached": limit / found[name]["median"]} for name, limit in limits.items()}
