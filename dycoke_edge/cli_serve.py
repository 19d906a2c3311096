"""`dycoke-edge serve`: cameras.yaml, the environment and signals on one side, the server on the other."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dycoke_edge import cli_output as output
from dycoke_edge.bundle import Bundle, open_bundle
from dycoke_edge.cli_environment import HELP, fill
from dycoke_edge.cli_options import add_bundle, command, installed
from dycoke_edge.config import Compression
from dycoke_edge.errors import EngineError, UsageError

if TYPE_CHECKING:
    from dycoke_edge.runtime.camera.events import Sink
    from dycoke_edge.runtime.serve.config import ServeConfig, Sinks

STOP_S = 3.0  # that open alerts and sinks have to be finished


def add_commands(commands: Any) -> None:
    """Add the command to the command line."""
    help = "watch cameras and answer over HTTP: OpenAI's API, alerts, events, metrics, a page"
    examples = ("serve BUNDLE --config cameras.yaml --check", "serve BUNDLE --config cameras.yaml", "serve --schema")
    p = command(commands, "serve", serve, help, examples)
    add_bundle(p, nargs="?")
    p.add_argument("--config", type=Path, metavar="FILE", help=f"cameras, rules, sinks and the server, in YAML; {HELP}")
    p.add_argument("--host", metavar="ADDRESS", help="address to listen on, instead of the file's server.host")
    p.add_argument("--port", type=int, metavar="N", help="port to listen on, instead of the file's server.port")
    p.add_argument(
        "--check",
        action="store_true",
        help="check the bundle, the configuration and the files it names, and do no more",
    )
    p.add_argument("--schema", action="store_true", help="print the JSON schema of the configuration")


def serve(args: argparse.Namespace) -> None:
    """dycoke-edge serve BUNDLE [--config FILE]"""
    with installed("serve", "dycoke-edge[serve]", UsageError):
        from dycoke_edge.runtime.serve import config
        from dycoke_edge.runtime.serve.check import check_files
    if args.schema:
        output.json_line(config.schema())
        return
    if args.bundle is None:
        raise UsageError("serve needs a bundle: dycoke-edge serve BUNDLE, or dycoke-edge serve BUNDLE --config FILE")
    given = {key: getattr(args, key) for key in ("host", "port") if getattr(args, key) is not None}
    bundle = open_bundle(args.bundle)
    with _of(args.config):
        settings = config.read_config({} if args.config is None else load(args.config), **given)
        check_compression(bundle, settings.compression)
        check_questions(bundle, settings)
        if args.check:
            check_files(settings)
    if args.check:
        counts = {"cameras": len(settings.cameras), "rules": len(settings.rules)}
        counts["rules"] += sum(len(camera.rules) for camera in settings.cameras)
        output.json_line({"config": args.config and str(args.config), **counts, "ok": True})
        return
    run(args.bundle, settings)


@contextmanager
def _of(file: Path | None) -> Iterator[None]:
    """Errors begin with the file they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{file}: {error}" if file else str(error)) from None


def check_compression(bundle: Bundle, compression: Compression) -> None:
    """UsageError for a merge ratio that the bundle does not have: now, not when the first video comes."""
    try:
        bundle.merge_graph(compression.merge_ratio)
    except UsageError as error:
        raise UsageError(f"compression: {error}") from None


def check_questions(bundle: Bundle, config: ServeConfig) -> None:
    """UsageError for a prompt or rule that this model could not be asked; needs its text only."""
    from dycoke_edge.runtime.camera.questions import check_camera, check_rule
    from dycoke_edge.runtime.live_question import LiveQuestions
    from dycoke_edge.runtime.text import Text

    questions = LiveQuestions(bundle, Text(bundle), config.live)
    for camera in config.cameras:
        check_camera(questions.check, camera)
    for rule in config.rules:
        check_rule(questions.check, rule)


def run(bundle: Path, config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM."""
    from dycoke_edge.runtime import allocator
    from dycoke_edge.runtime.camera.watcher import CameraWatcher
    from dycoke_edge.runtime.pipeline import VideoLLM
    from dycoke_edge.runtime.serve.app import make_app
    from dycoke_edge.runtime.serve.listener import make_server

    panics = list[BaseException]()

    def panicked(error: BaseException) -> None:
        panics.append(error)
        if config.server.on_panic == "exit":
            server.stop()

    _log()
    allocator.keep_small()
    with listen(config.server.host, config.server.port) as listening:
        sinks = make_sinks(config.sinks)
        llm = VideoLLM.load(bundle, **asdict(config.engine))
        output.random_weights(llm.bundle.manifest)
        watcher = CameraWatcher(
            llm,
            config.cameras,
            config.rules,
            sinks,
            config.compression,
            waiting=config.server.max_chats,
            reading=config.reading,
            live=config.live,
            on_panic=panicked,
        )
        server = make_server(make_app(watcher, llm, config.server), config.server)
        watcher.start()
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        output.people.print(f"serving {len(config.cameras)} cameras on http://{host}:{listening.getsockname()[1]}")
        try:
            server.run(sockets=[listening])
        finally:
            watcher.stop(STOP_S)
    if panics and config.server.on_panic == "exit":
        raise EngineError(f"the model's library fell over ({type(panics[0]).__name__}) and server.on_panic is exit")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded: a port in use shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(f"{host}:{port} (--host, --port) cannot be listened on: {error.strerror or error}") from None
    return listening


def make_sinks(sinks: Sinks) -> list[Sink]:
    """The sinks that a configuration names."""
    from dycoke_edge.runtime.sinks.jsonl import JsonlSink
    from dycoke_edge.runtime.sinks.mqtt import MqttSink
    from dycoke_edge.runtime.sinks.webhook import WebhookSink

    found = list[Any]()
    kinds: dict[str, Any] = {"jsonl": JsonlSink, "mqtt": MqttSink, "webhook": WebhookSink}
    for key, kind in kinds.items():
        options = getattr(sinks, key)
        if options is not None:
            try:
                found.append(kind(**options.model_dump()))
            except UsageError as error:
                raise UsageError(f"sinks.{key}: {error}") from None
            except OSError as error:  # of ca_certs
                raise UsageError(f"sinks.{key}.ca_certs: {error.strerror}; give a file of PEM certificates") from None
    return found


def load(path: Path) -> Any:
    """A YAML file with {DYCOKE_*} replaced in its texts. UsageError, one line, for whatever cannot be read."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} comes twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"line {line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError("not YAML in UTF-8; check the file") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}; check --config") from None
    return filled(data, "")


def filled(data: Any, key: str) -> Any:
    """Put the environment's DYCOKE_ variables into texts. After parsing: a value cannot become structure."""
    if isinstance(data, dict):
        return {name: filled(value, f"{key}.{name}".lstrip(".")) for name, value in data.items()}
    if isinstance(data, list):
        return [filled(value, f"{key}.{index}") for index, value in enumerate(data)]
    if not isinstance(data, str):
        return data
    try:
        return fill(data)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


class _Plain(logging.Formatter):
    """Log lines without credentials, whoever wrote them: tracebacks and other libraries too. What a stranger sent can
    neither begin a line nor steer a terminal; of a traceback all lines but the first are indented."""

    def format(self, record: logging.LogRecord) -> str:
        from dycoke_edge.runtime.camera.redact import printable, redact

        return "\n    ".join(map(printable, redact(super().format(record)).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:
        from dycoke_edge.runtime.camera.redact import printable

        return printable(super().formatMessage(record))


def _log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("uvicorn.error", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
