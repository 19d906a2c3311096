"""Chat: OpenAI's form and client, videos, pictures, live cameras, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

import numpy as np
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from dycoke_edge import Message, VideoLLM
from dycoke_edge.config import Clip, Compression, Sampling
from dycoke_edge.config_camera import Camera
from dycoke_edge.runtime.serve.media import from_data_url
from dycoke_edge.runtime.serve.until import Until
from dycoke_edge.template import ChatTemplate
from tests import clips
from tests.serving import (
    Served,
    data_url,
    error,
    image,
    jpeg,
    messages,
    serving,
    stream,
    text,
    video,
    wait_for,
)

USAGE: Any = {"include_usage": True}
YARD = Camera("yard", "test://?fps=10&motion=3", fps=5.0, window_s=2.0, every_s=60.0, realtime=True)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> VideoLLM:
    return VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)


@pytest.fixture(scope="module")
def served(model: VideoLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("videos")
    clips.write_clip(folder / "clip.mp4")
    with serving(model, [YARD], file_dirs=(str(folder),), max_new_tokens=16, max_frames=16) as server:
        wait_for(lambda: server.watcher.window("yard"))
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames, 2 seconds."""
    return clips.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def mean(content: Any) -> str:
    assert isinstance(content, str)
    return content


# OpenAI's own client


def test_the_openai_client_asks_and_streams(client: openai.OpenAI, tiny_bundle: Path) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed and listed.id == tiny_bundle.name
    whole = client.chat.completions.create(
        model=listed.id, messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=6
    )
    expected = VideoLLM.load(tiny_bundle).generate("Hi", sampling=Sampling(max_new_tokens=6))
    assert whole.choices[0].message.content == expected.text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens == expected.stats.text_tokens
    pieces = list(
        client.chat.completions.create(
            model=listed.id,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert said == expected.text and pieces[-1].usage == whole.usage and not pieces[-1].choices
    assert pieces[-2].choices[0].finish_reason == "length" and len({piece.id for piece in pieces}) == 1


def test_the_openai_client_shows_a_video_and_a_live_camera(client: openai.OpenAI, served: Served, clip: Path) -> None:
    kwargs: Any = {"extra_body": {"media_io_kwargs": {"video": {"num_frames": 8}}}}
    content: Any = [video(data_url(clip)), text()]
    found = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": content}], max_tokens=4, **kwargs
    )
    assert found.model_extra is not None
    assert found.model_extra["dycoke"] == {
        "finish_reason": "length", "vision_tokens_in": 128, "vision_tokens_kept": 32, "frames": 8, "window": None,
    }  # fmt: skip
    content = [stream("yard"), text()]
    found = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": content}], max_tokens=4
    )
    assert found.model_extra is not None
    costs = found.model_extra["dycoke"]
    assert costs["frames"] >= 1 and 0 < costs["vision_tokens_kept"] <= costs["vision_tokens_in"]
    first, last = costs["window"]
    assert first <= last and first.endswith("Z")


@pytest.mark.parametrize("sent_back", ["object", "dump", "words"])
def test_the_openai_client_goes_on_about_a_video(
    client: openai.OpenAI, served: Served, clip: Path, tiny_bundle: Path, sent_back: str
) -> None:
    """A system message and two turns, the video in the first of them."""
    wanted = {"extra_body": {"media_io_kwargs": {"video": {"num_frames": 8}}}}
    first: Any = [video(data_url(clip)), text("What happens?")]
    said: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": first}]
    one = client.chat.completions.create(model=served.model, messages=said, max_tokens=6, **wanted)  # type: ignore
    words = mean(one.choices[0].message.content)
    said.append(
        {
            "object": one.choices[0].message,
            "dump": one.choices[0].message.model_dump(),
            "words": {"role": "assistant", "content": [text(words)]},
        }[sent_back]
    )
    said.append({"role": "user", "content": "And then?"})
    two = client.chat.completions.create(model=served.model, messages=said, max_tokens=6, **wanted)  # type: ignore
    messages = [Message("system", "Be brief."), Message("user", "What happens?", visual=True)]
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048)
    for found in (one, two):
        reply = llm.generate(messages, str(clip), clip=Clip(num_frames=8), sampling=Sampling(max_new_tokens=6))
        assert found.choices[0].message.content == reply.text
        assert found.usage is not None
        assert found.usage.prompt_tokens == reply.stats.text_tokens + reply.stats.visual_tokens_kept
        messages += [Message("assistant", reply.text), Message("user", "And then?")]


def test_the_openai_client_goes_on_about_a_live_camera(client: openai.OpenAI, served: Served) -> None:
    first: Any = [stream("yard"), text("What happens?")]
    found = client.chat.completions.create(
        model=served.model,
        messages=[
            {"role": "user", "content": first},
            {"role": "assistant", "content": "Nothing."},
            {"role": "user", "content": "And now?"},
        ],
        max_tokens=4,
    )
    alone = served.ask(stream("yard"), text("And now?")).json()["usage"]
    assert found.model_extra is not None and found.model_extra["dycoke"]["frames"] >= 1
    assert found.usage is not None and found.usage.completion_tokens == alone["completion_tokens"] == 4


def test_the_openai_client_knows_our_errors(client: openai.OpenAI, served: Served) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-5", messages=[{"role": "user", "content": "Hi"}])
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="n: "):
        ask(model=served.model, messages=[{"role": "user", "content": "Hi"}], n=2)


def test_the_openai_client_leaves_everything_unset(client: openai.OpenAI, served: Served) -> None:
    """Apps hand on every parameter they know, set or not: null is as if left out, and so is what is empty."""
    known = set(get_type_hints(CompletionCreateParamsBase)) | {"stream"}
    unset: Any = {key: None for key in known - {"model", "messages"}}
    message: Any = {"role": "user", "content": "Hi", "name": None}
    found = client.chat.completions.create(model=served.model, messages=[message], **(unset | {"max_tokens": 6}))
    plain = client.chat.completions.create(model=served.model, messages=[message], max_tokens=6)
    assert found.choices == plain.choices and found.usage == plain.usage
    streamed = client.chat.completions.create(
        model=served.model, messages=[message], **(unset | {"max_tokens": 6, "stream": True})
    )
    said = "".join(choice.delta.content or "" for piece in streamed for choice in piece.choices)
    assert said == plain.choices[0].message.content


@pytest.mark.parametrize(
    "options",
    [
        {"stop": [], "tools": [], "functions": [], "modalities": [], "logit_bias": {}, "metadata": {}, "extra": None},
        {"stop": "", "tool_choice": "auto", "parallel_tool_calls": False, "modalities": ["text"], "n": 1},
        {"stop": [None, ""], "stream_options": {"include_usage": None}, "response_format": {"type": "text"}},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0, "service_tier": "auto"},
        {"media_io_kwargs": {"video": {"fps": None}}, "reasoning_effort": "none", "verbosity": "medium"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "tool_calls": []}]},
    ],
)
def test_what_asks_for_nothing_changes_nothing(served: Served, options: dict[str, Any]) -> None:
    plain = served.ask(text("Hi"))
    found = served.ask(text("Hi"), **options)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_answer_before_itself(
    client: openai.OpenAI, served: Served, tiny_bundle: Path, streams: bool, as_list: bool
) -> None:
    """One that begins inside one token and ends inside another."""
    pieces = list(VideoLLM.load(tiny_bundle).stream("Hi", sampling=Sampling(max_new_tokens=16)))
    whole = "".join(piece.text for piece in pieces)
    cut = len("".join(piece.text for piece in pieces[:9]))
    stop = whole[cut - 2 : cut + 2]
    assert len(stop) == 4 and whole.find(stop) == cut - 2, "choose another place"
    options: Any = {"stop": ["nowhere in it", stop] if as_list else stop, "max_tokens": 60}
    ask: Any = {"model": served.model, "messages": [{"role": "user", "content": "Hi"}]}
    if streams:
        chunks = list(client.chat.completions.create(**ask, **options, stream=True, stream_options=USAGE))
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        finish, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        found = client.chat.completions.create(**ask, **options)
        said, finish, usage = found.choices[0].message.content, found.choices[0].finish_reason, found.usage
    assert said == whole[: cut - 2] and finish == "stop"
    assert usage.completion_tokens < 60, "and little more was computed: the model is a few tokens ahead"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stops", "before", "reached"),
    [
        (("\n\n",), "One\nTwo", True),
        (("Two", "Three"), "One\n", True),
        (("Three", "Two\n\nT"), "One\n", True),
        (("e\nTwo", "\n"), "One", True),  # the one that is complete first
        (("Threes", "Four"), "One\nTwo\n\nThree", False),
        ((), "One\nTwo\n\nThree", False),
    ],
)
def test_text_until_a_stop_string(size: int, stops: tuple[str, ...], before: str, reached: bool) -> None:
    text, until, said = "One\nTwo\n\nThree", Until(stops), ""
    for start in range(0, len(text), size):
        said += until.push(text[start : start + size])
        assert before.startswith(said), "nothing of a stop string goes out"
    assert said + until.rest() == before and until.reached is reached


# What is shown


def said(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def answer(served: Served, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = served.ask(*parts, **more)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_video_is_answered_as_run_does(served: Served, clip: Path, tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048)
    expected = llm.generate("What?", video=str(clip), clip=Clip(num_frames=8), sampling=Sampling(max_new_tokens=4))
    options = {"media_io_kwargs": {"video": {"num_frames": 8}}}
    found = answer(served, video(data_url(clip)), text(), **options)
    assert found["choices"][0]["message"]["content"] == expected.text
    from_file = answer(served, video(f"file://{served.spec.file_dirs[0]}/clip.mp4"), text(), **options)
    assert from_file["choices"] == found["choices"]


def test_a_picture_and_a_row_of_pictures(served: Served, tiny_bundle: Path) -> None:
    pictures = [jpeg(clips.mark(index)) for index in (1, 2, 3)]
    found = answer(served, image(data_url(pictures[0], "image/jpeg")), text())
    assert found["dycoke"]["frames"] == 1 and found["dycoke"]["vision_tokens_in"] == 16
    row = ",".join(data_url(picture, "").split(",")[1] for picture in pictures)
    found = answer(served, video(f"data:video/jpeg;base64,{row}"), text())
    assert found["dycoke"]["frames"] == 3


def test_pictures_of_a_message_are_one_clip_in_their_order(client: openai.OpenAI, served: Served) -> None:
    """As apps and evaluation harnesses send a video, with text before, between and behind them."""
    pictures = [jpeg(clips.mark(index)) for index in (1, 2, 3, 4, 5)]
    row = ",".join(data_url(picture, "").split(",")[1] for picture in pictures)
    as_video = served.ask(text("Look:"), video(f"data:video/jpeg;base64,{row}"), text("What?")).json()
    shown = [image(data_url(picture, "image/jpeg")) for picture in pictures]
    content: Any = [text("Look:"), *shown, text("What?")]
    found = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": content}], max_tokens=4
    )
    assert found.choices[0].message.content == as_video["choices"][0]["message"]["content"]
    assert found.model_extra is not None and found.model_extra["dycoke"] == as_video["dycoke"]
    assert as_video["dycoke"]["frames"] == 5 and as_video["dycoke"]["vision_tokens_in"] == 5 * 16
    paper: Any = {"dycoke": {"merge_ratio": 0.7}}  # which looks back further, and so differs by more
    forward, turned = (served.ask(*row, text(), **paper).json()["choices"] for row in (shown, shown[::-1]))
    assert forward != turned
    first = said("user", shown[0], text("And?"), shown[1])
    again = served.ask(messages=[first, said("assistant", "Nothing."), said("user", "What?")]).json()
    assert again["dycoke"]["frames"] == 2


def in_lines(text: str) -> str:
    return "\r\n ".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        in_lines,
        lambda text: "\n" + text,
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: quote(text, safe=""),
        lambda text: in_lines(text.replace("+", "-").replace("/", "_").rstrip("=")),
    ],
    ids=["lines", "line first", "URL-safe", "no padding", "percent", "all"],
)
def test_base64_as_it_is_written(served: Served, change: Callable[[str], str]) -> None:
    picture = jpeg(clips.mark(2)) + b"\xfb\xff\xfe!"  # padding, + and / in its base64
    plain = base64.b64encode(picture).decode()
    assert {"+", "/", "="} <= set(plain) and from_data_url(f"data:image/jpeg;base64,{change(plain)}") == picture
    found = served.ask(image(f"data:image/jpeg;charset=x;BASE64,{change(plain)}"), text())
    assert found.json()["choices"] == served.ask(image(data_url(picture)), text()).json()["choices"]


@pytest.mark.parametrize(
    ("wanted", "frames"),
    [
        ({}, 16),  # 32 is the default, the server allows 16, the clip has 24
        ({"num_frames": 5}, 5),
        ({"num_frames": 1_000_000}, 16),
        ({"fps": 4}, 8),
        ({"fps": 1e9}, 16),
        ({"fps": 4, "num_frames": 3}, 3),
        ({"fps": 1e-9}, 16),
    ],
)
def test_frames_are_clamped(served: Served, clip: Path, wanted: dict[str, Any], frames: int) -> None:
    found = answer(served, video(data_url(clip)), text(), media_io_kwargs={"video": wanted}, max_tokens=1)
    assert found["dycoke"]["frames"] == frames


def test_an_answer_is_no_longer_than_allowed(served: Served) -> None:
    assert answer(served, text(), max_tokens=100_000)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages_are_those_of_the_template(served: Served, tiny_bundle: Path, role: str) -> None:
    found = answer(served, messages=[said(role, "Be brief."), said("user", "Hi")], max_tokens=6)
    messages = [Message("system", "Be brief."), Message("user", "Hi")]
    expected = VideoLLM.load(tiny_bundle).generate(messages, sampling=Sampling(max_new_tokens=6))
    assert found["choices"][0]["message"]["content"] == expected.text


def test_a_part_of_the_window(served: Served) -> None:
    wait_for(lambda: served.watcher.status()["cameras"]["yard"]["memory_frames"] >= 5)
    assert answer(served, stream("yard", last_s=0.5), text())["dycoke"]["frames"] <= 4


def test_sampling_is_obeyed(served: Served) -> None:
    def words(**options: Any) -> str:
        return mean(answer(served, text(), max_tokens=8, **options)["choices"][0]["message"]["content"])

    assert words(temperature=2, seed=1) == words(temperature=2, seed=1) != words(temperature=2, seed=2)
    assert words(temperature=2, top_p=0) == words()


# What is refused

JPEG = data_url(jpeg(clips.mark(1)), "image/jpeg")
PNG = data_url(b"\x89PNG\r\n\x1a\nnothing more", "image/png")


@pytest.mark.parametrize(
    ("parts", "options", "said"),
    [
        ([text()], {"tools": [{"type": "function"}]}, "tools: unknown key"),
        ([text()], {"logit_bias": {"50256": -100}}, "logit_bias: unknown key"),
        ([text()], {"logprobs": True, "top_logprobs": 2}, "logprobs: "),
        ([text()], {"reasoning_effort": "high"}, "reasoning_effort: input should be 'none'"),
        ([text()], {"modalities": ["text", "audio"]}, "modalities"),
        ([text()], {"tool_choice": "required"}, "tool_choice: "),
        ([text()], {"stop": ["a", "b", "c", "d", "e"]}, "stop: list should have at most 4 items"),
        ([text()], {"stop": 5}, "stop: "),
        ([text()], {"stop": ["a" * 257]}, "stop.0: "),
        ([text()], {"response_format": {"type": "json_object"}}, "response_format.type: "),
        ([text()], {"temperature": 3}, "temperature: "),
        ([text()], {"max_tokens": 0}, "max_tokens: "),
        ([text()], {"media_io_kwargs": {"video": {"fps": -1}}}, "media_io_kwargs.video.fps: "),
        ([text()], {"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio: unknown key"),
        ([text()], {"messages": []}, "messages: "),
        ([text()], {"messages": [said("tool", "Hi")]}, "messages.0.role: "),
        ([text(" ")], {}, "nothing is asked"),
        ([text("x" * 9000)], {}, "9000 letters; at most 8000"),
        ([{"type": "input_audio"}], {}, "messages.0.content"),
        ([image(PNG), video(PNG), text()], {}, "2 pictures, videos or streams"),
        ([video(PNG), video(PNG), text()], {}, "several image_url in one message are a clip"),
        ([image(JPEG), image(PNG), text()], {}, "image_url, picture 2: "),
        ([image(JPEG)] * 17 + [text()], {}, "image_url: 17 pictures; at most 16"),
        ([image(PNG), text()], {}, "image_url: "),
        ([image("data:image/png;base64,@@@"), text()], {}, "base64 of this data URL is damaged"),
        ([image("data:image/png;base64,AA AA"), text()], {}, "base64 of this data URL is damaged"),
        ([image("data:image/png,abc"), text()], {}, "must be base64"),
        ([image("nonsense"), text()], {}, "give a data: URL"),
        ([video(data_url(b"not a video")), text()], {}, "cannot be read as a video"),
        ([video("data:video/jpeg;base64," + ",".join(["eA=="] * 17)), text()], {}, "17 pictures; at most 16"),
        ([text("<video> <video>")], {}, "places for a video"),
        ([stream("yard", last_s=1e6), text()], {}, "last_s=1e+06"),
        ([stream("yard", last_s=-1), text()], {}, "last_s: "),
        ([stream("yard"), text("x" * 5000)], {"max_tokens": 2}, "--max-question-tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    served: Served, parts: list[dict[str, Any]], options: dict[str, Any], said: str
) -> None:
    assert said in error(served.ask(*parts, **options), 400)["message"]


HI, HELLO = said("user", "Hi"), said("assistant", "Hello")


@pytest.mark.parametrize(
    ("conversation", "why"),
    [
        ([HELLO], "the user's comes last"),
        ([HI, HELLO], "the user's comes last"),
        ([said("system", "Hi")], "the user's comes last"),
        ([HI, HELLO, said("user", " ")], "nothing is asked"),
        ([HI | {"content": None}, HELLO, HI], "messages[0] is empty"),
        ([HI, {"role": "assistant", "content": None}, HI], "messages[1] is empty"),
        ([HI, HELLO | {"tool_calls": [{"id": "1"}]}, HI], "messages.1.tool_calls: "),
        ([HI, HELLO | {"reasoning": "x"}, HI], "messages.1.reasoning: unknown key"),
        ([said("user", image(PNG), text()), HELLO, said("user", image(PNG), text())], "2 pictures, videos or streams"),
        ([said("user", stream("yard"), text()), HELLO, said("user", video(PNG), text())], "one is supported"),
        ([said("system", image(PNG)), HI], "image_url part of the system"),
        ([HI, said("assistant", stream("yard")), HI], "stream part of the assistant"),
        ([HI, said("assistant", "<video>"), HI], "messages[1] of the assistant has a place"),
        ([HI, HELLO, said("user", "<video>?")], "none was given"),
        ([said("user", "x" * 4000), said("assistant", "x" * 4000), HI], "8002 letters; at most 8000"),
        ([HI, said("assistant", "x" * 7000), HI], "kv_capacity=2048"),
        ([said("system", "Hi"), said("user", stream("yard"), text())], "comes before the live video"),
        ([HI, HELLO, said("user", stream("yard", last_s=0.5), text())], "comes before the live video"),
        ([said("user", stream("yard"), text()), said("assistant", "x" * 300), HI], "--max-question-tokens"),
        ([HI, HELLO] * 32 + [HI], "messages: "),
    ],
)
def test_what_no_conversation_is(served: Served, conversation: list[Any], why: str) -> None:
    assert why in error(served.ask(messages=conversation), 400)["message"]


def test_a_template_without_system_messages_says_so(tiny_bundle: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=512)
    own = (tiny_bundle / "chat_template.jinja").read_text()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    ignores = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    with serving(llm) as served:
        for before, why in ((refuses, "System role not supported"), (ignores, "leaves out what the system says")):
            llm.text._template = ChatTemplate(before + own)
            assert why in error(served.ask(messages=[said("system", "Be brief."), HI]), 400)["message"]
            assert answer(served, messages=[HI, HELLO, HI])["usage"]["completion_tokens"] == 4
        assert served.http.get("/v1/health/ready").status_code == 200


def test_what_is_not_there_is_not_found(served: Served) -> None:
    assert error(served.ask(stream("attic"), text()), 404)["param"] == "stream_id"
    assert error(served.http.get("/v1/models/gpt-5"), 404)["code"] == "model_not_found"
    error(served.http.get("/v1/nothing"), 404)
    error(served.http.delete("/v1/models"), 405)


def test_bad_prompts_do_not_make_the_server_unready(served: Served) -> None:
    for _ in range(4):
        error(served.ask(text("<video> <video>")), 400)
    assert served.http.get("/v1/health/ready").status_code == 200


def test_a_stale_camera_is_not_asked_about(tiny_bundle: Path) -> None:
    away = Camera("away", "rtsp://127.0.0.1:9/none")
    with serving(VideoLLM.load(tiny_bundle, kv_capacity=1024), [away]) as served:
        found = served.ask(stream("away"), text())
        assert error(found, 503)["code"] == "stale"


def test_an_error_on_the_way_is_no_text(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VideoLLM.stream

    def fails(self: VideoLLM, *arguments: Any, **options: Any) -> Iterator[Any]:
        pieces = real(self, *arguments, **options)
        yield next(pieces)
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(VideoLLM, "stream", fails)
    response = served.ask(text(), stream=True)
    found = messages(response.text)
    assert response.status_code == 200 and found[-1]["error"]["type"] == "server_error"
    assert "hunter2" not in response.text
    assert error(served.ask(text()), 500)["code"] == "internal_error"


COMPRESSED: Any = {"media_io_kwargs": {"video": {"num_frames": 8}}, "max_tokens": 8}


def test_a_request_has_its_own_compression(served: Served, clip: Path, tiny_bundle: Path) -> None:
    llm, ask = VideoLLM.load(tiny_bundle, kv_capacity=2048), (video(data_url(clip)), text())
    for given in (
        {"merge_ratio": 0.9, "prune_ratio": 0},
        {"merge_ratio": 0, "prune_ratio": 0.5, "positions": None},
        {"mode": "official", "merge_ratio": 0.3},
        {"budget": 0.5, "keep": "attention"},
        {"mode": "paper"},
    ):
        found = answer(served, *ask, dycoke=given, **COMPRESSED)
        compression = Compression(**given)
        sampling = Sampling(max_new_tokens=8)
        expected = llm.generate("What?", str(clip), None, compression, sampling, Clip(num_frames=8))
        assert found["choices"][0]["message"]["content"] == expected.text
        assert found["dycoke"]["vision_tokens_kept"] == expected.stats.visual_tokens_kept
    before = answer(served, *ask, **COMPRESSED)["dycoke"]
    assert answer(served, *ask, dycoke={}, **COMPRESSED)["dycoke"] == before, "the one before it left nothing behind"


def test_a_request_goes_by_the_configuration_where_it_says_nothing(tiny_bundle: Path, clip: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048)
    with serving(llm, compression=Compression(merge_ratio=0.5)) as served:
        kept = [
            answer(served, video(data_url(clip)), text(), dycoke=given, **COMPRESSED)["dycoke"]["vision_tokens_kept"]
            for given in (None, {"prune_ratio": 0}, {"merge_ratio": 0.5}, {"merge_ratio": 0.9}, {"merge_ratio": 0})
        ]
    assert kept[0] == kept[1] == kept[2] and kept[3] < kept[0] < kept[4] == 8 * 16


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"merge_ratio": 0.6}, "merge_ratio=0.6 (--merge-ratio) is not in this bundle, which has 0 0.3 0.5 0.7 0.9"),
        ({"merge_ratio": 1.5}, "dycoke.merge_ratio: "),
        ({"merge_ratio": -0.1}, "dycoke.merge_ratio: "),
        ({"prune_ratio": 2}, "dycoke.prune_ratio: "),
        ({"prune_ratio": "much"}, "dycoke.prune_ratio: "),
        ({"refresh_threshold": -2}, "dycoke.refresh_threshold: "),
        ({"mode": "ours"}, "dycoke.mode: "),
        ({"positions": "lost"}, "dycoke.positions: "),
        ({"weigh": True, "mode": "official"}, "dycoke: weigh"),
        ({"mode": "official"}, "official"),
        ({"K": 0.7}, "dycoke.K: unknown key"),
        ("fast", "dycoke: "),
    ],
)
def test_a_compression_that_cannot_be(served: Served, given: Any, why: str) -> None:
    assert why in error(served.ask(image(JPEG), text(), dycoke=given), 400)["message"]


def test_a_live_camera_keeps_its_compression(served: Served) -> None:
    assert "leave it out" in error(served.ask(stream("yard"), text(), dycoke={"merge_ratio": 0.5}), 400)["message"]
    assert served.ask(stream("yard"), text(), dycoke={}).status_code == 200
    assert served.watcher.compression == Compression()


def test_frames_given_are_those_of_the_file(clip: Path) -> None:
    """The clip is what it should be, or the counts above mean nothing."""
    assert clips.marks(clip, num_frames=8) == list(np.arange(8) * 24 // 8)
