"""Whether what a configuration names is there: files, folders, devices. Opens no camera and writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from dycoke_edge.config_camera import Camera, ReaderSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.camera.source import open_source
from dycoke_edge.runtime.camera.uri import parse_uri
from dycoke_edge.runtime.serve.config import ServeConfig, Sinks
from dycoke_edge.runtime.sinks.webhook import signing_key


def check_files(config: ServeConfig) -> None:
    """UsageError, one line that names the key, for the first thing that is not there or cannot be used."""
    for camera in config.cameras:
        _check_camera(f"cameras.{camera.id}.source", camera, config.reading)
    _check_sinks(config.sinks)
    for folder in config.server.file_dirs:
        if not Path(folder).is_dir():
            raise UsageError(f"server.file_dirs: there is no folder {folder}; check the path")


def _check_camera(key: str, camera: Camera, reading: ReaderSpec) -> None:
    address = parse_uri(camera.uri)
    try:
        open_source(camera.uri, reading)  # what GStreamer needs; nothing is opened
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
    if address.kind in ("file", "v4l2"):
        _check_readable(key, Path(address.target), address.shown)


def _check_sinks(sinks: Sinks) -> None:
    if sinks.jsonl is not None:
        _check_writable("sinks.jsonl.path", Path(sinks.jsonl.path))
    if sinks.mqtt is not None and sinks.mqtt.ca_certs is not None:
        _check_readable("sinks.mqtt.ca_certs", Path(sinks.mqtt.ca_certs), sinks.mqtt.ca_certs)
    if sinks.webhook is not None and sinks.webhook.secret is not None:
        try:
            signing_key(sinks.webhook.secret)
        except UsageError as error:
            raise UsageError(f"sinks.webhook: {error}") from None


def _check_readable(key: str, path: Path, shown: str) -> None:
    if not path.exists():
        raise UsageError(f"{key}: {shown} does not exist; check the path")
    if path.is_dir():
        raise UsageError(f"{key}: {shown} is a folder; give a file")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{key}: {shown} cannot be read; check its permissions")


def _check_writable(key: str, path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{key}: there is no folder {folder}; make it, or give a file in another one")
    if path.is_dir():
        raise UsageError(f"{key}: {path} is a folder; give a file, e.g. {path / 'events.jsonl'}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{key}: {path} cannot be written; check the permissions of it and its folder")
