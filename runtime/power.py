"""How much power the machine draws: rails of its power monitors, from sysfs, or else from tegrastats."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from dycoke_edge.runtime.board import ROOT, number, read

Rails = Mapping[str, float]  # watts by name
WHOLE = ("VDD_IN", "VIN")  # what goes into the module (Orin Nano and NX), or into the board (Thor)
INSIDE = ("VDDQ_VDD2_1V8AO",)  # AGX Orin: the memory's, which hangs on VIN_SYS_5V0
INTERVAL = 0.1  # seconds between two readings
PATIENCE = 5.0  # seconds to wait for the first
TEGRASTATS = ("tegrastats", "--interval", str(int(INTERVAL * 1e3)))


def total(rails: Rails) -> tuple[float, list[str]]:
    """Watts of the whole machine and the rails that make them up."""
    names = [name for name in WHOLE if name in rails][:1] or [name for name in rails if name not in INSIDE]
    return sum(rails[name] for name in names), names


class SysfsRails:
    """The channels of every INA power monitor that hwmon knows (INA3221: three each, INA238: one)."""

    def __init__(self, root: Path = ROOT) -> None:
        self._channels = dict(_channels(root))
        self.names = list(self._channels)

    def read(self) -> dict[str, float]:
        """Watts by rail; a rail that cannot be read now is left out."""
        watts = {name: _watts(*channel) for name, channel in self._channels.items()}
        return {name: value for name, value in watts.items() if value is not None}


def _channels(root: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    """(rail, (folder, number of the channel)), those that are connected."""
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = read(folder / "name") or ""
        if not chip.startswith("ina"):
            continue
        labels = {file.name[2:-6]: read(file) for file in sorted(folder.glob("in*_label"))}
        for channel, label in (labels or {"1": read(folder / "label") or chip}).items():
            # a "sum of shunt voltages" has no current, "NC" is not connected
            if label and label != "NC" and _watts(folder, channel) is not None:
                yield label, (folder, channel)


def _watts(folder: Path, channel: str) -> float | None:
    micro = number(folder / f"power{channel}_input")
    if micro is not None:
        return micro / 1e6
    milli = number(folder / f"in{channel}_input"), number(folder / f"curr{channel}_input")
    return None if milli[0] is None or milli[1] is None else milli[0] * milli[1] / 1e6


def tegrastats_rails(line: str) -> dict[str, float]:
    """Watts by rail in a line of tegrastats: "VDD_IN 4983mW/4983mW", now and on average. Before JetPack 5, no mW."""
    found = re.findall(r"\b((?:VDD|VIN|POM)[A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?", line)
    return {name: int(value) / 1e3 for name, value in found}


class Tegrastats:
    """tegrastats, running until it is closed."""

    def __init__(self, command: Sequence[str] = TEGRASTATS) -> None:
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def read(self) -> dict[str, float]:
        """The rails of its next line, empty when it has ended."""
        assert self._process.stdout
        return tegrastats_rails(self._process.stdout.readline())

    def end(self) -> None:
        """Let it print no more; who is reading gets the rest."""
        self._process.terminate()

    def close(self) -> None:
        """Wait for its end, when nobody reads any more."""
        self._process.communicate()


class PowerMeter:
    """Reads rails in a thread of its own, until closed."""

    def __init__(self, read: Callable[[], Rails], interval: float = INTERVAL) -> None:
        self._read, self._interval = read, interval
        self._samples: list[tuple[float, Rails]] = []
        self._closed, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def mean(self, since: float) -> dict[str, float]:
        """Mean watts by rail from `since` (perf_counter) until now; of the last reading if none came since. Empty when
        nothing can be read."""
        self._begun.wait(PATIENCE)
        readings = [rails for time, rails in self._samples if time >= since]
        readings = readings or [rails for _, rails in self._samples[-1:]]
        names = {name: None for rails in readings for name in rails}
        return {name: _mean([rails[name] for rails in readings if name in rails]) for name in names}

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            rails = self._read()
            if rails:
                self._samples.append((perf_counter(), rails))
            self._begun.set()
            if not rails:
                return
            self._closed.wait(self._interval)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def power_meter(root: Path = ROOT) -> Iterator[PowerMeter | None]:
    """A running meter, None where the machine has nothing to read."""
    sysfs = SysfsRails(root)
    if sysfs.names:
        meter = PowerMeter(sysfs.read)
        try:
            yield meter
        finally:
            meter.close()
    elif root == ROOT and shutil.which(TEGRASTATS[0]):
        program = Tegrastats()
        meter = PowerMeter(program.read, 0.0)  # its lines come at its own pace
        try:
            yield meter
        finally:
            program.end()  # first: the meter may wait for a line
            meter.close()
            program.close()
    else:
        yield None
