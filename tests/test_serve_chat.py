"""Chat: OpenAI's form and client, videos, pictures, live cameras, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from dycoke_edge import Message, VideoLLM
from dycoke_edge.config import Clip, Sampling
from dycoke_edge.config_camera import Camera
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
        "vision_tokens_in": 128, "vision_tokens_kept": 56, "frames": 8, "window": None,
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

PNG = data_url(b"\x89PNG\r\n\x1a\nnothing more", "image/png")


@pytest.mark.parametrize(
    ("parts", "options", "said"),
    [
        ([text()], {"tools": []}, "tools: unknown key"),
        ([text()], {"stop": ["x"]}, "stop: unknown key"),
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
        ([image(PNG), image(PNG), text()], {}, "2 pictures, videos or streams"),
        ([image(PNG), text()], {}, "image_url: "),
        ([image("data:image/png;base64,@@@"), text()], {}, "base64 of this data URL is damaged"),
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


def test_frames_given_are_those_of_the_file(clip: Path) -> None:
    """The clip is what it should be, or the counts above mean nothing."""
    assert clips.marks(clip, num_frames=8) == list(np.arange(8) * 24 // 8)
