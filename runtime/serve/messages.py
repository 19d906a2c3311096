"""What a chat request may hold: OpenAI's form, with videos and live cameras; nothing is ignored silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dycoke_edge.config import Sampling
from dycoke_edge.config_serve import ServeSpec
from dycoke_edge.runtime.conversation import Message, Role
from dycoke_edge.runtime.serve.errors import ApiError
from dycoke_edge.runtime.serve.media import Wanted

MESSAGES, PARTS = 64, 64  # of a request, of a message
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A body whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


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
Shown = ImagePart | VideoPart | StreamPart


class ChatMessage(Strict):
    """The last keys come with an earlier answer that OpenAI's client sends back; here there is nothing in them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=PARTS, fail_fast=True)] | None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class VideoOptions(Strict):
    fps: Annotated[Finite, Field(gt=0)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None


class MediaOptions(Strict):
    video: VideoOptions = VideoOptions()


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """Keys that change an answer are obeyed or refused; the last ones change none and are ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    media_io_kwargs: MediaOptions = MediaOptions()
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about what, out of a chat request."""

    messages: tuple[Message, ...]
    shown: Shown | None
    wanted: Wanted
    sampling: Sampling


def question(request: ChatRequest, spec: ServeSpec) -> Question:
    """Check a request against the ceilings and put it together. ApiError names the key that is wrong."""
    said, shown = list[Message](), list[Shown]()
    for message in request.messages:
        texts, parts = _parts(message)
        said.append(Message(_role(message), "\n".join(texts), bool(parts)))
        shown += parts
    if said[-1].role != "user":
        raise ApiError(400, "messages: the user's comes last, which is the one to answer; move it there", "messages")
    if len(shown) > 1:
        hint = "send several pictures as one video_url, data:video/jpeg;base64,FIRST,SECOND"
        raise ApiError(400, f"messages: {len(shown)} pictures, videos or streams; one is supported; {hint}", "messages")
    letters = sum(len(message.text) for message in said)
    if letters > spec.max_prompt_chars:
        raise ApiError(400, f"messages: {letters} letters; at most {spec.max_prompt_chars}", "messages")
    if not said[-1].text.strip():
        raise ApiError(400, "messages: nothing is asked; add a text part, e.g. What happens?", "messages")
    video, one = request.media_io_kwargs.video, shown[0] if shown else None
    return Question(tuple(said), one, Wanted(video.fps, video.num_frames), _sampling(request, spec))


def _role(message: ChatMessage) -> Role:
    return "system" if message.role == "developer" else message.role


def _parts(message: ChatMessage) -> tuple[list[str], list[Shown]]:
    """What a message says, and what it shows, which only the user's may."""
    if not isinstance(message.content, list):
        return [message.content or ""], []
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    shown = [part for part in message.content if not isinstance(part, TextPart)]
    if shown and message.role != "user":
        why = f"messages: {shown[0].type} part of the {message.role}; put it to the user's"
        raise ApiError(400, why, "messages")
    return texts, shown


def _sampling(request: ChatRequest, spec: ServeSpec) -> Sampling:
    usual = Sampling()
    most = request.max_completion_tokens or request.max_tokens or usual.max_new_tokens
    return Sampling(
        max_new_tokens=min(most, spec.max_new_tokens),
        temperature=usual.temperature if request.temperature is None else request.temperature,
        top_p=usual.top_p if request.top_p is None else request.top_p,
        seed=usual.seed if request.seed is None else request.seed,
    )
