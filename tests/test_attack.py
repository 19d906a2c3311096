"""Others are served while a server is attacked: the short form of `python -m benchmarks.attack`, on a real process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import attack
from benchmarks.hostile import get
from tests.serving import wait_for

Target = tuple[int, int, int, float]  # port and process of the server, port of the control, MiB when idle


@pytest.fixture(scope="module")
def target(tiny_bundle: Path) -> Iterator[Target]:
    with attack.server(tiny_bundle) as (port, pid), attack.control() as other:
        yield port, pid, other, attack.idle_mib(pid)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "answers"), [
    ("patterns", {"404", "400", "429"}),
    ("bodies", {"405", "413", "400", "429"}),
    ("lines", {"404"}),
    ("parts", {"400", "429"}),
    ("media", {"200", "400", "429"}),
    ("drips", {"400", "429"}),
])  # fmt: skip
def test_others_are_served_meanwhile(target: Target, name: str, answers: set[str]) -> None:
    """Health within a second and memory within 300 MiB. The one test with a clock: what a process that only accepts and
    answers had to wait at the same time is the machine's doing, and is allowed on top."""
    port, pid, other, idle = target
    outcome = attack.attack(name, port, pid, other, idle, attackers=30, seconds=3)
    assert outcome.ok, outcome
    assert set(outcome.statuses) - {""} <= answers and sum(outcome.statuses.values()) >= 30  # it was an attack
    assert attack.status(port, get("/v1/health/ready")) == "200"


@pytest.mark.slow
def test_readers_count_as_memory_of_the_server(target: Target) -> None:
    wait_for(lambda: attack.resident_mib(target[1])[1] >= attack.READER_MIB)  # one that was replaced is on its way
    both, readers = attack.resident_mib(target[1])
    assert both > readers + 20


def test_harm_is_seen() -> None:
    """What `ok` means, value by value."""
    fine = attack.Outcome("x", 30, asked=9, slowest_s=1.4, control_slowest_s=0.5, idle_mib=100, most_mib=400)
    assert fine.ok
    for wrong in ({"slowest_s": 1.6}, {"failed": 1}, {"asked": 0}, {"most_mib": 401}):
        assert not attack.Outcome(**{**vars(fine), **wrong}).ok
