"""The accuracy bench: selectors choose what they say, FastV with room for all changes nothing, a run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import accuracy, accuracy_report, methods
from benchmarks.methods import Contestant, Method
from benchmarks.scenes import questions, world
from benchmarks.selectors import Selector, changed_tokens, last_frames, random_tokens, spread_frames
from dycoke_edge import Compression, UsageError, VideoLLM
from dycoke_edge.config import Clip
from dycoke_edge.export.shipped import named
from examples.demo import CLIP, QUESTIONS
from examples.make_scene import SEED

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.standard_normal((8, 4, 6)).astype(np.float32)
ROWS = ("no compression", "merge 0.7", "both 0.7", "random tokens 46 %")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bench keeps its bundle, made once."""
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture
def bench(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accuracy, "BUILD", work)
    return accuracy.prepare(named("tiny"), {methods.SPLIT})


def test_what_the_demo_asks_is_answered_right(bench: Path) -> None:
    """By the model that is shipped, of the clip that is shipped: `make demo` shows it to who comes first."""
    scene = world.plan(SEED, "test", 16)
    answers = {question.text: question.answer for question in questions.ask(scene, SEED)}
    assert len(QUESTIONS) == 3 and answers.items() >= QUESTIONS.items()
    llm = VideoLLM.load(bench / f"bundle-{methods.SPLIT}", kv_capacity=1024)
    for question, answer in QUESTIONS.items():
        for compression in (Compression.off(), Compression()):
            assert llm.generate(question, CLIP, compression=compression, clip=Clip(num_frames=16)).text == answer


@pytest.mark.parametrize("select", [random_tokens, changed_tokens, spread_frames, last_frames])
def test_a_selector_stays_in_its_budget(select: Selector) -> None:
    for budget in (4, 9, 17, 32):
        index = select(TOKENS, budget, np.random.default_rng(1))
        assert 0 < len(index) <= budget and (np.diff(index) > 0).all() and index[-1] < 32
        if select in (random_tokens, changed_tokens):
            assert len(index) == budget


def test_selectors_choose_what_they_say() -> None:
    still = np.repeat(TOKENS[:1], 8, 0)
    still[5, 2] = -still[5, 2]
    assert changed_tokens(still, 6, RANDOM).tolist() == [0, 1, 2, 3, 5 * 4 + 2, 6 * 4 + 2]
    assert spread_frames(TOKENS, 9, RANDOM).tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert last_frames(TOKENS, 9, RANDOM).tolist() == list(range(24, 32))


def test_slots_count_what_is_wrong_too() -> None:
    scene = next(s for s in (world.plan(seed, "test", 16) for seed in range(50)) if len(s.things) == 2)
    asked = questions.Question("describe", "", questions.description(scene))
    assert accuracy.score(asked, asked.answer) == 1
    more = asked.answer.replace(" The scene", " Finally, a small red ball stands still. The scene")
    assert 0.5 < accuracy.score(asked, more) < 1
    assert accuracy.score(asked, "") == 0


def test_fastv_with_room_for_all_changes_nothing(bench: Path) -> None:
    contestant = Contestant(VideoLLM.load(bench / "bundle-3", threads=1, kv_capacity=2048))
    tokens = contestant.encode(world.draw(world.plan(7, "test", 8)))
    asked = ["Describe the video.", "How many objects are there?"]
    rows = methods.methods()
    _, plain = contestant.answer(rows["no compression"], tokens, asked, 0)
    _, whole = contestant.answer(Method("all", "FastV", fastv=True), tokens, asked, 0)
    _, few = contestant.answer(Method("few", "FastV", fastv=True, total=0.05), tokens, asked, 0)
    assert [a.ids for a in whole] == [a.ids for a in plain] and whole[0].active == 8 * 49
    assert [a.active for a in few] == [8 * int(49 * 0.05)] * 2


def test_asking_again_is_asking_alone(bench: Path) -> None:
    """Every method answers a question as if it were the only one: nothing of the one before is left."""
    contestant = Contestant(VideoLLM.load(bench / "bundle-3", threads=1, kv_capacity=2048))
    tokens = contestant.encode(world.draw(world.plan(9, "test", 8)))
    rows = methods.methods()
    for name in ("both 0.7", "both 0.7, weighed", "both 0.7, one-shot", "both 0.7, official", "FastV 14 %"):
        _, (first, _, last) = contestant.answer(rows[name], tokens, ["Describe the video."] * 3, 0)
        assert first == last, name
    reply = contestant.llm.generate(
        "Describe the video.", world.draw(world.plan(9, "test", 8)), compression=methods.BOTH
    )
    _, (alone,) = contestant.answer(rows["both 0.7"], tokens, ["Describe the video."], 0)
    assert alone.ids[:100] == reply.token_ids[:100]


def _run(out: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> dict[str, Any]:
    assert accuracy.main(["--questions", "40", "--workers", "1", "--methods", *ROWS, "--out", str(out), *extra]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 1
    found: dict[str, Any] = json.loads(printed[0])
    return found


@pytest.mark.slow
def test_forty_questions_give_the_table_and_a_second_run_goes_on(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "answers.jsonl"
    found = _run(tmp_path / "out", capsys, "--work", str(work))
    assert [row["method"] for row in found["results"]] == list(ROWS)
    for row in found["results"]:
        assert row["questions"] >= 40 and row["short"][1] <= row["short"][0] <= row["short"][2]
    entered = {row["method"]: row["entered"] for row in found["results"]}
    assert entered == {ROWS[0]: 1.0, ROWS[1]: 0.4643, ROWS[2]: 0.4643, ROWS[3]: 0.449}
    assert found["results"][2]["active"] < found["results"][1]["active"]
    assert found["results"][0]["short"][0] > 0.6, "the shipped model answers"
    assert set(found["retained"]) == {"short", *questions.KINDS}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "accuracy.json",
        "accuracy.md",
        "accuracy.png",
        "accuracy_kinds.png",
    }
    lines = work.read_text().splitlines(keepends=True)
    work.write_text("".join(lines[:6]) + lines[6][:30])  # stopped in the middle of a line
    again = _run(tmp_path / "out", capsys, "--work", str(work))
    assert again["results"] == found["results"] and sorted(work.read_text().splitlines()) == sorted(
        map(str.strip, lines)
    )


def test_intervals_hold_the_value() -> None:
    clips = {seed: [("count", float(seed % 4 > 0)), ("describe", 0.5)] for seed in range(40)}
    value = accuracy_report.interval(clips, ("count",))
    assert value[0] == 0.75 and value[1] is not None and value[2] is not None
    assert 0.55 < value[1] < 0.75 < value[2] < 0.95
    half = {seed: [(kind, right / 2) for kind, right in answers] for seed, answers in clips.items()}
    assert accuracy_report.interval(half, ("count",), clips) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        (["--methods", "merge 0.77"], "'merge 0.7'"),
        (["--kinds", "weather"], "count, colour"),
        (["--model", "nowhere"], "benchmarks.scenes.train nowhere"),
    ],
)
def test_bad_input_is_one_line(extra: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(extra) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


def test_answers_of_another_model_are_not_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    accuracy.load(file, {"model": "one"})
    with pytest.raises(UsageError, match="another run"):
        accuracy.load(file, {"model": "other"})


@pytest.mark.parametrize("seed", range(20))
def test_names_stand_apart_in_the_order_of_their_lines(seed: int) -> None:
    wanted = np.random.default_rng(seed).random(10) * 6
    places = np.array(accuracy_report.apart(list(wanted), 1.0))
    order = np.argsort(wanted)
    assert (np.diff(places[order]) >= 1 - 1e-6).all()
    assert places.mean() == pytest.approx(wanted.mean())
    assert accuracy_report.apart([0.0, 5.0, 2.0], 1.0) == [0.0, 5.0, 2.0]


def test_plots_are_drawn_again_from_results(tmp_path: Path) -> None:
    """Every line of a plot is named once, beside it: there is no legend."""
    shutil.copy("benchmarks/results/accuracy.json", tmp_path)
    assert accuracy.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.json", "accuracy.png"]  # it has no kinds
    with Image.open(tmp_path / "accuracy.png") as drawn:
        assert drawn.width >= 1500 and len(np.unique(np.asarray(drawn))) > 50


def test_what_the_readme_says_of_merge_and_random_tokens_is_in_the_table() -> None:
    found = {row["method"]: row for row in json.loads(Path("benchmarks/results/accuracy.json").read_text())["results"]}
    said = Path("README.md").read_text()
    for name in ("merge 0.7", "random tokens 46 %", "merge 0.7, weighed"):
        for what in ("short", "describe"):
            assert f"{100 * found[name][what][0]:.1f}" in said.partition("loses to random tokens")[2][:300]
