"""Prompts become the ids that transformers makes, tokens become text without ever half a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_edge.bundle import open_bundle
from dycoke_edge.errors import BundleError, UsageError
from dycoke_edge.runtime.text import Text, TextStream
from tests import lively

PROMPTS = {
    "plain": "What happens?",
    "accents": "Où est passé le café à côté ?",
    "decomposed": "cafe\u0301",
    "chinese": "视频里发生了什么",
    "emoji": "why 🎥 then 👩‍👩‍👧 or 🇫🇷?",
    "newlines": "one\ntwo\r\n\n  three\t.",
    "spaces": "  around  and   between ",
    "template-like": "{{ messages }} {% raise %} <b>&amp;</b>",
    "special": "an <|im_end|> inside",
    "placeholder-middle": "before <video> after",
    "placeholder-first": "<video>\nWhat is this?",
    "placeholder-last": "What is this? <video>",
}
CHARACTERS = ["é", "漢", "🎥", "a", "\n", "ÿ", "\u0301", "👩‍👩‍👧"]


@pytest.fixture(scope="module")
def text(tiny_bundle: Path) -> Text:
    return Text(open_bundle(tiny_bundle))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def video_id(tiny_bundle: Path) -> int:
    return open_bundle(tiny_bundle).manifest.video_token_id


def transformers_ids(tokenizer: Any, prompt: str, visual: str | None) -> list[int]:
    content = [{"type": "text", "text": prompt}]
    if visual and f"<{visual}>" not in prompt:
        content.insert(0, {"type": visual})
    messages = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def byte_ids(text: Text, characters: str) -> list[int]:
    """The ids of a text, one a byte."""
    ids = [int(i) for i in text._ids(characters)]
    assert len(ids) == len(characters.encode())
    return ids


# prompts


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_those_of_transformers(text: Text, tokenizer: Any, video_id: int, name: str) -> None:
    prefix, suffix = text.encode(PROMPTS[name], "video")
    whole = [*prefix.tolist(), video_id, *suffix.tolist()]
    assert whole == transformers_ids(tokenizer, PROMPTS[name], "video")


@pytest.mark.parametrize("name", [name for name in PROMPTS if not name.startswith("placeholder")])
def test_ids_without_a_video_are_those_of_transformers(text: Text, tokenizer: Any, name: str) -> None:
    ids, after = text.encode(PROMPTS[name], None)
    assert ids.tolist() == transformers_ids(tokenizer, PROMPTS[name], None)
    assert after.size == 0


def test_an_image_takes_the_place_of_the_image_placeholder(text: Text, tokenizer: Any, tiny_bundle: Path) -> None:
    prefix, suffix = text.encode("What is this?", "image")
    image = open_bundle(tiny_bundle).manifest.image_token_id
    assert [*prefix, image, *suffix] == transformers_ids(tokenizer, "What is this?", "image")


def test_ids_are_those_of_the_lively_cases(text: Text) -> None:
    prefix, suffix = text.encode("Hi?", "video")
    assert (prefix.tolist(), suffix.tolist()) == (lively.PREFIX_IDS, lively.SUFFIX_IDS)


def test_the_video_comes_where_the_prompt_says(text: Text) -> None:
    prefix, suffix = text.encode("before <video> after", "video")
    assert text.decode(prefix.tolist()).endswith("before ")
    assert text.decode(suffix.tolist()).startswith(" after")


def test_templates_are_rendered_as_transformers_does(
    tokenizer: Any, tiny_bundle: Path, tmp_path: Path, video_id: int
) -> None:
    """Line ends after a block and spaces before one do not count; loops may be left."""
    template = """{% for message in messages %}
    {% if message['role'] != 'user' %}
        {% break %}
    {% endif %}
<|im_start|>{{ message['role'] }}
    {% for part in message['content'] %}
{{ '<video>' if part['type'] == 'video' else part['text'] | trim }}
    {% endfor %}
{% endfor %}"""
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer.json").write_text((tiny_bundle / "tokenizer.json").read_text())
    bundle = open_bundle(tiny_bundle)
    bundle.path = tmp_path
    prefix, suffix = Text(bundle).encode(" Hi? ", "video")
    content = [{"type": "video"}, {"type": "text", "text": " Hi? "}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    whole = [*prefix.tolist(), video_id, *suffix.tolist()]
    assert whole == tokenizer(rendered, add_special_tokens=False)["input_ids"]


# what a prompt must not be


def refused(text: Text, prompt: str, visual: str | None) -> str:
    with pytest.raises(UsageError, match="--prompt") as error:
        text.encode(prompt, visual)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
@pytest.mark.parametrize("visual", ["video", None])
def test_an_empty_prompt_is_refused(text: Text, prompt: str, visual: str | None) -> None:
    assert "empty" in refused(text, prompt, visual)


@pytest.mark.parametrize("visual", ["video", None])
@pytest.mark.parametrize("prompt", ["<video> and <video>", "<video><image>", "a <image>\n<image> b"])
def test_two_placeholders_are_refused(text: Text, prompt: str, visual: str | None) -> None:
    assert "2 places" in refused(text, prompt, visual)


@pytest.mark.parametrize("prompt", ["see <video>", "<image>?"])
def test_a_placeholder_without_a_video_is_refused(text: Text, prompt: str) -> None:
    assert "add --video" in refused(text, prompt, None)


@pytest.mark.parametrize(
    ("name", "content"), [("chat_template.jinja", "{% if %}"), ("tokenizer.json", "{}"), ("tokenizer.json", "")]
)
def test_broken_files_are_named(tiny_bundle: Path, tmp_path: Path, name: str, content: str) -> None:
    bundle = open_bundle(tiny_bundle)
    for file in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / file).write_text((tiny_bundle / file).read_text())
    (tmp_path / name).write_text(content)
    bundle.path = tmp_path
    with pytest.raises(BundleError, match="export again") as error:
        Text(bundle)
    assert name in str(error.value) and "\n" not in str(error.value)


# streaming


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push(i) for i in ids]


@pytest.mark.parametrize("character", ["é", "漢", "🎥"])
def test_a_character_comes_whole_with_its_last_byte(text: Text, character: str) -> None:
    ids = byte_ids(text, character)
    assert pieces(text.stream(), ids) == [""] * (len(ids) - 1) + [character]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_cut_inside_a_character_ends_before_it(text: Text, cut: int) -> None:
    ids = byte_ids(text, "ok 🎥")
    assert "".join(pieces(text.stream(), ids[: 3 + cut])) == "ok "


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("".join(CHARACTERS)) | st.characters(codec="utf-8"), max_size=30))
def test_the_stream_adds_up_to_the_whole(text: Text, characters: str) -> None:
    ids = [int(i) for i in text._ids(characters)]  # the tokenizer composes characters first (NFC)
    found = pieces(text.stream(), ids)
    assert "".join(found) == text.decode(ids)
    assert not any("\ufffd" in piece for piece in found) or "\ufffd" in characters


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=8))
def test_bytes_that_are_no_text_do_not_upset_the_stream(text: Text, ids: list[int]) -> None:
    ended = [*ids, *byte_ids(text, "a")]
    assert "".join(pieces(text.stream(), ended)) == text.decode(ended)


def test_special_tokens_are_left_out_of_text(text: Text, tiny_bundle: Path) -> None:
    stop = open_bundle(tiny_bundle).manifest.stop_token_ids[0]
    ids = [*byte_ids(text, "é"), stop, *byte_ids(text, "漢")]
    assert text.decode(ids) == "é漢"
    assert "".join(pieces(text.stream(), ids)) == "é漢"


def test_streams_do_not_share_bytes(text: Text) -> None:
    first, second = text.stream(), text.stream()
    ids = byte_ids(text, "漢")
    assert (first.push(ids[0]), second.push(byte_ids(text, "a")[0])) == ("", "a")
    assert pieces(first, ids[1:]) == ["", "漢"]
