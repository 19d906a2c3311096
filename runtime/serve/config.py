"""cameras.yaml, checked. Names, ranges and help come from `dycoke_edge.config`; here is only how they nest."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dycoke_edge.config import Compression, EngineSpec, LiveSpec, Options
from dycoke_edge.config_camera import Camera, ReaderSpec, Rule
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.uri import parse_uri
from dycoke_edge.runtime.serve.errors import complaint

Json = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
Secret = Annotated[str | None, Field(repr=False)]


class Section(BaseModel):
    """A mapping whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


def section(
    name: str, group: type[Options], without: tuple[str, ...] = (), base: type[BaseModel] = Section, **more: Any
) -> type[BaseModel]:
    """A model, a child of `base`: the fields of an option group as keys, each of which may be left out."""
    hints, fields = get_type_hints(group), dict[str, Any]()
    for field in dataclasses.fields(group):
        if field.name not in without:
            told, many = field.metadata, get_origin(hints[field.name]) is tuple  # whose range is that of its items
            low, high = (None, None) if many else (told.get("low"), told.get("high"))
            described = Field(default=field.default, ge=low, le=high, description=told.get("help"))
            fields[field.name] = (hints[field.name], described)
    return create_model(name, __base__=base, __doc__=" ".join((group.__doc__ or "").split()), **(fields | more))


class Jsonl(Section):
    """A file that every event is appended to."""

    path: Text
    max_bytes: Annotated[int, Field(ge=1)] = 10_000_000
    keep: Annotated[int, Field(ge=1, le=1000)] = 5
    fsync: bool = False


class Mqtt(Section):
    """A broker; see README for the topics."""

    host: Text
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    username: Secret = None
    password: Secret = None
    tls: bool = False
    ca_certs: str | None = None
    prefix: Text = "dycoke"
    discovery: Annotated[str | None, Field(description="topic of Home Assistant's discovery: homeassistant")] = None
    qos: Literal[0, 1, 2] = 0


class Webhook(Section):
    """A URL that every event is POSTed to."""

    url: Annotated[str, Field(pattern=r"^https?://[^/]", repr=False, examples=["https://host/hook"])]
    secret: Secret = None
    verify_tls: bool = True


class Sinks(Section):
    """Where events go."""

    jsonl: Jsonl | None = None
    mqtt: Mqtt | None = None
    webhook: Webhook | None = None


RuleSection = section(
    "Rule", Rule, without=("id", "prompt"), prompt=(Text, Field(description="a question for yes or no"))
)
OwnRule = section("CameraRule", Rule, without=("id", "prompt", "cameras"), prompt=(Text, ...))
CAMERAS_OWN = ("size", "fps", "buffer", "realtime", "hosts")
NOT_SHARED = ("id", "uri", "rules", "hosts")
CameraSection = section(
    "Camera",
    Camera,
    without=NOT_SHARED,
    source=(Text, Field(description="rtsp:// rtsps:// file:// v4l2:// csi:// a path, or test:// at its own speed")),
    rules=(dict[str, OwnRule], Field(default={}, description="asked about this camera only")),  # type: ignore[valid-type]
)
File: type[BaseModel] = section(
    "Configuration",
    Camera,  # top-level keys are defaults for every camera
    without=NOT_SHARED,
    cameras=(dict[str, CameraSection], Field(default={})),  # type: ignore[valid-type]
    rules=(dict[str, RuleSection], Field(default={}, description="asked about all cameras, or those of `cameras`")),  # type: ignore[valid-type]
    sinks=(Sinks, Sinks()),
    server=(section("Server", ServeSpec), Field(default=None)),
    engine=(section("Engine", EngineSpec), Field(default=None)),
    compression=(section("Compression", Compression), Field(default=None)),
    live=(section("Live", LiveSpec, without=("memory_frames",)), Field(default=None)),
    reading=(
        section("Reading", ReaderSpec, without=CAMERAS_OWN),
        Field(default=None),
    ),
)
File.__doc__ = "Cameras, rules, sinks and the server; camera keys on top are defaults for every camera."


@dataclass(frozen=True)
class ServeConfig:
    """A whole configuration."""

    cameras: tuple[Camera, ...]
    rules: tuple[Rule, ...]
    sinks: Sinks
    server: ServeSpec
    engine: EngineSpec
    compression: Compression
    live: LiveSpec
    reading: ReaderSpec


def read_config(data: object, **server: Any) -> ServeConfig:
    """Check what a YAML file holds; `server` are options that go before those of the file. UsageError, one line that
    names the key, for the first thing that is wrong. Texts hold no values: they may be secret."""
    if not isinstance(data, Mapping):
        raise UsageError("the configuration is not a mapping; begin with: cameras:")
    try:
        file: Any = File.model_validate(data)
    except ValidationError as error:
        raise UsageError(_told(error, data)) from None
    defaults = {
        key: value for key, value in written(file).items() if key in Camera.__dataclass_fields__ and key != "rules"
    }
    cameras = tuple(_camera(name, one, defaults) for name, one in file.cameras.items())
    rules = tuple(_rule(f"rules.{name}", name, written(one)) for name, one in file.rules.items())
    _check_names(cameras, rules)
    config = ServeConfig(
        cameras,
        rules,
        file.sinks,
        _group("server", ServeSpec, written(file.server) | server),
        _group("engine", EngineSpec, written(file.engine)),
        _group("compression", Compression, written(file.compression)),
        _group("live", LiveSpec, written(file.live)),
        _group("reading", ReaderSpec, written(file.reading)),
    )
    _check_counts(config)
    return config


def schema() -> Json:
    """JSON schema of cameras.yaml."""
    return File.model_json_schema()


def written(part: BaseModel | None) -> Json:
    """What was written, without defaults."""
    if part is None:
        return {}
    return {name: getattr(part, name) for name in part.model_fields_set}


def _group(key: str, group: Any, options: Json) -> Any:
    try:
        return group(**options)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def _camera(name: str, one: Any, defaults: Json) -> Camera:
    key, given = f"cameras.{name}", written(one)
    rules, source = given.pop("rules", {}), given.pop("source")
    try:
        playing = parse_uri(source).kind == "test"  # the test picture stands for a camera, and so does as one would
    except UsageError as error:
        raise UsageError(f"{key}.source: {error}") from None
    own = tuple(_rule(f"{key}.rules.{rule}", rule, written(asked)) for rule, asked in rules.items())
    options = {"realtime": playing} | defaults | given | {"id": name, "uri": source, "rules": own}
    return _group(key, Camera, options)  # type: ignore[no-any-return]


def _rule(key: str, name: str, options: Json) -> Rule:
    return _group(key, Rule, options | {"id": name})  # type: ignore[no-any-return]


def _check_names(cameras: tuple[Camera, ...], rules: tuple[Rule, ...]) -> None:
    known, taken = {camera.id for camera in cameras}, {rule.id for rule in rules}
    for rule in rules:
        for name in rule.cameras:
            if name not in known:
                raise UsageError(f"rules.{rule.id}.cameras: there is no camera {name}; use one of {_listed(known)}")
    for camera in cameras:
        for rule in camera.rules:
            if rule.id in taken:
                raise UsageError(f"cameras.{camera.id}.rules.{rule.id}: this id is in rules too; use another one")


def _check_counts(config: ServeConfig) -> None:
    count = len(config.rules) + sum(len(camera.rules) for camera in config.cameras)
    for key, has, most in (
        ("cameras", len(config.cameras), config.server.max_cameras),
        ("rules", count, config.server.max_rules),
    ):
        if has > most:
            raise UsageError(f"{key}: {has} of them; server.max_{key} is {most}, raise it")


def _told(error: ValidationError, data: Any) -> str:
    """The first complaint, with the key and what would do."""
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        names = _names(place[:-1])
        near = difflib.get_close_matches(place[-1], names, 1)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"use one of {_listed(names)}")
    if first["type"] == "missing":
        return f"{key} is missing; set it"
    field = _model(place[:-1]).model_fields.get(place[-1]) if len(place) > 0 else None
    default = field.examples[0] if field is not None and field.examples else getattr(field, "default", None)
    example = f", e.g. {place[-1]}: {default}" if isinstance(default, str | int | float) and default != "" else ""
    return f"{key}: {complaint(first)}{example}"


def _model(place: list[str]) -> type[BaseModel]:
    """The section that a path of keys leads to."""
    model: Any = File
    for part in place:
        field = model.model_fields.get(part)
        if field is None:
            continue  # a camera's or rule's own name
        found = [kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        model = found[0] if found else model
    return model  # type: ignore[no-any-return]


def _kinds(hint: Any) -> list[Any]:
    inner = getattr(hint, "__args__", ())
    return [hint, *(kind for part in inner for kind in _kinds(part))] if inner else [hint]


def _names(place: list[str]) -> list[str]:
    return list(_model(place).model_fields)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
