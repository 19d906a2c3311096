"""What users get wrong: one line that names the option or file and a way out, the right exit code, and no damage."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dycoke_edge import Clip, Compression, EngineSpec, Sampling, VideoLLM, errors
from dycoke_edge.bundle import MANIFEST, open_bundle, sealed
from dycoke_edge.config import ExportSpec
from dycoke_edge.errors import BundleError, EngineError, InputError, KVOverflow, UsageError
from dycoke_edge.export import build, checkpoint
from dycoke_edge.export.decoder import write_decoders
from dycoke_edge.export.vision import write_vision
from dycoke_edge.parity import TOLERANCE
from dycoke_edge.runtime.images import NoImage
from tests import clips
from tests.commands import Argument, Outcome, apart, files, here, python

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]
USE, INPUT, BUNDLE = 2, 3, 4  # exit codes
EMBED = "onnx/embed_tokens.npy"
TOKENIZER, TEMPLATE, CONFIG = "tokenizer.json", "chat_template.jinja", "config.json"
WEIGHTS, PIXELS = "model.safetensors", "video_preprocessor_config.json"


def refused(outcome: Outcome, code: int, *words: str) -> str:
    assert outcome.code == code, outcome
    for word in words:
        assert word in outcome.complaint, (word, outcome.complaint)
    return outcome.complaint


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips, good and bad."""
    folder = tmp_path_factory.mktemp("media")
    clips.write_clip(folder / "good.mp4", frames=24)
    clips.cut(folder / "good.mp4", 0.5)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("a line of text\n" * 200)
    clips.sound_only(folder / "sound.mp4")
    clips.no_frames(folder / "none.avi")
    Image.fromarray(clips.mark(9)).save(folder / "a.png")
    return folder


# run: use


@pytest.mark.parametrize(
    ("code", "words", "options"),
    [
        (INPUT, ("missing.mp4 (--video) does not exist", "check"), ("--video", "{}/missing.mp4")),
        (INPUT, ("empty.mp4 (--video) is empty", "again"), ("--video", "{}/empty.mp4")),
        (INPUT, ("cut-good.mp4 (--video)", "cannot be read"), ("--video", "{}/cut-good.mp4")),
        (INPUT, ("sound.mp4 (--video)", "no video stream"), ("--video", "{}/sound.mp4")),
        (INPUT, ("none.avi (--video)", "no video frames"), ("--video", "{}/none.avi")),
        (INPUT, ("(--video) is a folder", "give one file"), ("--video", "{}")),
        (INPUT, ("text.mp4 (--video)", "cannot be read"), ("--video", "{}/text.mp4")),
        (INPUT, ("text.mp4 (--image)", "JPEG"), ("--image", "{}/text.mp4")),
        (USE, ("--video", "--image", "one of them"), ("--video", "{}/good.mp4", "--image", "{}/a.png")),
        (USE, ("--video was given 2 times", "one is supported"), ("--video", "a", "--video", "b")),
        (USE, ("--prompt", "empty", "What happens?"), ("--prompt", "")),
        (USE, ("--prompt", "empty", "What happens?"), ("--prompt", " \n\t")),
        (USE, ("--prompt", "2 places", "leave one"), ("--video", "{}/good.mp4", "--prompt", "<video> <video>")),
        (USE, ("--prompt", "none was given", "--video"), ("--prompt", "<video> what?")),
        (USE, ("--merge-ratio", "between 0 and 1", "0.7"), ("--merge-ratio", "1.5")),
        (USE, ("--merge-ratio", "between 0 and 1"), ("--merge-ratio", "-0.1")),
        (USE, ("--merge-ratio", "must be a number", "0.7"), ("--merge-ratio", "nan")),
        (USE, ("--merge-ratio", "lots", "run --help"), ("--merge-ratio", "lots")),
        (USE, ("--merge-ratio", "0 0.3 0.5 0.7 0.9", "export"), ("--video", "{}/good.mp4", "--merge-ratio", "0.6")),
        (USE, ("--prune-ratio", "between 0 and 1"), ("--prune-ratio", "2")),
        (USE, ("--start", "behind the end", "2.00 s", "--start 0"), ("--video", "{}/good.mp4", "--start", "9")),
        (USE, ("end=1 (--end)", "later than", "start=2 (--start)"), ("--start", "2", "--end", "1")),
        (USE, ("--num-frames", "between 1 and", "32"), ("--num-frames", "0")),
        (USE, ("--fps", "between 0.001"), ("--fps", "0")),
        (USE, ("--threads", "between 0 and 1024"), ("--threads", "-1")),
        (USE, ("--mode", "paper", "official"), ("--mode", "fast")),
        (USE, ("--mode", "5 or more frames"), ("--video", "{}/good.mp4", "--num-frames", "4", "--mode", "official")),
        (USE, ("--provider", "cpu", "cuda", "tensorrt"), ("--provider", "cuda9")),
        (USE, ("decoder='captured' (--decoder)", "--provider cuda", "graphs"), ("--decoder", "captured")),
        (USE, ("--sped", "--help"), ("--sped", "1")),
        (USE, ("--max-new-tokens", "between 1 and"), ("--max-new-tokens", "0")),
        (USE, ("32768", "positions"), ("--prompt", "x" * 33000, "--kv-capacity", "40000")),
        (USE, ("--kv-capacity", "between 2 and"), ("--kv-capacity", "1000000000000")),
    ],
)
def test_run(
    capsys: Capture, tiny_bundle: Path, media: Path, code: int, words: tuple[str, ...], options: tuple[str, ...]
) -> None:
    before = files(tiny_bundle)
    prompt = () if "--prompt" in options else ("--prompt", "What?")
    outcome = here(capsys, "run", tiny_bundle, *prompt, *(option.format(media) for option in options))
    refused(outcome, code, *words)
    assert files(tiny_bundle) == before


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (("exprot", "export"), ("exprot",)),
        (("BUNDLE",), ("run",)),
        (("--prompt", "run --help"), ("run", "b")),
        (("--josn", "--help"), ("doctor", "--josn")),
        (("--num-frames", "between 1 and"), ("inspect", "b", "--num-frames", "0")),
        (("--dtype", "fp32", "fp16"), ("export", "m", "b", "--dtype", "int8")),
        (("--merge-ratio", "between 0 and 1"), ("export", "m", "b", "--merge-ratio", "1.5")),
        (("--split-layer", "1 or more"), ("export", "m", "b", "--split-layer", "0")),
    ],
)
def test_use(capsys: Capture, words: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    refused(here(capsys, *arguments), USE, *words)


def test_the_capacity_that_is_asked_for_works(capsys: Capture, tiny_bundle: Path, media: Path) -> None:
    request = ("run", tiny_bundle, "--video", media / "good.mp4", "--prompt", "What?", "--max-new-tokens", 4)
    text = refused(here(capsys, *request, "--kv-capacity", 64), USE, "--kv-capacity", "fewer frames")
    needed = int(text.split("use --kv-capacity ")[1].split(",")[0])
    assert here(capsys, *request, "--kv-capacity", needed).code == 0
    assert here(capsys, *request, "--kv-capacity", needed - 1).code == USE


def test_no_traceback_in_a_process_of_its_own(tiny_bundle: Path, media: Path) -> None:
    arguments = ("run", tiny_bundle, "--video", media / "sound.mp4", "--prompt", "What?")
    refused(apart(*arguments), INPUT, "sound.mp4", "no video stream")


# the same in Python


def test_the_tree_of_errors() -> None:
    assert issubclass(KVOverflow, UsageError) and issubclass(UsageError, ValueError)
    assert issubclass(InputError, ValueError)
    assert issubclass(BundleError, RuntimeError) and issubclass(EngineError, RuntimeError)
    kinds = (UsageError, InputError, BundleError, EngineError)
    assert all(issubclass(kind, errors.DycokeEdgeError) for kind in kinds)
    assert [kind.exit_code for kind in kinds] == [USE, INPUT, BUNDLE, BUNDLE]


BAD_REQUESTS: list[tuple[type[Exception], dict[str, Any]]] = [
    (UsageError, {"prompt": " "}),
    (UsageError, {"prompt": "<video>"}),
    (UsageError, {"video": "good.mp4", "prompt": "<video><video>"}),
    (UsageError, {"video": "good.mp4", "image": "a.png"}),
    (UsageError, {"video": "good.mp4", "compression": Compression(merge_ratio=0.6)}),
    (UsageError, {"video": "good.mp4", "clip": Clip(start=9)}),
    (UsageError, {"video": np.zeros((2, 8, 8), np.uint8)}),
    (UsageError, {"video": np.zeros((2, 8, 8, 3), np.float32)}),
    (UsageError, {"video": np.zeros((0, 8, 8, 3), np.uint8)}),
    (UsageError, {"image": np.zeros((2, 8, 8, 3), np.uint8)}),
    (KVOverflow, {"sampling": Sampling(max_new_tokens=600)}),
    (KVOverflow, {"video": "good.mp4", "compression": Compression.off(), "clip": Clip(num_frames=24, start=0)}),
    (InputError, {"video": "missing.mp4"}),
    (InputError, {"video": "sound.mp4"}),
    (NoImage, {"image": "text.mp4"}),
]


def test_a_model_answers_after_every_bad_request(tiny_bundle: Path, media: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=400, prefill_chunk=64)

    def answer() -> list[int]:
        return llm.generate("What?", media / "good.mp4", sampling=Sampling(max_new_tokens=4)).token_ids

    expected = answer()
    for kind, request in BAD_REQUESTS:
        places = {key: media / value for key, value in request.items() if isinstance(value, str) and key != "prompt"}
        with pytest.raises(kind) as caught:
            llm.generate(**{"prompt": "What?", **request, **places})
        assert type(caught.value) is kind and "\n" not in str(caught.value), request
        assert answer() == expected, request


def test_options_that_cannot_be(tiny_bundle: Path) -> None:
    for make in (
        lambda: Compression(merge_ratio=float("nan")),
        lambda: Compression(mode="fast"),  # type: ignore[arg-type]
        lambda: Compression(mode="official", weigh=True),
        lambda: Clip(num_frames=0),
        lambda: Clip(start=2, end=1),
        lambda: EngineSpec(threads=-1),
        lambda: ExportSpec(split_layer=0),
        lambda: VideoLLM.load(tiny_bundle, provider="cuda9"),  # type: ignore[arg-type]
        lambda: VideoLLM.load(tiny_bundle, decoder="captured"),
        lambda: VideoLLM.load(tiny_bundle, kv_capcity=9),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert type(caught.value) is UsageError


def test_an_overflow_says_what_it_needs(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=64)
    with pytest.raises(KVOverflow) as caught:
        llm.generate("What?", sampling=Sampling(max_new_tokens=100))
    assert caught.value.capacity == 64 and f"--kv-capacity {caught.value.needed}" in str(caught.value)
    VideoLLM.load(tiny_bundle, kv_capacity=caught.value.needed).generate("What?", sampling=Sampling(max_new_tokens=100))


# bundles


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def manifest(**changes: Any) -> Damage:
    """Change keys of the manifest; "model.x" is a key of its model, None deletes."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        for key, value in changes.items():
            inside, name = (data["model"], key[6:]) if key.startswith("model_") else (data, key)
            inside[name] = value
            if value is None:
                del inside[name]
        (folder / MANIFEST).write_text(sealed(data))

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def scrambled(name: str, begin: int = 0) -> Damage:
    """Other bytes, as many."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        noise = np.random.default_rng(0).integers(128, 255, len(data) - begin, np.uint8).tobytes()
        (folder / name).write_bytes(data[:begin] + noise)

    return damage


def shortened(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def made_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def listed(name: str) -> Damage:
    """The manifest lists a file that is somewhere else."""

    def damage(folder: Path) -> None:
        (folder.parent / "x").write_text("x")
        data = json.loads((folder / MANIFEST).read_text())
        data["files"][name.format(folder.parent)] = {"size": 1, "sha256": "0"}
        (folder / MANIFEST).write_text(sealed(data))

    return damage


def unlisted(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        del data["files"][name]
        (folder / MANIFEST).write_text(sealed(data))

    return damage


BROKEN_BUNDLES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no bundle folder at", "dycoke-edge export MODEL_DIR")),
    "a file": (made_a_file, ("no bundle folder at", "export")),
    "no manifest": (removed(MANIFEST), (MANIFEST, "export")),
    "half a manifest": (text(MANIFEST, '{"format_version": 1, "made'), (MANIFEST, "cannot be read", "export again")),
    "no JSON": (text(MANIFEST, "hello"), (MANIFEST, "cannot be read", "export again")),
    "no text": (scrambled(MANIFEST), (MANIFEST, "cannot be read", "export again")),
    "a list": (text(MANIFEST, "[1]"), (MANIFEST, "format_version", "export again")),
    "unknown key": (manifest(colour="red"), (MANIFEST, "colour", "export again")),
    "missing key": (manifest(newline_id=None), (MANIFEST, "newline_id", "export again")),
    "wrong type": (manifest(model_num_layers="six"), (MANIFEST, "model.num_layers", "export again")),
    "impossible": (manifest(model_num_layers=-6), (MANIFEST, "num_layers is -6", "export again")),
    "impossible cut": (manifest(model_split_layer=6), (MANIFEST, "split_layer 6", "export again")),
    "newer": (manifest(format_version=2), (MANIFEST, "format 2", "newer", "update dycoke-edge")),
    "older": (manifest(format_version=0), (MANIFEST, "format 0", "another", "export again")),
    "no version": (manifest(format_version=None), (MANIFEST, "format_version", "export again")),
    "missing file": (removed("onnx/vision.onnx"), ("onnx/vision.onnx is missing", "copy the whole folder")),
    "missing weights": (removed("onnx/decoder_deep.onnx.data"), ("decoder_deep.onnx.data is missing",)),
    "cut-off file": (shortened("onnx/vision.onnx.data"), ("vision.onnx.data has", "bytes, not", "again")),
    "unlisted": (unlisted(TEMPLATE), ("does not list", TEMPLATE, "export again")),
    "outside": (listed("../x"), (MANIFEST, "'../x'", "outside the bundle")),
    "outside, absolute": (listed("{}/x"), (MANIFEST, "outside the bundle")),
    "ratio without graph": (manifest(merge_ratios=[0.6]), ("does not list onnx/merge_060.onnx", "export again")),
}


@pytest.mark.parametrize("name", BROKEN_BUNDLES)
def test_broken_bundles(capsys: Capture, bundle: Path, name: str) -> None:
    damage, words = BROKEN_BUNDLES[name]
    damage(bundle)
    before = files(bundle.parent)
    commands: list[tuple[Argument, ...]] = [("inspect", bundle), ("run", bundle, "--prompt", "Hi"), ("verify", bundle)]
    for command in commands:
        refused(here(capsys, *command), BUNDLE, *words, str(bundle))
    with pytest.raises(RuntimeError) as caught:
        VideoLLM.load(bundle)
    assert type(caught.value) is BundleError and files(bundle.parent) == before


def test_a_foreign_folder(capsys: Capture, tiny_checkpoint: Path) -> None:
    told = refused(here(capsys, "run", tiny_checkpoint, "--prompt", "Hi"), BUNDLE, "not a dycoke-edge bundle")
    assert f"dycoke-edge export {tiny_checkpoint} BUNDLE" in told


def test_a_path_that_the_system_refuses(capsys: Capture) -> None:
    refused(here(capsys, "inspect", "x" * 300), BUNDLE, "name too long", "check its path")


CONTENT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "onnx/vision.onnx": (scrambled("onnx/vision.onnx"), ("vision.onnx", "cannot load", "export again")),
    "onnx/merge_070.onnx": (scrambled("onnx/merge_070.onnx"), ("merge_070.onnx", "cannot load", "export again")),
    "onnx/decoder_deep.onnx": (scrambled("onnx/decoder_deep.onnx"), ("decoder_deep.onnx", "cannot load")),
    TOKENIZER: (scrambled(TOKENIZER), (TOKENIZER, "cannot be read", "export again")),
    TEMPLATE: (text(TEMPLATE, f"{'{% if %}':562}"), (TEMPLATE, "no template", "export again")),
    EMBED: (scrambled(EMBED), (EMBED, "cannot be read", "export again")),
}


@pytest.mark.parametrize("name", CONTENT)
def test_bundles_with_damaged_content(capsys: Capture, bundle: Path, media: Path, name: str) -> None:
    damage, words = CONTENT[name]
    size = (bundle / name).stat().st_size
    damage(bundle)
    assert (bundle / name).stat().st_size == size
    request = ("run", bundle, "--video", media / "good.mp4", "--num-frames", 4, "--prompt", "Hi", "--merge-ratio", 0.7)
    refused(here(capsys, *request), BUNDLE, *words)
    refused(here(capsys, "verify", bundle), BUNDLE, name, "sha256", "export again")


@pytest.mark.parametrize("begin", range(6, 70, 9))
def test_any_damage_to_the_header_of_the_embedding(bundle: Path, begin: int) -> None:
    scrambled(EMBED, begin)(bundle)
    with pytest.raises(BundleError, match=EMBED):
        open_bundle(bundle).embed_tokens()


def test_weights_that_are_not_finite_are_noticed(capsys: Capture, bundle: Path) -> None:
    file = bundle / "onnx/decoder_deep.onnx.data"
    file.write_bytes(b"\xff" * file.stat().st_size)
    refused(here(capsys, "run", bundle, "--prompt", "Hi"), BUNDLE, "not finite", "dycoke-edge verify")


# export


@pytest.fixture
def model_dir(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def config(name: str = CONFIG, **changes: Any) -> Damage:
    """Change keys of a JSON file; "text_config.x" as text_config_x; None deletes."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for key, value in changes.items():
            inside, last = (data["text_config"], key[12:]) if key.startswith("text_config_") else (data, key)
            inside[last] = value
            if value is None:
                del inside[last]
        (folder / name).write_text(json.dumps(data))

    return damage


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Change one tensor, or delete it."""

    def damage(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        key = next(key for key in tensors if key.endswith(name))
        changed = change(tensors.pop(key))
        save_file(tensors if changed is None else {**tensors, key: changed.contiguous()}, folder / WEIGHTS)

    return damage


def value(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = number
        return tensor

    return change


def index(**where: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        content = json.dumps({"weight_map": {"a": "model-1.safetensors", **where}})
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def no_template(folder: Path) -> None:
    (folder / TEMPLATE).unlink()


def no_pixels(folder: Path) -> None:
    (folder / PIXELS).unlink()
    (folder / "preprocessor_config.json").unlink()


UP, NORM = "layers.4.mlp.up_proj.weight", "layers.1.input_layernorm.weight"
BROKEN_CHECKPOINTS: dict[str, tuple[int, tuple[Argument, ...], Damage, tuple[str, ...]]] = {
    "missing": (INPUT, (), shutil.rmtree, ("no model folder at", "hf download")),
    "a file": (INPUT, (), made_a_file, ("no model folder at", "hf download")),
    "no config": (INPUT, (), removed(CONFIG), ("has no config.json", "Hugging Face")),
    "config no JSON": (INPUT, (), text(CONFIG, "{"), (CONFIG, "cannot be read", "fetch it again")),
    "config a list": (INPUT, (), text(CONFIG, "[]"), (CONFIG, "not a JSON object", "fetch it again")),
    "llava": (INPUT, (), config(model_type="llava"), (CONFIG, "'llava'", "llava_onevision")),
    "qwen2_vl": (INPUT, (), config(model_type="qwen2_vl"), (CONFIG, "'qwen2_vl'", "llava_onevision")),
    "no type": (INPUT, (), config(model_type=None), (CONFIG, "'none'", "llava_onevision")),
    "llama inside": (INPUT, (), config(text_config_model_type="llama"), (CONFIG, "'llama'", "qwen2")),
    "nonsense inside": (INPUT, (), config(text_config_model_type="x-y"), (CONFIG, "x-y", "fetch it again")),
    "nonsense value": (INPUT, (), config(text_config_hidden_size="wide"), (CONFIG, "fetch it again")),
    "wrong value": (INPUT, (), config(text_config_hidden_size=256), ("has shape", "config.json", "fetch both")),
    "sliding": (INPUT, (), config(text_config_use_sliding_window=True), (CONFIG, "use_sliding_window")),
    "missing weight": (INPUT, (), weight(UP, lambda t: None), ("no weight", UP, "fetch it again")),
    "wrong shape": (INPUT, (), weight(UP, lambda t: t[1:]), (UP, "has shape [255, 128]", "[256, 128]")),
    "quantised": (INPUT, (), weight(UP, lambda t: t.to(torch.int8)), (UP, "is I8", "fp16")),
    "no weights": (INPUT, (), removed(WEIGHTS), (WEIGHTS, "is missing", "fetch")),
    "missing shard": (INPUT, (), index(b="model-2.safetensors"), ("model-2.safetensors is missing", "fetch")),
    "shard outside": (INPUT, (), index(b="../b.safetensors"), ("index.json", "../b.safetensors", "not a file beside")),
    "cut-off weights": (INPUT, (), shortened(WEIGHTS), (WEIGHTS, "cannot be read", "fetch it again")),
    "no safetensors": (INPUT, (), scrambled(WEIGHTS), (WEIGHTS, "cannot be read", "fetch it again")),
    "NaN": (INPUT, (), weight(UP, value(float("nan"))), (UP, "NaN", "fetch the checkpoint again")),
    "inf": (INPUT, (), weight(NORM, value(float("inf"))), (NORM, "infinite", "fetch the checkpoint again")),
    "NaN in vision": (INPUT, (), weight("fc1.weight", value(float("nan"))), ("fc1.weight", "NaN", "fetch")),
    "beyond fp16": (INPUT, ("--dtype", "fp16"), weight(UP, value(7e4)), (UP, "in fp16", "--dtype fp32")),
    "no tokenizer": (INPUT, (), removed(TOKENIZER), ("has no tokenizer.json", "save_pretrained")),
    "broken tokenizer": (INPUT, (), text(TOKENIZER, "{}"), (TOKENIZER, "cannot be read", "fetch it again")),
    "other tokenizer": (INPUT, (), config(video_token_index=99999), (TOKENIZER, "99999", "video_token_index")),
    "no template": (INPUT, (), no_template, ("has no chat_template.jinja", "copy it")),
    "broken template": (INPUT, (), text(TEMPLATE, "{% if %}"), (TEMPLATE, "no valid chat template", "copy it")),
    "template no text": (INPUT, (), scrambled(TEMPLATE), (TEMPLATE, "cannot be read", "fetch it again")),
    "no preprocessor": (INPUT, (), no_pixels, ("has no preprocessor_config.json", "copy it")),
    "wrong size": (INPUT, (), config(PIXELS, size={"height": 384, "width": 384}), (PIXELS, "384", "100 x 100")),
    "odd size": (INPUT, (), config(PIXELS, size=[100, 100]), (PIXELS, "100 x 100")),
    "two means": (INPUT, (), config(PIXELS, image_mean=[0.5, 0.5]), (PIXELS, "image_mean", "three numbers")),
    "odd stop": (INPUT, (), config("generation_config.json", eos_token_id="end"), ("eos_token_id", "fetch it again")),
    "cut at the end": (USE, ("--split-layer", 6), lambda m: None, ("--split-layer", "between 1 and 5")),
    "fine ratio": (USE, ("--merge-ratio", 0.123), lambda m: None, ("--merge-ratio", "two decimals", "0.7")),
}


VISION = (
    *("vision.onnx", "vision.onnx.data", "vision_cuda.onnx", "vision_trt.onnx"),
    *("vision_weights.json", "vision_vectors.bin"),
)


def copied_vision(bundle: Path) -> Callable[..., None]:
    """Instead of tracing the vision encoder, which takes seconds, takes it from a bundle."""

    def write(folder: Path, *arguments: object) -> None:
        for name in VISION:
            shutil.copyfile(bundle / "onnx" / name, folder / name)

    return write


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_broken_checkpoints(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model_dir: Path, tiny_bundle: Path, name: str
) -> None:
    code, options, damage, words = BROKEN_CHECKPOINTS[name]
    damage(model_dir)
    before = files(model_dir.parent)
    target = model_dir.parent / "new" / "bundle"
    ratio = () if "--merge-ratio" in options else ("--merge-ratio", 1)  # needs no graph
    if "--dtype" not in options:
        monkeypatch.setattr(build, "write_vision", copied_vision(tiny_bundle))
    outcome = here(capsys, "export", model_dir, target, *options, *ratio)
    last = outcome.err.splitlines(keepends=True)[-1:]  # the vision encoder's parity may come before
    refused(Outcome(outcome.code, outcome.out, "".join(last)), code, *words)
    assert "Traceback" not in outcome.err and files(model_dir.parent) == before


@pytest.fixture
def export(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tiny_bundle: Path
) -> Callable[..., str]:
    """Runs an export that fails and leaves nothing; returns the last line said."""
    monkeypatch.setattr(build, "write_vision", copied_vision(tiny_bundle))

    def run(target: Path, code: int, *words: str) -> str:
        folder = target.parent
        before = files(folder) if folder.is_dir() else {}
        outcome = here(capsys, "export", tiny_checkpoint, target, "--merge-ratio", 1)
        last = outcome.err.splitlines(keepends=True)[-1]
        assert "Traceback" not in outcome.err
        assert (files(folder) if folder.is_dir() else {}) == before
        return refused(Outcome(outcome.code, outcome.out, last), code, *words)

    return run


def test_a_bundle_that_exists(export: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        export(tmp_path / name, USE, f"{name} exists already", "choose another BUNDLE")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_that_cannot_be_written(export: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    export(tmp_path / "file" / "bundle", BUNDLE, "cannot write", "Not a directory", "choose another BUNDLE")
    export(Path("/proc/nowhere/bundle"), BUNDLE, "cannot write", "choose another BUNDLE")
    export(tmp_path / ("x" * 300), BUNDLE, "cannot write", "name too long", "choose another BUNDLE")


WITHOUT = "import sys; sys.modules['{}'] = None; from dycoke_edge.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("package", ["torch", "optimum"])
def test_packages_of_export_that_are_missing(tmp_path: Path, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from dycoke_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    told = refused(python(code, "export", model, tmp_path / "b"), USE, "pip install 'dycoke-edge[export]'")
    assert f"export needs {package}" in told and list(tmp_path.iterdir()) == [model]


def test_packages_of_the_device_that_are_missing(tiny_bundle: Path) -> None:
    for package in ("onnxruntime", "av"):
        code = WITHOUT.format(package)
        outcome = python(code, "run", tiny_bundle, "--prompt", "Hi")
        refused(outcome, BUNDLE, f"run needs {package}", "pip install 'dycoke-edge'")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk; skips where only root could and we are not."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs root to mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_seen_at_once(export: Callable[..., str], disk: Callable[[str], Path]) -> None:
    told = export(disk("size=3m") / "b", BUNDLE, "3 MiB free, the bundle needs 4 MiB", "--dtype fp16")
    assert "choose another BUNDLE" in told


@pytest.mark.parametrize("size", ["200k", "1600k", "4420k"])
def test_a_disk_that_fills_up(
    export: Callable[..., str], disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """In vision, in the decoder, at the end: what looked free at first was taken by another."""
    monkeypatch.setattr(build, "_check_room", lambda *arguments: None)
    monkeypatch.setattr(build, "write_vision", write_vision)
    export(disk(f"size={size}") / "b", BUNDLE, "disk full while writing", "free some space")


def test_a_disk_that_may_not_be_written(export: Callable[..., str], disk: Callable[[str], Path]) -> None:
    export(disk("ro") / "new" / "b", BUNDLE, "cannot write", "Read-only", "choose another BUNDLE")


def test_a_full_disk_without_being_root(
    export: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_decoders", full)
    export(tmp_path / "b", BUNDLE, "disk full while writing", "free some space")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    export(tmp_path / "b", BUNDLE, "0 MiB free, the bundle needs 4 MiB")


def test_a_graph_that_is_not_torch(export: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TOLERANCE, "fp32", 1e-12)
    export(tmp_path / "b", BUNDLE, "differs from torch by", "more than 1e-12", "no bundle was written")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (scrambled("onnx/decoder_deep.onnx"), ("onnxruntime cannot run decoder_deep.onnx", "report")),
        (scrambled("onnx/decoder_shallow.onnx.data", 1000), ("decoder_shallow", "differs from torch by", "report")),
    ],
)
def test_a_graph_that_was_written_wrongly(
    export: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Damage, words: tuple[str, ...]
) -> None:
    def wrongly(folder: Path, *arguments: Any) -> Any:
        placed = write_decoders(folder, *arguments)
        damage(folder.parent)
        return placed

    monkeypatch.setattr(build, "write_decoders", wrongly)
    export(tmp_path / "b", BUNDLE, *words)


def test_export_in_python(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        build.export(tiny_checkpoint, tmp_path / "there")
    with pytest.raises(UsageError, match="two decimals"):
        build.export(tiny_checkpoint, tmp_path / "b", ExportSpec(merge_ratio=(0.123,)))
    with pytest.raises(InputError, match=r"no config\.json"):
        build.export(tmp_path / "there", tmp_path / "b")
    with pytest.raises(InputError, match="no model folder"):
        checkpoint.Checkpoint(tmp_path / "missing")
    assert files(tmp_path) == {"there": -1}


def test_every_byte_of_a_manifest_counts(tiny_bundle: Path, tmp_path: Path) -> None:
    """One bit of each, and digits that stay digits: no change of it opens."""
    for file in tiny_bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(whole)
    open_bundle(tmp_path)
    opened = list[int]()
    for place, byte in enumerate(whole):
        for other in (byte ^ 1, byte ^ 32):
            manifest.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            try:
                open_bundle(tmp_path)
            except BundleError:
                continue
            opened.append(place)
    assert not opened


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-dir", "no model folder at no-such-dir; fetch one with: hf download MODEL --local-dir no-such-dir"),
        (
            "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
            "fetch it with: hf download llava-hf/llava-onevision-qwen2-0.5b-ov-hf "
            "--local-dir llava-onevision-qwen2-0.5b-ov-hf, "
            "then: dycoke-edge export llava-onevision-qwen2-0.5b-ov-hf BUNDLE",
        ),
        ("examples/no-such-dir", "fetch one with"),
    ],
)
def test_a_model_that_is_not_there_is_said_before_torch_is_imported(name: str, said: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dycoke_edge.cli import main\ncode = main(['export', *sys.argv[1:]])\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\nsys.exit(code)"
    )
    assert said in refused(python(code, name, tmp_path / "bundle"), INPUT)


def test_more_frames_than_fit_are_refused_before_they_are_decoded(
    llm: VideoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dycoke_edge.runtime.video.decode", lambda *arguments: pytest.fail("decoded"))
    with pytest.raises(KVOverflow, match="fewer frames"):
        llm.generate("What?", video="examples/clip.mp4", clip=Clip(num_frames=96))
