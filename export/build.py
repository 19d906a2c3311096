"""Turns a checkpoint into a bundle: graphs, embedding table, tokenizer files, manifest; checked, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dycoke_edge import __version__, contract
from dycoke_edge.bundle import EMBED, EXAMPLE, FORMAT_VERSION, MANIFEST, WEIGHTS, Manifest, list_files, sealed
from dycoke_edge.config import ExportSpec
from dycoke_edge.contract import ModelSpec
from dycoke_edge.errors import BundleError, UsageError
from dycoke_edge.export import tokenizer
from dycoke_edge.export.checkpoint import Checkpoint
from dycoke_edge.export.decoder import write_decoders
from dycoke_edge.export.parity import ParityCheck, refuse_bad
from dycoke_edge.export.shipped import named
from dycoke_edge.export.vision import load_vision, write_merge, write_vision
from dycoke_edge.parity import Parity
from dycoke_edge.partial import partial

Progress = Callable[[str, float], None]  # what is done now, share of the whole in 0..1


def export(
    model_dir: str | Path,
    bundle_dir: str | Path,
    spec: ExportSpec = ExportSpec(),  # noqa: B008 - frozen
    on_progress: Progress = lambda what, share: None,
    on_parity: Callable[[Parity], None] = lambda parity: None,
) -> Manifest:
    """Export a LLaVA-OneVision directory to a bundle folder, which must not exist yet.

    Everything is written to `.<name>.partial` beside it, checked against torch, and renamed; on any failure nothing is
    left. Raises InputError (checkpoint), UsageError (options), BundleError (parity, disk).
    """
    target = Path(bundle_dir)
    if os.path.lexists(target):
        raise UsageError(f"{target} exists already; choose another BUNDLE folder or remove this one")
    checkpoint = Checkpoint(named(model_dir))
    model = checkpoint.spec(spec.dtype, spec.split_layer)
    ratios = _merge_ratios(spec)
    with partial(target, "export", "choose another BUNDLE") as folder:
        (folder / "onnx").mkdir()
        _check_room(folder, checkpoint, model)
        tokens = tokenizer.write(folder, checkpoint)
        if (checkpoint.path / EXAMPLE).is_file():
            shutil.copyfile(checkpoint.path / EXAMPLE, folder / EXAMPLE)
        _write(folder, checkpoint, model, ratios, on_progress, on_parity)
        manifest = _manifest(checkpoint, model, ratios, tokens, folder)
        on_progress("hashing", 0.97)
        manifest = manifest.model_copy(update={"files": list_files(folder)})
        (folder / MANIFEST).write_text(sealed(manifest.model_dump(mode="json")))
        folder.rename(target)
    on_progress("done", 1.0)
    return manifest


def _merge_ratios(spec: ExportSpec) -> tuple[float, ...]:
    for ratio in spec.merge_ratio:
        if abs(ratio * 100 - round(ratio * 100)) > 1e-9:
            raise UsageError(f"merge_ratio={ratio} (--merge-ratio) must have two decimals at most, e.g. 0.7")
    return tuple(sorted({round(ratio, 2) for ratio in spec.merge_ratio}))


def _check_room(folder: Path, checkpoint: Checkpoint, model: ModelSpec) -> None:
    """Refuse at once when the weights alone cannot fit."""
    needed = checkpoint.num_parameters * np.dtype(model.numpy_dtype).itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder.parent} has {free / 2**20:,.0f} MiB free, the bundle needs {needed / 2**20:,.0f} MiB; "
            "free some space, choose another BUNDLE or use --dtype fp16"
        )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    model: ModelSpec,
    ratios: tuple[float, ...],
    on_progress: Progress,
    on_parity: Callable[[Parity], None],
) -> None:
    onnx_dir, results = folder / "onnx", list[Parity]()
    check = ParityCheck(onnx_dir, checkpoint, model)

    def keep(found: Iterator[Parity]) -> None:
        for parity in found:
            results.append(parity)
            on_parity(parity)

    on_progress("vision", 0.0)
    encoder = load_vision(checkpoint, model.dtype)
    write_vision(onnx_dir, encoder, model)
    on_progress("checking vision", 0.2)
    keep(check.vision(encoder))
    del encoder
    for ratio in ratios:
        if contract.needs_merge_graph(model, ratio):
            on_progress(contract.merge_name(ratio), 0.3)
            write_merge(onnx_dir, model, ratio)
            keep(check.merge(ratio))
    _write_decoder(folder, checkpoint, model, on_progress)
    on_progress("checking decoder", 0.8)
    keep(check.decoders())
    refuse_bad(results)


def _write_decoder(folder: Path, checkpoint: Checkpoint, model: ModelSpec, on_progress: Progress) -> None:
    done = 0

    def layer_done() -> None:
        nonlocal done
        done += 1
        on_progress(f"decoder layer {done} of {model.num_layers}", 0.35 + 0.4 * done / model.num_layers)

    def read(name: str) -> Any:
        return checkpoint.tensor(name, model.dtype).numpy()

    config = checkpoint.config.text_config
    placed = write_decoders(folder / "onnx", model, read, config.rms_norm_eps, layer_done)
    table = contract.WeightTable(rms_eps=config.rms_norm_eps, tied=checkpoint.tied, weights=placed)
    (folder / WEIGHTS).write_text(table.model_dump_json() + "\n")
    _write_embedding(folder / EMBED, read("embed_tokens.weight"), read("image_newline"))


def _write_embedding(file: Path, table: NDArray[Any], newline: NDArray[Any]) -> None:
    """The table with the newline as its last row. Not through a memory map: a full disk would be a bus error."""
    shape = (len(table) + 1, table.shape[1])
    with file.open("wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": np.lib.format.dtype_to_descr(table.dtype), "fortran_order": False, "shape": shape}
        )
        out.write(np.ascontiguousarray(table).data)
        out.write(np.ascontiguousarray(newline).data)


def _manifest(
    checkpoint: Checkpoint, model: ModelSpec, ratios: tuple[float, ...], tokens: tokenizer.Tokens, folder: Path
) -> Manifest:
    pixels = checkpoint.pixels
    return Manifest(
        format_version=FORMAT_VERSION,
        made_by=f"dycoke-edge {__version__}",
        family="llava_onevision",
        task=checkpoint.task,
        model=model,
        merge_ratios=ratios,
        image_mean=tuple(pixels["image_mean"]),
        image_std=tuple(pixels["image_std"]),
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        newline_id=model.vocab_size,
        stop_token_ids=tokens.stop,
        random_seed=checkpoint.random_seed,
        knows=checkpoint.knows,
        files={},
    )
