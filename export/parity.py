"""Checks every exported graph against torch on random input, before a bundle is kept.

The decoder's reference is transformers' own Qwen2 layers, loaded one at a time in fp32, so a check needs the memory
of one layer. What is compared against is not our graph code but the model people know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, Cache

from dycoke_edge import contract
from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import BundleError
from dycoke_edge.export.checkpoint import TORCH_DTYPE, Checkpoint
from dycoke_edge.export.vision import Merge, VisionEncoder
from dycoke_edge.parity import CACHED, NEW, TOLERANCE, Parity, compare, run_on_cpu, worst_of

Array = NDArray[Any]


class ParityCheck:
    """Runs the graphs of a bundle folder on the CPU and compares."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, spec: ModelSpec, seed: int = 0) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.spec = spec
        self.tolerance = TOLERANCE[spec.dtype]
        self.random = torch.Generator().manual_seed(seed)

    def vision(self, encoder: VisionEncoder, frames: int = 2) -> Iterator[Parity]:
        """Check the vision encoder, in all its forms, on random pixels in [-1, 1].

        The CPU computes fp16 graphs in fp32: what a GPU's fp16 kernels do is checked there, by `build` and `verify`.
        """
        size = self.spec.image_size
        pixels = (torch.rand(frames, 3, size, size, generator=self.random) * 2 - 1).to(self._dtype)
        want = encoder(pixels)
        for graph in ("vision", *contract.FORMS.values()):
            yield self._parity(graph, "tokens", self._run(graph, {"pixels": pixels.numpy()})[0], want)

    def merge(self, merge_ratio: float) -> Iterator[Parity]:
        """Check merge on a random frame pair."""
        graph = contract.merge(self.spec, merge_ratio)
        shape = (3, self.spec.tokens_per_frame, self.spec.hidden_size)
        pair = [torch.randn(shape, generator=self.random).to(self._dtype) for _ in range(2)]
        got = self._run(graph.name, {"reference": pair[0].numpy(), "frame": pair[1].numpy()})
        kept = graph.outputs[0].shape[1]
        assert isinstance(kept, int)
        for name, a, b in zip(("kept", "index"), got, Merge(kept)(*pair), strict=True):
            yield self._parity(graph.name, name, a, b)

    def decoders(self) -> Iterator[Parity]:
        """Check both decoder graphs on random embeddings: S rows cached, T new ones."""
        rows = CACHED + NEW
        embeds = torch.randn(rows, self.spec.hidden_size, generator=self.random) * self._embed_std()
        embeds = embeds.to(self._dtype)
        want = TorchDecoder(self.checkpoint, self.spec).run(embeds.float())
        cos, sin = want.cos.to(self._dtype).numpy(), want.sin.to(self._dtype).numpy()
        mask = np.zeros((NEW, rows), np.float32)
        mask[:, CACHED:][np.triu_indices(NEW, 1)] = contract.MASKED
        common = {"cos": cos[CACHED:], "sin": sin[CACHED:], "mask": mask}
        yield from self._decoder("decoder_shallow", {"embeds": embeds[CACHED:].numpy(), **common}, want)
        hidden = want.hidden[CACHED:].to(self._dtype).numpy()
        yield from self._decoder("decoder_deep", {"hidden": hidden, **common}, want)

    def _decoder(self, name: str, feeds: dict[str, Array], want: TorchRun) -> Iterator[Parity]:
        graph = {g.name: g for g in contract.graphs(self.spec, ())}[name]
        cached = [t.name for t in graph.inputs if t.shape[0] == "S"]
        feeds |= {key: want.rows[key][:CACHED].to(self._dtype).numpy() for key in cached}
        for tensor, got in zip(graph.outputs, self._run(name, feeds), strict=True):
            key = tensor.name.removeprefix("new_")
            reference = {"hidden": want.hidden[CACHED:], "attention": want.attention, "logits": want.logits}.get(key)
            yield self._parity(name, tensor.name, got, want.rows[key][CACHED:] if reference is None else reference)

    @property
    def _dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.spec.dtype]

    def _embed_std(self) -> float:
        newline = self.checkpoint.tensor("image_newline")
        return float(newline.std()) or 1.0

    def _parity(self, graph: str, output: str, got: Array, want: torch.Tensor) -> Parity:
        return compare(graph, output, got, want.detach().double().numpy(), self.tolerance)

    def _run(self, graph: str, feeds: dict[str, Array]) -> list[Array]:
        try:
            return run_on_cpu(self.folder / f"{graph}.onnx", feeds, self.spec.dtype)
        except Exception as error:  # onnxruntime raises a class of its own per status code
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"onnxruntime cannot run {graph}.onnx: {reason}; please report this model") from None


@dataclass
class TorchRun:
    """What torch computed for S+T rows: fp32 tensors."""

    cos: torch.Tensor  # [S+T, D/2]
    sin: torch.Tensor
    hidden: torch.Tensor  # [S+T, E] after layer L-1
    attention: torch.Tensor  # [T, S+T] head mean of layer L-1, the last T rows
    logits: torch.Tensor  # [1, V]
    rows: dict[str, torch.Tensor]  # k_i, v_i [S+T, G, D]


class TorchDecoder:
    """transformers' Qwen2, a layer of it in memory at a time: as whole models of one layer, whose public names stay."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.config = _of_one_layer(checkpoint.config.text_config)

    def run(self, embeds: torch.Tensor) -> TorchRun:
        """Run all layers on embeds [S+T, E] with a causal mask."""
        rows, half = len(embeds), self.spec.head_dim // 2
        x = embeds[None]
        kv: dict[str, torch.Tensor] = {}
        hidden = attention = cos = sin = torch.empty(0)
        for i in range(self.spec.num_layers):
            model = self._layer(i)
            cos, sin = model.rotary_emb(x, torch.arange(rows)[None])
            with torch.no_grad():
                given = model(inputs_embeds=x, use_cache=True, output_attentions=True)
            x = given.last_hidden_state
            keys, values = _cached(given)
            kv |= {f"k_{i}": keys[0].transpose(0, 1), f"v_{i}": values[0].transpose(0, 1)}
            if i == self.spec.split_layer - 1:
                hidden, attention = x[0], given.attentions[0][0].mean(0)[-NEW:]
        return TorchRun(cos[0, :, :half], sin[0, :, :half], hidden, attention, self._logits(x[0, -1:]), kv)

    def _layer(self, i: int) -> Any:
        """The model of layer i alone, without the norm at the end."""
        make: Any = AutoModel.from_config
        with torch.device("meta"):
            model = make(self.config, attn_implementation="eager")
        model.norm = torch.nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(self.config)  # its buffers are in no checkpoint
        state = {name: self._weight(f"layers.{i}.{name}") for name in model.layers[0].state_dict()}
        model.layers[0].load_state_dict(state, assign=True)
        return model.eval()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        scale, head = self._weight("norm.weight"), self._weight("lm_head.weight")
        normed = torch.nn.functional.rms_norm(x, scale.shape, scale, self.config.rms_norm_eps)
        return normed @ head.T

    def _weight(self, name: str) -> torch.Tensor:
        """A weight as the bundle rounds it, in fp32."""
        return self.checkpoint.tensor(name, self.spec.dtype).float()


def _of_one_layer(config: Any) -> Any:
    """The configuration of a model of one layer and no vocabulary; its attention is written out."""
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # else each is warned of
    values = config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 1} | no_ids
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:1]
    return type(config)(**values)


def _cached(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, G, S+T, D] of the only layer, whatever a transformers calls them."""
    layer: Any = next(value for value in given.values() if isinstance(value, Cache)).layers[0]
    return layer.keys, layer.values


def refuse_bad(results: list[Parity]) -> None:
    """BundleError naming the worst output if any is out of tolerance."""
    worst = worst_of(results)
    if worst is not None:
        raise BundleError(
            f"{worst.graph}: {worst.output} differs from torch by {worst.relative:.2g} relative, "
            f"more than {worst.tolerance:g}; no bundle was written, please report this model"
        )
