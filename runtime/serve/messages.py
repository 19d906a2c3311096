"""What a chat request may hold: OpenAI's form, with videos and live cameras; nothing is ignored silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dycoke_edge.config import Compression, Sampling
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.conversation import Message, Role
from dycoke_edge.runtime.serve.config import section, written
from dycoke_edge.runtime.serve.errors import ApiError
from dycoke_edge.runtime.serve.media import Wanted

MESSAGES, PARTS = 64, 128  # of a request; of a message, which may be a clip in pictures and texts between them
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A body whose unknown keys are errors. A key whose value is null is as if left out: clients send all they know."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, sent: Any) -> Any:
        return {key: value for key, value in sent.items() if value is not None} if isinstance(sent, dict) else sent


class Lenient(Strict):
    """One in which an empty list or object asks for nothing, whatever its key."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, sent: Any) -> Any:
        return {key: value for key, value in sent.items() if value not in ([], {})} if isinstance(sent, dict) else sent


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Url(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # there is one size here


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: Url


class StreamRef(Strict):
    stream_id: str
    last_s: Annotated[Finite, Field(gt=0, description="only the last seconds of the camera's window")] | None = None


class StreamPart(Strict):
    type: Literal["stream"]
    stream: StreamRef


Part = Annotated[TextPart | ImagePart | VideoPart | StreamPart, Field(discriminator="type")]
Visual = ImagePart | VideoPart | StreamPart
Shown = tuple[ImagePart, ...] | VideoPart | StreamPart  # no picture, one, or a clip of several


class ChatMessage(Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=PARTS, fail_fast=True)] | None = None
    name: str | None = None


class VideoOptions(Strict):
    fps: Annotated[Finite, Field(gt=0)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None


class MediaOptions(Strict):
    video: VideoOptions = VideoOptions()


Dycoke = section("Dycoke", Compression, base=Strict)  # what is left out is as the server has it


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Strict):
    type: Literal["text"] = "text"


def _several(stop: Any) -> Any:
    """A stop string alone as a list of one; what asks for nothing is left out of it."""
    several = [stop] if isinstance(stop, str) else stop
    return [one for one in several if one not in (None, "")] if isinstance(several, list) else several


Stop = Annotated[str, Field(max_length=256)]
Stops = Annotated[
    list[Stop], Field(max_length=4, description="a text, or several, that end the answer"), BeforeValidator(_several)
]


class ChatRequest(Lenient):
    """Keys that change an answer are obeyed or refused: those with one value take what this server does anyway. The
    last ones change no answer and are ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stops = []
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools both say nothing
    function_call: Literal["none", "auto"] | None = None
    media_io_kwargs: MediaOptions = MediaOptions()
    dycoke: Dycoke | None = None  # type: ignore[valid-type]  # instead of the server's; cameras keep theirs
    parallel_tool_calls: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about what, out of a chat request."""

    messages: tuple[Message, ...]
    shown: Shown
    wanted: Wanted
    sampling: Sampling
    compression: dict[str, Any]  # fields of Compression that the request gives
    stops: tuple[str, ...]


def question(request: ChatRequest, spec: ServeSpec) -> Question:
    """Check a request against the ceilings and put it together. ApiError names the key that is wrong."""
    said, showing = list[Message](), list[list[Visual]]()
    for message in request.messages:
        texts, parts = _parts(message)
        said.append(Message(_role(message), "\n".join(texts), bool(parts)))
        showing += [parts] if parts else []
    if said[-1].role != "user":
        raise ApiError(400, "messages: the user's comes last, which is the one to answer; move it there", "messages")
    shown = _shown(showing)
    letters = sum(len(message.text) for message in said)
    if letters > spec.max_prompt_chars:
        raise ApiError(400, f"messages: {letters} letters; at most {spec.max_prompt_chars}", "messages")
    if not said[-1].text.strip():
        raise ApiError(400, "messages: nothing is asked; add a text part, e.g. What happens?", "messages")
    video = request.media_io_kwargs.video
    wanted = Wanted(video.fps, video.num_frames)
    return Question(tuple(said), shown, wanted, _sampling(request, spec), written(request.dycoke), tuple(request.stop))


def _role(message: ChatMessage) -> Role:
    return "system" if message.role == "developer" else message.role


def _parts(message: ChatMessage) -> tuple[list[str], list[Visual]]:
    """What a message says, and what it shows, which only the user's may."""
    if not isinstance(message.content, list):
        return [message.content or ""], []
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    shown = [part for part in message.content if not isinstance(part, TextPart)]
    if shown and message.role != "user":
        why = f"messages: {shown[0].type} part of the {message.role}; put it to the user's"
        raise ApiError(400, why, "messages")
    return texts, shown


def _shown(messages: list[list[Visual]]) -> Shown:
    """The one thing that messages show: several pictures of one message are a clip, in their order."""
    parts = [part for message in messages for part in message]
    pictures = tuple(part for part in parts if isinstance(part, ImagePart))
    if len(pictures) == len(parts) and len(messages) <= 1:
        return pictures
    if len(parts) > 1:
        hint = "several image_url in one message are a clip"
        raise ApiError(400, f"messages: {len(parts)} pictures, videos or streams; one is supported; {hint}", "messages")
    (alone,) = parts
    assert not isinstance(alone, ImagePart)
    return alone


def _sampling(request: ChatRequest, spec: ServeSpec) -> Sampling:
    usual = Sampling()
    most = request.max_completion_tokens or request.max_tokens or usual.max_new_tokens
    return Sampling(
        max_new_tokens=min(most, spec.max_new_tokens),
        temperature=usual.temperature if request.temperature is None else request.temperature,
        top_p=usual.top_p if request.top_p is None else request.top_p,
        seed=usual.seed if request.seed is None else request.seed,
    )
