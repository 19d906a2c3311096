"""How applications give pictures, conversations and options: the habits of others lead to the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dycoke_edge import Clip, Compression, LiveSpec, Message, Reply, Sampling, UsageError, VideoLLM
from dycoke_edge.runtime.given import scaled
from dycoke_edge.runtime.video import read_image
from tests.test_parity import frames

FRAMES = frames(4)  # uint8 [4, H, W, 3]
SIX = Sampling(max_new_tokens=6)


def same(one: Reply, other: Reply) -> bool:
    return one.token_ids == other.token_ids and one.stats.visual_tokens_kept == other.stats.visual_tokens_kept


@pytest.mark.parametrize("kind", ["arrays", "images", "mixed", "tuple", "paths"])
def test_a_list_of_frames_is_a_clip(llm: VideoLLM, tmp_path: Path, kind: str) -> None:
    images = [Image.fromarray(frame) for frame in FRAMES]
    mixed: list[Any] = [FRAMES[0], images[1], FRAMES[2], images[3]]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    given: dict[str, Any] = {
        "arrays": list(FRAMES),
        "images": images,
        "mixed": mixed,
        "tuple": tuple(images),
        "paths": [tmp_path / f"{number}.png" for number in range(4)],
    }
    assert same(llm.generate("What?", given[kind], sampling=SIX), llm.generate("What?", FRAMES, sampling=SIX))


def test_frames_of_several_sizes(llm: VideoLLM) -> None:
    size = llm.bundle.model.image_size
    given: list[Any] = [np.full((40, 90, 3), 200, np.uint8), Image.new("RGB", (size, size), (200, 200, 200))]
    assert (scaled(given, size) == 200).all()
    assert llm.generate("What?", given, sampling=SIX).stats.frames == 2


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_a_pil_image_of_any_mode_is_what_its_file_is(mode: str, tmp_path: Path) -> None:
    image = Image.new("I;16", (50, 30), 30000) if mode == "I;16" else Image.new("RGB", (50, 30), "teal").convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    assert np.array_equal(scaled([image], 28), read_image(file, 28).pixels)


def test_a_pil_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture: NDArray[np.uint8] = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 255
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert np.array_equal(scaled([opened], 28), read_image(tmp_path / "a.jpg", 28).pixels)


def test_a_pil_image_is_an_image(llm: VideoLLM) -> None:
    image = Image.fromarray(FRAMES[0])
    assert same(llm.generate("What?", image=image, sampling=SIX), llm.generate("What?", image=FRAMES[0], sampling=SIX))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"video": []}, "video is an empty list; give one frame"),
        ({"video": Image.new("RGB", (9, 9))}, "give it as image="),
        (
            {"video": [FRAMES[0], FRAMES[1].astype(np.float32)]},
            r"video\[1\] has float32 .*give uint8 \[H, W, 3\] or a PIL",
        ),
        ({"video": [FRAMES[0], None]}, r"video\[1\] is a NoneType; give"),
        ({"video": FRAMES[0]}, r"video has uint8 .*; give uint8 \[F, H, W, 3\]"),
        ({"video": b"..."}, "video is a bytes; give a path"),
        ({"video": 7}, "video is a int; give a path"),
        ({"image": [FRAMES[0]]}, "image is a list; give a path"),
        ({"image": FRAMES[0][..., 0]}, r"image has uint8 .*; give uint8 \[H, W, 3\] or a PIL image"),
    ],
)
def test_what_is_no_picture_is_one_line(llm: VideoLLM, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        llm.generate("What?", **given)
    assert "\n" not in str(caught.value)


TALK = [
    Message("system", "Be brief."),
    Message("user", "What?", visual=True),
    Message("assistant", "A clip."),
    Message("user", "And then?\nWhy?"),
]


@pytest.mark.parametrize("marked", ["marked", "unmarked"])
def test_messages_may_be_dicts(llm: VideoLLM, marked: str) -> None:
    video = [{"type": "video"}] if marked == "marked" else []
    talk: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*video, {"type": "text", "text": "What?"}]},
        Message("assistant", "A clip."),
        {"role": "user", "content": [{"type": "text", "text": "And then?"}, {"type": "text", "text": "Why?"}]},
    ]
    before, after = llm.text.encode(talk, "video")
    wanted = llm.text.encode(TALK, "video")
    assert np.array_equal(before, wanted[0]) and np.array_equal(after, wanted[1])
    assert same(llm.generate(talk, FRAMES, sampling=SIX), llm.generate(TALK, FRAMES, sampling=SIX))


@pytest.mark.parametrize("one", [{"role": "user", "content": "What?"}, Message("user", "What?")])
def test_one_message_is_a_conversation(llm: VideoLLM, one: Any) -> None:
    assert same(llm.generate(one, FRAMES, sampling=SIX), llm.generate("What?", FRAMES, sampling=SIX))


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"role": "user"}, r"messages\[0\] has no content"),
        ({"content": "What?"}, r"messages\[0\] has no role"),
        ({"role": "user", "content": None}, "content is a NoneType; give a text"),
        ({"role": "user", "content": ["What?"]}, "give a text, or a list of"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}, "part of type 'video_url'"),
        (
            {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
            "where the video=... of the call is shown",
        ),
        ({"role": "bot", "content": "What?"}, "use one of: system, user, assistant"),
        ("What?", "give Message"),
    ],
)
def test_a_dict_that_is_no_message_is_one_line(llm: VideoLLM, said: Any, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        llm.generate([said], FRAMES)


def test_flat_options_are_those_of_the_groups(llm: VideoLLM) -> None:
    flat = llm.generate(
        "What?", "examples/clip.mp4", merge_ratio=0.5, prune_ratio=0, max_new_tokens=5, stop_token_ids=[], fps=2, end=2
    )
    grouped = llm.generate(
        "What?",
        "examples/clip.mp4",
        compression=Compression(merge_ratio=0.5, prune_ratio=0),
        sampling=Sampling(max_new_tokens=5, stop_token_ids=()),
        clip=Clip(fps=2, end=2),
    )
    assert same(flat, grouped) and len(flat.token_ids) == 5 and flat.stats.frames == 4


def test_flat_options_go_before_those_of_a_group(llm: VideoLLM) -> None:
    given = Sampling(max_new_tokens=5, stop_token_ids=())
    assert len(llm.generate("What?", sampling=given, max_new_tokens=3).token_ids) == 3
    assert len(list(llm.stream("What?", sampling=given, max_new_tokens=2))) == 2


def test_flat_options_of_live_video(llm: VideoLLM) -> None:
    live = llm.live(
        Compression(),
        LiveSpec(max_answer_tokens=20),
        memory_frames=2,
        merge_ratio=0,
        max_question_tokens=40,
        gate_threshold=0,
    )
    for number, frame in enumerate(FRAMES):
        live.push(frame, number)
    assert live.num_frames == 2 and live.num_tokens == 2 * llm.bundle.model.tokens_per_frame
    assert len(list(live.ask("What?", max_new_tokens=3, stop_token_ids=()))) == 3


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda llm: llm.generate("?", merge_ration=0.5), "no option merge_ration; did you mean merge_ratio?"),
        (lambda llm: llm.generate("?", max_tokens=5), "did you mean max_new_tokens?"),
        (lambda llm: llm.generate("?", frames=5), "did you mean num_frames?"),
        (lambda llm: llm.generate("?", zzz=5), "Compression and Sampling and Clip"),
        (lambda llm: llm.generate("?", merge_ratio=5), "merge_ratio=5 .*between 0 and 1"),
        (lambda llm: list(llm.stream("?", temprature=1)), "did you mean temperature?"),
        (lambda llm: llm.live(memory=5), "did you mean memory_frames?"),
        (lambda llm: llm.watch("a.mp4", "?", windows_s=5), "did you mean window_s?"),
        (lambda llm: llm.watch("a.mp4", "?", merge_ration=5), "did you mean merge_ratio?"),
        (
            lambda llm: VideoLLM.load("x", kv_capcity=5),
            "VideoLLM.load: there is no option kv_capcity; did you mean kv_",
        ),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(llm: VideoLLM, call: Any, hint: str) -> None:
    with pytest.raises(UsageError, match=hint.replace("?", r"\?")):
        call(llm)
