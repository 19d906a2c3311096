"""A bundle on disk, what export writes and all that a device needs: `dycoke_edge.json` and the files it lists."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from dycoke_edge import contract
from dycoke_edge.config import Provider
from dycoke_edge.contract import ModelSpec, VisionTable, WeightTable
from dycoke_edge.errors import BundleError, ReplacedError, UsageError

FORMAT_VERSION = 1
MANIFEST = "dycoke_edge.json"
SEAL = "manifest_sha256"  # its key for its own hash
EMBED = "onnx/embed_tokens.npy"
WEIGHTS = "onnx/decoder_weights.json"
VISION_WEIGHTS = "onnx/vision_weights.json"
EXAMPLE = "example.mp4"  # a clip that the model can be tried on; most bundles have none
Table = TypeVar("Table", WeightTable, VisionTable)


Identity: TypeAlias = "tuple[int, ...] | None"  # device, inode, ns of change, bytes; None: the file is gone


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    model_config = ConfigDict(extra="forbid")

    size: NonNegativeInt
    sha256: str


class Knows(BaseModel):
    """What a model is for that knows little: in words, and questions that it can answer about `EXAMPLE`."""

    model_config = ConfigDict(extra="forbid")

    what: str
    questions: tuple[str, ...]


class Manifest(BaseModel):
    """`dycoke_edge.json`: what the bundle holds and where it came from."""

    model_config = ConfigDict(extra="forbid")

    format_version: int
    made_by: str
    family: str
    task: str
    model: ModelSpec
    merge_ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_token_id: NonNegativeInt
    video_token_id: NonNegativeInt
    newline_id: NonNegativeInt  # row of embed_tokens.npy that holds the newline the model puts after a video
    stop_token_ids: tuple[int, ...]
    random_seed: int | None  # set when the weights are random: the text means nothing
    knows: Knows | None = None  # set for a model of one small domain: about anything else its text means nothing
    files: dict[str, FileEntry]

    @field_validator("model")
    @classmethod
    def _possible(cls, model: ModelSpec) -> ModelSpec:
        for name, value in model:
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{name} is {value}, not above 0")
        if model.split_layer >= model.num_layers:
            raise ValueError(f"split_layer {model.split_layer} is not below num_layers {model.num_layers}")
        return model


class Bundle:
    """An opened bundle whose version, files and sizes are as the manifest says."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._opened = dict[str, Identity]()  # by path, of every file; empty where none was looked at
        self._replaced: str | None = None  # the first file that was seen to differ

    def check_same(self) -> None:
        """ReplacedError if a file was replaced, changed or removed since the bundle was opened, now or at an earlier
        check: what is loaded from it would be mixed with what was loaded before, and files that are mapped show what is
        written into them. Looks at every file, which takes about 2 to 4 us each."""
        self._check(self._opened)

    def check_manifest(self) -> None:
        """As `check_same`, but looks at the manifest alone: for every frame. A file that was changed by itself is seen
        by `check_same` before an answer is given."""
        self._check(self._opened.keys() & {str(self.path / MANIFEST)})

    def _check(self, files: Iterable[str]) -> None:
        if self._replaced is None:
            self._replaced = next((file for file in files if _identity(file) != self._opened[file]), None)
        if self._replaced is not None:
            raise ReplacedError(
                f"{self._replaced} was replaced or removed while the bundle was in use; start again to use what is "
                "there now"
            )

    def remember(self) -> None:
        """Note which files the bundle consists of now, for `check_same`."""
        files = (str(self.path / name) for name in (MANIFEST, *self.manifest.files))
        self._opened, self._replaced = {file: _identity(file) for file in files}, None

    @property
    def model(self) -> ModelSpec:
        """The model's dimensions."""
        return self.manifest.model

    def graph_path(self, name: str, provider: Provider = "cpu") -> Path:
        """The file of a graph, in the form that is for a provider; BundleError if the bundle lacks that form, as those
        of 0.1 do, or was replaced since it was opened."""
        self.check_same()
        file = f"onnx/{contract.FORMS.get((name, provider), name)}.onnx"
        if (name, provider) in contract.FORMS and file not in self.manifest.files:
            raise BundleError(f"{self.path} has no {file}, which --provider {provider} runs; export again")
        return self.path / file

    def embed_tokens(self) -> NDArray[np.floating]:
        """The embedding table [V+1, E], memory-mapped; its last row is the newline after a video."""
        file, want = self.path / EMBED, (self.manifest.newline_id + 1, self.model.hidden_size)
        try:
            table = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # a damaged header raises whatever Python's parser does
            raise BundleError(f"{file} cannot be read ({_first_line(error)}); export again") from None
        if table.shape != want or table.dtype != self.model.numpy_dtype:
            raise BundleError(f"{file} holds {table.dtype} {table.shape}, not {want}; export again")
        return np.asarray(table)

    def weight_table(self) -> WeightTable:
        """Where the decoder's weights lie; BundleError if the bundle does not say, as those of 0.1 do not."""
        return self._read_table(WEIGHTS, WeightTable, "export again")

    def vision_table(self) -> VisionTable:
        """Where the vision encoder's weights lie; BundleError if the bundle does not say, as those of 0.1 and those of
        other towers than SigLIP do not, or says what cannot be."""
        remedy = "use --vision graph, or export again if an older version made it"
        table, model = self._read_table(VISION_WEIGHTS, VisionTable, remedy), self.model
        found = {name: placed.shape for name, placed in table.weights.items()}
        odd = sorted(found.items() ^ contract.vision_shapes(table, model).items())
        if odd or table.side != model.image_size // table.patch:
            what = odd[0][0] if odd else "side"
            raise BundleError(f"{self.path / VISION_WEIGHTS} does not fit the model ({what}); export again")
        return table

    def _read_table(self, name: str, kind: type[Table], remedy: str) -> Table:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}, which a GPU's kernels need; {remedy}")
        try:
            return kind.model_validate_json((self.path / name).read_bytes())
        except (OSError, ValidationError) as error:
            raise BundleError(f"{self.path / name} cannot be read ({_first_line(error)}); export again") from None

    def merge_graph(self, merge_ratio: float) -> str | None:
        """The merge graph for a ratio, None where merge needs none; UsageError if the bundle lacks it."""
        if not contract.needs_merge_graph(self.model, merge_ratio):
            return None
        name = contract.merge_name(merge_ratio)
        if not any(np.isclose(merge_ratio, have) for have in self.manifest.merge_ratios):
            have = " ".join(f"{ratio:g}" for ratio in (0.0, *self.manifest.merge_ratios))
            raise UsageError(
                f"merge_ratio={merge_ratio:g} (--merge-ratio) is not in this bundle, which has {have}; "
                f"choose one of these or export with --merge-ratio {merge_ratio:g}"
            )
        return name

    def verify(self, on_file: Callable[[str], None] = lambda name: None) -> None:
        """Hash every file against the manifest; BundleError names the first that differs."""
        for name, entry in self.manifest.files.items():
            on_file(name)
            with _readable(self.path / name):
                found = sha256(self.path / name)
            if found != entry.sha256:
                raise BundleError(f"{self.path / name} does not match its sha256 in {MANIFEST}; export again")


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle folder; BundleError when it is missing, foreign, newer, or has missing or cut-off files."""
    path = Path(path)
    with _readable(path):
        return _open(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the operating system refuses, in the words of this package."""
    try:
        yield
    except OSError as error:
        file, reason = error.filename or path, error.strerror or error
        raise BundleError(f"{file} cannot be read ({reason}); check its path and permissions") from None


def _open(path: Path) -> Bundle:
    manifest = _read_manifest(path)
    bundle = Bundle(path, manifest)
    graphs = contract.graphs(manifest.model, manifest.merge_ratios)
    needed = {EMBED, "tokenizer.json", "chat_template.jinja", *(f"onnx/{graph.name}.onnx" for graph in graphs)}
    for name in sorted(needed - manifest.files.keys()):
        raise BundleError(f"{path / MANIFEST} does not list {name}; export again")
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    bundle.remember()
    if _read_manifest(path) != manifest:
        raise BundleError(f"{path} was replaced while it was opened; try again")
    return bundle


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    file = path / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{path / MANIFEST} lists {name!r}, which is outside the bundle; export again")
    if not file.is_file():
        raise BundleError(f"{file} is missing; export again or copy the whole folder")
    if file.stat().st_size != entry.size:
        raise BundleError(f"{file} has {file.stat().st_size} bytes, not {entry.size}; export or copy it again")


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"no bundle folder at {path}; make one with: dycoke-edge export MODEL_DIR {path}")
    if not file.is_file():
        raise BundleError(
            f"{path} is not a dycoke-edge bundle (it has no {MANIFEST}); "
            f"make one with: dycoke-edge export {path} BUNDLE"
        )
    try:
        text = file.read_bytes().decode()
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({_first_line(error)}); export again") from None
    if not isinstance(data, dict) or "format_version" not in data:
        raise BundleError(f"{file} is not a manifest: it names no format_version; export again")
    version = data["format_version"]
    if version != FORMAT_VERSION:
        age = "a newer" if isinstance(version, int) and version > FORMAT_VERSION else "another"
        raise BundleError(
            f"{file} has format {version}, {age} one than this version reads ({FORMAT_VERSION}); "
            "update dycoke-edge or export again"
        )
    if not _is_sealed(text, data.pop(SEAL, None)):
        raise BundleError(f"{file} does not match the sha256 in its first line; copy it again or export again")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{file}: {where}: {first['msg']}; export again") from None


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with its own hash, that of the text with an empty one, in front."""
    text = json.dumps({SEAL: "", **{key: value for key, value in manifest.items() if key != SEAL}}, indent=1) + "\n"
    return text.replace(f'"{SEAL}": ""', f'"{SEAL}": "{hashlib.sha256(text.encode()).hexdigest()}"', 1)


def _is_sealed(text: str, seal: object) -> bool:
    blank = text.replace(f'"{SEAL}": "{seal}"', f'"{SEAL}": ""', 1)
    return hashlib.sha256(blank.encode()).hexdigest() == seal


def _identity(file: str) -> Identity:
    try:
        found = os.stat(file)  # a Path costs three times as much
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_files(path: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below a bundle folder but the manifest."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(path).as_posix(): FileEntry(size=p.stat().st_size, sha256=sha256(p)) for p in files}
