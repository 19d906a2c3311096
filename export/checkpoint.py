"""Reads a Hugging Face LLaVA-OneVision directory: config, preprocessing, tokenizer, and weights by canonical name.

Checkpoints name tensors in several ways: the hub and transformers 4.5x write `language_model.model.layers...` and
`vision_tower.vision_model...`, transformers 5 drops `vision_model`, and in-memory models begin with `model.`. Here a
tensor has one name: `layers.0...`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, `vision_tower...`,
`multi_modal_projector...`, `image_newline`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.exporters.tasks import TasksManager
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from dycoke_edge.bundle import Knows
from dycoke_edge.config import DType
from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import InputError, UsageError
from dycoke_edge.export.shipped import check_there

MODEL_TYPE = "llava_onevision"
DTYPES = ("F32", "F16", "BF16", "F64")  # of safetensors; other ones are quantised
TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16}
_RENAMES = (
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", ""),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)


def canonical(name: str) -> str:
    """The one name of a tensor, whichever transformers saved it."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class Checkpoint:
    """An opened model directory. `tensor` maps weights from disk; nothing is loaded before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self.task = _task(self.config)
        self._where = {canonical(name): (file, name) for file, name in _tensor_files(path)}
        self._check_weights()
        self.pixels = _read_preprocessing(path, self.config.vision_config.image_size)

    @property
    def random_seed(self) -> int | None:
        """Set when the project made this checkpoint with random weights."""
        seed = getattr(self.config, "dycoke_edge_random_seed", None)
        return None if seed is None else int(seed)

    @property
    def knows(self) -> Knows | None:
        """Set for a model of one small domain: what that is, and questions to try."""
        told = getattr(self.config, "dycoke_edge_knows", None)
        try:
            return None if told is None else Knows.model_validate(told)
        except ValidationError:
            raise InputError(
                f"{self.path / 'config.json'}: dycoke_edge_knows must be what (a text) and questions (texts)"
            ) from None

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; one that two tensors share counts twice, as a bundle holds it twice."""
        return sum(math.prod(shape) for shape in _shapes(self.config).values())

    def _check_weights(self) -> None:
        """InputError for a weight that is missing, quantised or of another shape than config.json means."""
        for name, shape in _shapes(self.config).items():
            if name == "lm_head.weight" and self.tied:
                continue
            file, key = self._find(name)
            with safe_open(file, "pt") as tensors:
                found, dtype = list(tensors.get_slice(key).get_shape()), tensors.get_slice(key).get_dtype()
            if found != shape:
                raise InputError(
                    f"weight {key!r} in {file} has shape {found}, not {shape} as config.json; fetch both again"
                )
            if dtype not in DTYPES:
                raise InputError(f"weight {key!r} in {file} is {dtype}; give a checkpoint in fp32, fp16 or bf16")

    @property
    def tied(self) -> bool:
        """The output matrix is the embedding table and not stored apart."""
        return "lm_head.weight" not in self._where and bool(self.config.text_config.tie_word_embeddings)

    def _find(self, name: str) -> tuple[Path, str]:
        if name not in self._where:
            raise InputError(f"{self.path} has no weight {name!r}; the checkpoint is incomplete, fetch it again")
        return self._where[name]

    def tensor(self, name: str, dtype: DType = "fp32") -> torch.Tensor:
        """A weight by canonical name; InputError if it is missing, damaged or not finite in `dtype`."""
        if name == "lm_head.weight" and self.tied:
            name = "embed_tokens.weight"
        file, key = self._find(name)
        try:
            with safe_open(file, "pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(key).to(TORCH_DTYPE[dtype])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); fetch it again") from None
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"weight {key!r} in {file} has NaN or infinite values in {dtype}; {_remedy(dtype)}")
        return tensor

    def spec(self, dtype: DType, split_layer: int) -> ModelSpec:
        """The dimensions of the bundle; UsageError if the cut is not between two layers."""
        text, vision = self.config.text_config, self.config.vision_config
        if not 1 <= split_layer < text.num_hidden_layers:
            raise UsageError(
                f"split_layer={split_layer} (--split-layer) must be between 1 and {text.num_hidden_layers - 1} "
                f"for this model of {text.num_hidden_layers} layers, e.g. --split-layer 3"
            )
        side = -(-(vision.image_size // vision.patch_size) // 2)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return ModelSpec(
            dtype=dtype,
            image_size=vision.image_size,
            tokens_per_frame=side * side,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=text.vocab_size,
            rope_theta=_rope_theta(text),
            max_positions=text.max_position_embeddings,
            split_layer=split_layer,
        )


def _shapes(config: Any) -> dict[str, list[int]]:
    """The shape of every weight that the model of a configuration has, by canonical name."""
    with torch.device("meta"):
        state = transformers.LlavaOnevisionForConditionalGeneration(config).state_dict()
    return {canonical(name): list(tensor.shape) for name, tensor in state.items()}


def _remedy(dtype: DType) -> str:
    return "try --dtype fp32" if dtype == "fp16" else "fetch the checkpoint again"


def _read_config(path: Path) -> Any:
    file = path / "config.json"
    check_there(path)
    found = read_json(file).get("model_type", "none")
    if found != MODEL_TYPE:
        raise InputError(f"{file} says model type {found!r}; dycoke-edge exports {MODEL_TYPE!r} with qwen2 and siglip")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises several classes for values that it does not know
        raise InputError(f"{file} cannot be used ({' '.join(str(error).split())[:300]}); fetch it again") from None
    kinds = (config.text_config.model_type, config.vision_config.model_type)
    if kinds != ("qwen2", "siglip_vision_model"):
        raise InputError(
            f"{file} says text and vision model types {kinds}; only qwen2 with siglip_vision_model is known"
        )
    if config.vision_feature_select_strategy != "full" or not isinstance(config.vision_feature_layer, int):
        raise InputError(f"{file}: only vision_feature_select_strategy 'full' with one vision_feature_layer is known")
    if getattr(config.text_config, "use_sliding_window", False):
        raise InputError(f"{file}: use_sliding_window is not supported; set it to false")
    return config


def _task(config: Any) -> str:
    """The export task optimum knows the architecture by, e.g. image-text-to-text."""
    architecture = (config.architectures or ["LlavaOnevisionForConditionalGeneration"])[0]
    return str(TasksManager.infer_task_from_model(getattr(transformers, architecture)))


def _rope_theta(text: Any) -> float:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"rope type {kind!r} in config.json is not supported; only 'default' is")
    return float(rope.get("rope_theta") or text.rope_theta)


def _tensor_files(path: Path) -> list[tuple[Path, str]]:
    """(file, tensor name) of every weight, sharded or not."""
    found = []
    for file in (path / name for name in _file_names(path)):
        if not file.is_file():
            raise InputError(f"{file} is missing; dycoke-edge reads safetensors weights, fetch the checkpoint again")
        try:
            with safe_open(file, "pt") as tensors:
                found += [(file, key) for key in tensors.keys()]  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); fetch it again") from None
    return found


def _file_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file() or not index.is_file():  # the order of transformers
        return ["model.safetensors"]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index} has no weight_map; fetch it again")
    names = sorted({str(name) for name in where.values()})
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is not a file beside it; fetch it again")
    return names


def _read_preprocessing(path: Path, image_size: int) -> dict[str, Any]:
    """The video preprocessing of a checkpoint, from the file that its transformers version writes."""
    places = (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", None),
        ("preprocessor_config.json", None),
    )
    for name, key in places:
        data = read_json(path / name) if (path / name).is_file() else {}
        data = data.get(key, {}) if key else data
        if "image_mean" in data:
            return _check_preprocessing(path / name, data, image_size)
    raise InputError(f"{path} has no preprocessor_config.json with image_mean; copy it from the original model")


def _check_preprocessing(file: Path, data: dict[str, Any], image_size: int) -> dict[str, Any]:
    size = data.get("size", {})
    if not isinstance(size, dict) or (size.get("height"), size.get("width")) != (image_size, image_size):
        raise InputError(f"{file}: size {size} is not the {image_size} x {image_size} of the vision tower")
    if data.get("resample", 3) != 3 or data.get("do_center_crop"):
        raise InputError(f"{file}: only bicubic resampling (3) without centre crop is known")
    for name in ("image_mean", "image_std"):
        values: Any = data.get(name)
        if not isinstance(values, list) or [isinstance(value, (int, float)) for value in values] != [True] * 3:
            raise InputError(f"{file}: {name} must be three numbers, not {values}")
    if abs(data.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise InputError(f"{file}: rescale_factor must be 1/255")
    return data


def read_text(file: Path) -> str:
    """A text file; InputError if it is not one."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if it is not one."""
    text = read_text(file)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{file} is not a JSON object; fetch it again")
    return data
