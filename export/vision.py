"""The graphs that are traced: the vision encoder (tower, projector, 2x2 pooling) and merge.

The tower is transformers' own SigLIP with written-out attention; the projector and the pooling are LLaVA-OneVision's.
In fp16 bundles layer norms run as fp32 islands (softmax already does), since TensorRT's fp16 SigLIP loses accuracy
without (NVIDIA/TensorRT issues 3908, 4493).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from optimum.utils import DummyVisionInputGenerator, NormalizedVisionConfig
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN

from dycoke_edge import contract
from dycoke_edge.bundle import VISION_WEIGHTS
from dycoke_edge.config import DType
from dycoke_edge.contract import ModelSpec
from dycoke_edge.dycoke import kept_per_frame
from dycoke_edge.export.checkpoint import TORCH_DTYPE, Checkpoint
from dycoke_edge.export.forms import write_cuda, write_tensorrt
from dycoke_edge.export.graph import align, finish
from dycoke_edge.export.tower import table_of


class VisionEncoder(nn.Module):
    """pixels [F, 3, R, R] -> visual tokens [F, N, E]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        make: Any = AutoModel.from_config
        self.vision_tower = make(config.vision_config, attn_implementation="eager")
        self.layer = config.vision_feature_layer
        self.depth = range(config.vision_config.num_hidden_layers + 1)[self.layer]  # layers up to there
        wide, narrow = config.vision_config.hidden_size, config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.multi_modal_projector = nn.ModuleDict(
            {"linear_1": nn.Linear(wide, narrow, bias=bias), "linear_2": nn.Linear(narrow, narrow, bias=bias)}
        )
        self.act = ACT2FN[config.projector_hidden_act]
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.register_buffer("pool", pooling_matrix(side), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.vision_tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        hidden = self.act(self.multi_modal_projector["linear_1"](hidden))
        pooled: torch.Tensor = self.pool @ self.multi_modal_projector["linear_2"](hidden)
        return pooled


def pooling_matrix(side: int) -> torch.Tensor:
    """Bilinear 2x2 pooling of a side x side grid as a matrix [N, side * side].

    Pooling is a fixed linear map: as one MatMul with a constant it needs no Resize, no layout change, and is the same
    in fp16 on every engine (27 x 27 -> 14 x 14 in LLaVA-OneVision).
    """
    half = -(-side // 2)
    basis = torch.eye(side * side).view(side * side, 1, side, side)
    pooled = nn.functional.interpolate(basis, size=(half, half), mode="bilinear")
    return pooled.view(side * side, half * half).T.contiguous()


class Fp32LayerNorm(nn.Module):
    """A layer norm computed in fp32 inside an fp16 graph."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(x.float()).to(x.dtype)
        return result


def load_vision(checkpoint: Checkpoint, dtype: DType) -> VisionEncoder:
    """The vision encoder with the checkpoint's weights, mapped from disk where the dtype allows."""
    with torch.device("meta"):
        encoder = VisionEncoder(checkpoint.config)
    state = {}
    for name in encoder.state_dict():
        source = name.replace("vision_tower.vision_model.", "vision_tower.")
        state[name] = checkpoint.tensor(source, dtype)
    encoder.load_state_dict(state, assign=True)
    _fill_buffers(encoder, checkpoint.config)
    if dtype == "fp16":
        _norms_in_fp32(encoder)
    return encoder.eval().requires_grad_(False)


def _fill_buffers(encoder: VisionEncoder, config: Any) -> None:
    """Buffers are not in checkpoints: make them again off the meta device."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    encoder.pool = pooling_matrix(side).to(next(encoder.multi_modal_projector.parameters()).dtype)
    for module in encoder.vision_tower.modules():
        if "position_ids" in module._buffers:
            module.register_buffer("position_ids", torch.arange(side * side).expand((1, -1)), persistent=False)


def _norms_in_fp32(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, Fp32LayerNorm(child))
        else:
            _norms_in_fp32(child)


class Merge(nn.Module):
    """reference, frame [B, N, E] -> kept [B, m, E], index [B, m] int32: the m least similar tokens, in raster order."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, reference: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = reference.float(), frame.float()
        norms = torch.sqrt((a * a).sum(-1)) * torch.sqrt((b * b).sum(-1))
        similarity = (a * b).sum(-1) / torch.clamp(norms, min=torch.finfo(torch.float32).tiny)
        chosen = torch.topk(similarity, self.kept, dim=-1, largest=False).indices
        # sorted through fp32, exact below 2**24: TensorRT 8.6 ranks int32 in fp32 anyway
        raster = torch.topk(chosen.float(), self.kept, dim=-1, largest=False).values
        index = raster.to(torch.int64)
        kept = torch.gather(frame, 1, index.unsqueeze(-1).expand(-1, -1, frame.shape[-1]))
        return kept, index.to(torch.int32)


def write_vision(folder: Path, encoder: VisionEncoder, spec: ModelSpec) -> None:
    """Trace the encoder into vision.onnx, and write the forms of it that GPU engines run and where its weights are."""
    shape = NormalizedVisionConfig(encoder.config.vision_config)
    dummy = DummyVisionInputGenerator("image-text-to-text", shape, batch_size=2)
    pixels = dummy.generate("pixel_values", framework="pt", float_dtype=spec.dtype)
    _trace(folder, encoder, (pixels,), contract.vision(spec))
    vision = folder / "vision.onnx"
    write_cuda(vision, folder / f"{contract.FORMS['vision', 'cuda']}.onnx", encoder.depth)
    write_tensorrt(vision, folder / f"{contract.FORMS['vision', 'tensorrt']}.onnx", encoder.depth)
    table = table_of(folder, encoder, spec)
    if table is not None:
        (folder.parent / VISION_WEIGHTS).write_text(table.model_dump_json() + "\n")


def write_merge(folder: Path, spec: ModelSpec, merge_ratio: float) -> None:
    """Trace merge for one ratio."""
    shape = (2, spec.tokens_per_frame, spec.hidden_size)
    frames = tuple(torch.rand(shape).to(TORCH_DTYPE[spec.dtype]) for _ in range(2))
    kept = kept_per_frame(spec.tokens_per_frame, merge_ratio)
    _trace(folder, Merge(kept), frames, contract.merge(spec, merge_ratio))


def _trace(folder: Path, module: nn.Module, inputs: tuple[torch.Tensor, ...], spec: contract.Graph) -> None:
    """Run the torch exporter; the first dimension of every input is the dynamic one."""
    path = folder / f"{spec.name}.onnx"
    first = torch.export.Dim(str(spec.inputs[0].shape[0]))
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        for logger in loggers:
            logger.setLevel(logging.ERROR)  # it logs the fall from opset 18 to 17, which `finish` proves
        try:
            torch.onnx.export(
                module,
                inputs,
                path,
                dynamo=True,
                external_data=spec.name == "vision",  # merge has no weights
                verbose=False,
                opset_version=contract.OPSET,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=tuple({0: first} for _ in inputs),
            )
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    model = onnx.load(path, load_external_data=False)
    assert [o.version for o in model.opset_import if o.domain == ""] == [contract.OPSET], model.opset_import
    if path.with_name(path.name + ".data").exists():
        align(model, path)
    finish(model, path, spec)
