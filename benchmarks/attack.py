"""Attacks a server of its own on loopback, and says how long others waited for an answer and what memory it took.

    python -m benchmarks.attack BUNDLE --seconds 10                  # every attack in turn, one line of JSON each
    python -m benchmarks.attack BUNDLE --only parts --attackers 100

Every fifth attacker leaves after a second, all others at the end. Health is asked for all the time, on a new connection
each time, and so is a control: a process that only accepts and answers. What the control waits is the machine's doing.
`ok` says that no health answer took longer than a second more than the slowest of the control, that none failed, and
that the server and the processes that read media for it never held 300 MiB more together than before the first attack.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, sleep

from benchmarks.hostile import ATTACKS, get

SLOW_S, GROWN_MIB, TICK_S, PATIENCE_S = 1.0, 300, 0.05, 30.0
READER_MIB = 50  # that a reader holds at least when it is ready
CONFIG = """
cameras: {yard: {source: "test://?fps=5", realtime: true, fps: 1, window_s: 2, every_s: 2, prompt: "What?"}}
server: {fetch_hosts: [127.0.0.0/8]}
"""
CONTROL = """
import socket
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
while True:
    with listening.accept()[0] as one:
        one.recv(4096)
        one.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
"""


@dataclass
class Outcome:
    """What an attack did. Seconds; MiB of the server and its readers together, `readers_mib` the most of these alone;
    `statuses` counts what attackers were answered, "" nothing."""

    attack: str
    attackers: int
    asked: int = 0
    failed: int = 0
    slowest_s: float = 0.0
    control_slowest_s: float = 0.0
    idle_mib: float = 0.0
    most_mib: float = 0.0
    readers_mib: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Others were served, and memory held."""
        quick = self.slowest_s <= SLOW_S + self.control_slowest_s
        return quick and self.asked > 0 and self.failed == 0 and self.most_mib <= self.idle_mib + GROWN_MIB


@contextmanager
def server(bundle: Path) -> Iterator[tuple[int, int]]:
    """A server with one camera, in a process of its own: its port and process id."""
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder, "cameras.yaml"), Path(folder, "log")
        config.write_text(CONFIG)
        command = [sys.executable, "-m", "dycoke_edge", "serve", str(bundle), "--config", str(config), "--port", "0"]
        with log.open("wb") as err:
            running = subprocess.Popen(command, stderr=err)
        try:
            while not (said := re.findall(r" on http://\S+:(\d+)", log.read_text())):
                if running.poll() is not None:
                    raise SystemExit(f"the server did not start: {log.read_text()}")
                sleep(0.1)
            while status(int(said[0]), get("/v1/health/ready")) != "200":
                sleep(0.1)
            yield int(said[0]), running.pid
        finally:
            running.terminate()
            running.wait(30)


@contextmanager
def control() -> Iterator[int]:
    """The port of a process that answers whatever comes."""
    running = subprocess.Popen([sys.executable, "-c", CONTROL], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        yield int(running.stdout.readline())
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def told(port: int, request: bytes, seconds: float = PATIENCE_S, most: int = 12) -> bytes:
    """Send a request and return the beginning of its answer, b"" when there is none."""
    answer = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), seconds) as connection:
        with suppress(ConnectionError):  # refused half-way: the answer is there
            connection.sendall(request)
        while len(answer) < most and (block := connection.recv(4096)):
            answer += block
    return answer


def status(port: int, request: bytes, seconds: float = PATIENCE_S) -> str:
    """Send a request and return the status of its answer, "" when there is none."""
    return told(port, request, seconds)[9:12].decode("latin-1")


def strike(port: int, attack: str, attackers: int, seconds: float) -> Counter[str]:
    """Send what an attack sends, from so many threads, for so long."""
    model = re.findall(rb'"id":"([^"]+)"', told(port, get("/v1/models"), most=4096))[0].decode()
    requests, end, statuses = ATTACKS[attack](model), monotonic() + seconds, Counter[str]()
    lock = threading.Lock()

    def go(number: int) -> None:
        while (left := end - monotonic()) > 0:
            patience = max(1.0, left) if number % 5 else 1.0
            found = status(port, requests[number % len(requests)], patience)
            with lock:
                statuses[found] += 1

    threads = [threading.Thread(target=go, args=(number,)) for number in range(attackers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def resident_mib(pid: int) -> tuple[float, float]:
    """What a process and its children hold, and what the children do, in MiB."""
    children = list[str]()
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):  # of each thread that started some
        with suppress(OSError):
            children += listed.read_text().split()
    sizes = list[int]()
    for one in (str(pid), *children):
        with suppress(OSError, IndexError):
            sizes.append(int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text())[0]))
    return sum(sizes) / 1024, sum(sizes[1:]) / 1024


def idle_mib(pid: int) -> float:
    """What a server holds with its readers, once one is ready."""
    while resident_mib(pid)[1] < READER_MIB:
        sleep(0.1)
    return resident_mib(pid)[0]


def attack(name: str, port: int, pid: int, other: int, idle_mib: float, attackers: int, seconds: float) -> Outcome:
    """Attack a server, which held `idle_mib` when it had done nothing yet, and measure it meanwhile."""
    outcome = Outcome(name, attackers, idle_mib=idle_mib)
    command = [sys.executable, "-m", "benchmarks.attack", "strike", str(port), name, str(attackers), str(seconds)]
    striking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.nice(19))
    live = get("/v1/health/live")
    while striking.poll() is None:
        began = monotonic()
        outcome.control_slowest_s = max(outcome.control_slowest_s, _took(other, live)[1])
        good, took = _took(port, live)
        outcome.asked += 1
        outcome.failed += not good
        outcome.slowest_s = max(outcome.slowest_s, took)
        whole, readers = resident_mib(pid)
        outcome.most_mib, outcome.readers_mib = max(outcome.most_mib, whole), max(outcome.readers_mib, readers)
        sleep(max(0.0, TICK_S - (monotonic() - began)))
    assert striking.stdout is not None
    with striking.stdout as said:
        outcome.statuses = json.loads(said.read())
    return outcome


def _took(port: int, request: bytes) -> tuple[bool, float]:
    began = monotonic()
    return status(port, request) == "200", monotonic() - began


def main() -> int:
    """Run the attacks; 1 if one of them did harm."""
    if sys.argv[1:2] == ["strike"]:
        where, kind, count, time = sys.argv[2:]
        print(json.dumps(strike(int(where), kind, int(count), float(time))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", choices=ATTACKS, action="append")
    parser.add_argument("--attackers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    harmed = False
    with server(args.bundle) as (port, pid), control() as other:
        idle = idle_mib(pid)
        for name in args.only or ATTACKS:
            outcome = attack(name, port, pid, other, idle, args.attackers, args.seconds)
            print(json.dumps(asdict(outcome) | {"ok": outcome.ok}), flush=True)
            harmed |= not outcome.ok
    return int(harmed)


if __name__ == "__main__":
    sys.exit(main())
