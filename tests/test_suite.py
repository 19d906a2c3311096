"""The GPU suite's way with its steps; what they measure is tested with what measures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from time import sleep

import pytest

from benchmarks import suite
from benchmarks.suite import GPU_TESTS, STEPS, Step


def step(name: str, code: str, limit: float = 60, shape: str | None = None) -> Step:
    return Step(name, ("-c", code, "{out}"), limit, shape)


def test_a_step_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    count = "import pathlib, sys; file = pathlib.Path(sys.argv[1]) / 'count'; file.open('a').write('x')"
    steps = [step("bad", "raise SystemExit(3)"), step("slow", "import time; time.sleep(60)", 0.5), step("good", count)]
    for _ in range(2):
        ended = suite.run(steps, tmp_path / "build", tmp_path / "out")
        assert ended == {"bad": "exit status 3", "slow": "took more than 0.5 s", "good": "done"}
    assert (tmp_path / "out" / "count").read_text() == "x"
    assert json.loads((tmp_path / "out" / "suite.json").read_text()) == ended


def test_nothing_timed_runs_while_models_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'log').open('a').write('{} ')"

    def make(self: suite.Models, shape: str, build: Path, out: Path) -> int:
        while not (out / "log").exists():  # until the step without a model has run
            sleep(0.01)
        sleep(0.5)  # a step that did not wait would be done
        with (out / "log").open("a") as log:
            log.write(f"{shape} ")
        return 0

    monkeypatch.setattr(suite.Models, "_make", make)
    shapes = {"tests": None, "small": "0.5b", "large": "7b"}
    steps = [step(name, noted.format(name), shape=shape) for name, shape in shapes.items()]
    suite.run(steps, tmp_path / "build", tmp_path / "out")
    assert (tmp_path / "out" / "log").read_text().split() == ["tests", "0.5b", "7b", "small", "large"]


def test_a_step_without_models_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()

    def make(self: suite.Models, shape: str, build: Path, out: Path) -> int:
        made.append(shape)
        return shape == "7b"

    monkeypatch.setattr(suite.Models, "_make", make)
    steps = [step("a", "", shape="0.5b"), step("b", "", shape="7b"), step("c", "")]
    ended = suite.run(steps, tmp_path / "build", tmp_path / "out")
    assert ended == {"a": "done", "b": "its models could not be made, see models-*.log", "c": "done"}
    assert made == ["0.5b", "7b"]


class Ran(Exception):
    """Options were taken."""


@pytest.mark.parametrize("one", [one for one in STEPS if one.command[1] != "pytest"], ids=lambda one: one.name)
def test_the_benchmarks_take_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: Step) -> None:
    def ran(*arguments: object) -> None:
        raise Ran

    benchmark = importlib.import_module(one.command[1])
    monkeypatch.setattr(benchmark, "run", ran)
    monkeypatch.setattr(sys, "argv", [part.format(build=tmp_path, out=tmp_path) for part in one.command[1:]])
    with pytest.raises(Ran):
        benchmark.main()


def test_all_tests_for_a_gpu_are_in_the_files_that_are_run_on_one(request: pytest.FixtureRequest) -> None:
    files = {f"tests/{item.path.name}" for item in request.session.items if item.get_closest_marker("gpu")}
    assert files <= set(GPU_TESTS)  # in a run of all tests they are all here
