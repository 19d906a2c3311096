"""The options of the server, as `config` has those of all else."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass

from dycoke_edge.config import Options, option
from dycoke_edge.errors import UsageError

PANICS = ("recover", "exit")


@dataclass(frozen=True)
class ServeSpec(Options):
    """What a server listens to, and what it lets a request have."""

    host: str = option("127.0.0.1", "address to listen on; any other than loopback needs an api_key")
    port: int = option(8000, "port to listen on; 0 takes a free one", 0, 65535)
    api_key: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={"help": "what clients send as 'Authorization: Bearer KEY'; write {DYCOKE_API_KEY} and set that"},
    )
    host_names: tuple[str, ...] = option((), "names this server is reached by, beside its address and localhost")
    snapshots: bool | None = option(None, "hand out each camera's latest frame; off unless host is loopback")
    file_dirs: tuple[str, ...] = option((), "folders that file:// URLs of requests may point into")
    fetch_hosts: tuple[str, ...] = option((), "hosts or networks that http(s) URLs of requests may point to")
    stream_hosts: tuple[str, ...] = option((), "hosts or networks that cameras may be added from over HTTP")
    max_body_bytes: int = option(32_000_000, "largest request, and largest file fetched for one", 1024, 2**31)
    max_small_body_bytes: int = option(131_072, "largest request that is not for an answer", 1024, 2**31)
    max_bodies_bytes: int = option(64_000_000, "bytes of all requests that are being received or read", 1024, 2**40)
    max_frames: int = option(64, "frames of a video that are looked at", 1, 2**16)
    max_fps: float = option(30.0, "frames a second of a video that are looked at", 1e-3, 1000)
    max_pixels: int = option(9_000_000, "width x height of a picture or video", 1, 2**28)
    max_video_s: float = option(600.0, "length of a video in seconds", 0.1, 86400)
    readers: int = option(1, "processes that read videos and pictures of requests, each one at a time", 1, 64)
    read_memory_mb: int = option(1024, "memory in MB that reading a video or picture may take", 64, 2**20)
    image_timeout_s: float = option(15.0, "seconds that reading a picture may take, and 30 if it is fetched", 0.1, 3600)
    video_timeout_s: float = option(120.0, "seconds that reading a video may take, and 30 if it is fetched", 0.1, 3600)
    max_prompt_chars: int = option(8000, "letters in all messages of a request", 1, 2**24)
    max_new_tokens: int = option(256, "longest answer, in tokens; requests for more get this", 1, 2**16)
    max_chats: int = option(8, "requests for answers at a time; one more gets 429", 1, 1024)
    max_cameras: int = option(32, "cameras, those of the configuration included", 1, 128)
    max_rules: int = option(64, "rules, those of the configuration included", 1, 1024)
    max_connections: int = option(128, "connections at a time", 1, 2**16)
    max_event_streams: int = option(16, "readers of /v1/events at a time", 1, 2**16)
    on_panic: str = option(
        "recover", "what to do when a library of the model falls over, after its question got 503", None, None, PANICS
    )
    header_timeout_s: float = option(10.0, "seconds that a request's header may take", 0.1, 3600)
    body_timeout_s: float = option(60.0, "seconds that a request's body may take", 0.1, 3600)
    send_timeout_s: float = option(60.0, "seconds that a client may leave an answer unread", 0.1, 3600)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None and not re.fullmatch(r"[!-~]{16,}", self.api_key):
            raise UsageError(
                "api_key must be 16 or more visible ASCII characters, e.g. the output of openssl rand -hex 24"
            )
        if self.api_key is None and not self.loopback:
            raise UsageError(
                f"host={self.host} (--host) can be reached from outside and no api_key is set; set server.api_key to "
                "'{DYCOKE_API_KEY}', or use --host 127.0.0.1"
            )

    @property
    def loopback(self) -> bool:
        """Only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def shows_frames(self) -> bool:
        """Frames of cameras are handed out."""
        return self.loopback if self.snapshots is None else self.snapshots
