"""The machine that figures were measured on: which board, how it is clocked, what it has left. Read from files only.

Everything that a machine lacks is None: a PC has no power mode, and a container may hide what the board has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Orin's GPU has one clock, 17000000.gpu (17000000.ga10b before JetPack 6); Thor's one a domain: this is the shaders'
GPU = re.compile(r"gpu-gpc-\d+|[0-9a-f]+\.(gpu|ga10b|gv11b)")
EMC = re.compile(r"bwmgr|emc|tegra_emc")  # Thor; before it the memory clock is in debugfs, which only root may read
EMC_DEBUG = "sys/kernel/debug/bpmp/debug/clk/emc"


@dataclass(frozen=True)
class Clock:
    """MHz now, and the range it may move in."""

    now: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Board:
    """What can be known of a machine without being root and without running a program."""

    model: str | None  # "NVIDIA Jetson AGX Orin Developer Kit"
    module: str | None  # "p3701-0005"
    soc: str | None  # "tegra234" is Orin, "tegra264" Thor
    l4t: str | None  # "36.4.3"
    jetpack: str | None  # "6.2+b77", where the nvidia-jetpack package is installed
    nvpmodel_id: int | None
    nvpmodel: str | None  # the power mode's name: "MAXN", "15W"
    jetson_clocks: bool | None  # GPU and CPU clocks cannot move
    gpu_clock: Clock | None
    emc_clock: Clock | None  # of the memory
    cpu_clock: Clock | None  # of the fastest core
    throttle_events: int | None  # over-current and under-voltage, since the machine started
    hottest_c: float | None
    cpu: str | None
    load_average: tuple[float, ...] | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    swap_used_bytes: int | None


def read_board(root: Path = ROOT) -> Board:
    """Read the machine whose file system begins at `root`."""
    compatible = (read(root / "proc/device-tree/compatible") or "").split("\0")
    soc = next((name.split(",")[1] for name in compatible if name.startswith("nvidia,tegra")), None)
    gpu, cpu = _gpu_clock(root), list(_cpu_clocks(root))
    mode, memory = _nvpmodel(root), _meminfo(root)
    return Board(
        model=read(root / "proc/device-tree/model"),
        module=next(reversed(re.findall(r"p\d{4}-\d{4}", compatible[0])), None),
        soc=soc,
        l4t=_l4t(root),
        jetpack=_jetpack(root),
        nvpmodel_id=mode[0],
        nvpmodel=mode[1],
        jetson_clocks=all(clock.low == clock.high for clock in (gpu, *cpu)) if soc and gpu and cpu else None,
        gpu_clock=gpu,
        emc_clock=_emc_clock(root),
        cpu_clock=max(cpu, key=lambda clock: clock.now, default=None),
        throttle_events=_throttle_events(root),
        hottest_c=_hottest(root),
        cpu=field(root / "proc/cpuinfo", "model name"),
        load_average=_load(root),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        swap_used_bytes=memory["SwapTotal"] - memory["SwapFree"] if "SwapFree" in memory else None,
    )


def read(file: Path) -> str | None:
    """A short text file without its ending; None where it is not there or the driver refuses."""
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def number(file: Path) -> float | None:
    """A file that holds one number."""
    try:
        return float(read(file) or "")
    except ValueError:
        return None


def field(file: Path, key: str) -> str | None:
    """The first value of `key` in a file of "key: value" lines."""
    for line in (read(file) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def status_bytes(key: str) -> int:
    """A memory figure of this process, e.g. VmHWM (peak resident) or RssAnon, in bytes."""
    return int((field(ROOT / "proc/self/status", key) or "0 kB").split()[0]) * 1024


def reset_peak() -> bool:
    """Let VmHWM begin anew from what is resident now; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _l4t(root: Path) -> str | None:
    """From "# R36 (release), REVISION: 4.3, GCID: ..."."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _jetpack(root: Path) -> str | None:
    packages = read(root / "var/lib/dpkg/status") or ""
    found = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", packages, re.MULTILINE)
    return found[1] if found else None


def _nvpmodel(root: Path) -> tuple[int | None, str | None]:
    """Number and name of the power mode: the service writes "pmode:0002", its configuration names the numbers."""
    found = re.search(r"pmode:(\d+)", read(root / "var/lib/nvpmodel/status") or "")
    if not found:
        return None, None
    names = re.findall(
        r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", read(root / "etc/nvpmodel.conf") or "", re.MULTILINE
    )
    return int(found[1]), dict(names).get(str(int(found[1])))


def _gpu_clock(root: Path) -> Clock | None:
    return next(_devfreq(root, GPU), None)


def _emc_clock(root: Path) -> Clock | None:
    debug = root / EMC_DEBUG
    return next(_devfreq(root, EMC), None) or _clock(debug / "rate", debug / "min_rate", debug / "max_rate", 1e6)


def _devfreq(root: Path, names: re.Pattern[str]) -> Iterator[Clock]:
    for folder in sorted(root.glob("sys/class/devfreq/*")):
        clock = _clock(folder / "cur_freq", folder / "min_freq", folder / "max_freq", 1e6)
        if clock and names.fullmatch(folder.name):
            yield clock


def _cpu_clocks(root: Path) -> Iterator[Clock]:
    for folder in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*")):
        now, low, high = (folder / f"scaling_{name}_freq" for name in ("cur", "min", "max"))
        clock = _clock(now, low, high, 1e3)
        if clock:
            yield clock


def _clock(now: Path, low: Path, high: Path, unit: float) -> Clock | None:
    """A clock out of three files that count in MHz / `unit`."""
    values = [number(file) for file in (now, low, high)]
    mega = [None if value is None else value / unit for value in values]
    return None if mega[0] is None else Clock(mega[0], mega[1], mega[2])


def _throttle_events(root: Path) -> int | None:
    counts = [number(file) for file in root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if known else None


def _hottest(root: Path) -> float | None:
    """A zone that is switched off refuses to be read, or reads far below zero."""
    zones = [number(file) for file in root.glob("sys/class/thermal/thermal_zone*/temp")]
    return max((zone / 1e3 for zone in zones if zone is not None and zone > -50e3), default=None)


def _load(root: Path) -> tuple[float, ...] | None:
    text = read(root / "proc/loadavg")
    return tuple(float(word) for word in text.split()[:3]) if text else None


def _meminfo(root: Path) -> dict[str, int]:
    lines = re.findall(r"^(\w+): +(\d+) kB$", read(root / "proc/meminfo") or "", re.MULTILINE)
    return {name: int(value) * 1024 for name, value in lines}
