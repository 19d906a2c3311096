"""Boards, read from files laid out as on a real Orin and Thor (JetPack 6.2 and 7), and from a machine without them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dycoke_edge.runtime.board import Clock, read_board, reset_peak, status_bytes
from dycoke_edge.runtime.power import PowerMeter, SysfsRails, Tegrastats, power_meter, tegrastats_rails, total

CONF = """\
# comment: < POWER_MODEL ID=7 NAME=WRONG >
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=15W >
< POWER_MODEL ID=2 NAME=30W >
< PM_CONFIG DEFAULT=2 >
"""
DPKG = """\
Package: bash
Status: install ok installed
Version: 5.1

Package: nvidia-jetpack
Status: install ok installed
Section: metapackages
Version: 6.2+b77
"""
HWMON = "sys/class/hwmon"
DEVFREQ = "sys/class/devfreq"
CPUFREQ = "sys/devices/system/cpu/cpufreq"


def lay(root: Path, files: dict[str, str]) -> Path:
    """Write files below a root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def clock(folder: str, now: int, low: int, high: int, prefix: str = "", ending: str = "_freq") -> dict[str, str]:
    values = {"cur": now, "min": low, "max": high}
    return {f"{folder}/{prefix}{name}{ending}": f"{value}\n" for name, value in values.items()}


def ina3221(folder: str, channels: list[tuple[str, int, int] | None]) -> dict[str, str]:
    """Labels, mV and mA of three channels; None is a disabled one. The fourth is the sum of shunts, in uV."""
    files = {f"{folder}/name": "ina3221\n", f"{folder}/in7_label": "sum of shunt voltages\n"}
    files[f"{folder}/in7_input"] = "12\n"
    for number, channel in enumerate(channels, 1):
        if channel:
            label, milli_volt, milli_ampere = channel
            files[f"{folder}/in{number}_label"] = f"{label}\n"
            files[f"{folder}/in{number}_input"] = f"{milli_volt}\n"
            files[f"{folder}/curr{number}_input"] = f"{milli_ampere}\n"
    return files


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """AGX Orin, 30 W mode, clocks free to move."""
    return lay(
        tmp_path / "orin",
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
            "proc/meminfo": "MemTotal:       64349040 kB\nMemAvailable:   60000000 kB\n"
            "SwapTotal:      32174512 kB\nSwapFree:       32174500 kB\nHugePages_Total:       0\n",
            "proc/loadavg": "0.52 0.58 0.59 1/733 12345\n",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "etc/nvpmodel.conf": CONF,
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
            "var/lib/dpkg/status": DPKG,
            **clock(f"{DEVFREQ}/17000000.gpu", 306000000, 306000000, 612000000),
            **clock(f"{DEVFREQ}/154c0000.nvenc", 1, 1, 1),
            "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
            **clock(f"{CPUFREQ}/policy0", 1728000, 729600, 1728000, "scaling_"),
            **clock(f"{CPUFREQ}/policy4", 729600, 729600, 1728000, "scaling_"),
            **ina3221(
                f"{HWMON}/hwmon3",
                [("VDD_GPU_SOC", 20000, 200), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 800)],
            ),
            **ina3221(f"{HWMON}/hwmon4", [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 100), None]),
            f"{HWMON}/hwmon2/name": "soctherm_oc\n",
            f"{HWMON}/hwmon2/oc1_event_cnt": "0\n",
            f"{HWMON}/hwmon2/oc3_event_cnt": "27\n",
            f"{HWMON}/hwmon0/name": "tmp451\n",
            f"{HWMON}/hwmon0/in1_label": "not a power monitor\n",
            "sys/class/thermal/thermal_zone0/temp": "48500\n",
            "sys/class/thermal/thermal_zone1/temp": "51250\n",
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",  # switched off
        },
    )


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    """AGX Thor, MAXN, after jetson_clocks."""
    return lay(
        tmp_path / "thor",
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
            "var/lib/nvpmodel/status": "pmode:0000",
            **clock(f"{DEVFREQ}/gpu-gpc-0", 1575000000, 1575000000, 1575000000),
            **clock(f"{DEVFREQ}/gpu-nvd-0", 315000000, 315000000, 1692000000),
            **clock(f"{DEVFREQ}/bwmgr", 4266000000, 4266000000, 4266000000),
            **clock(f"{CPUFREQ}/policy0", 2601000, 2601000, 2601000, "scaling_"),
            **ina3221(
                f"{HWMON}/hwmon1",
                [("VDD_GPU", 20000, 500), ("VDD_CPU_SOC_MSS", 20000, 300), ("VIN_SYS_5V0", 5000, 1300)],
            ),
            f"{HWMON}/hwmon2/name": "ina238\n",
            f"{HWMON}/hwmon2/label": "VIN\n",
            f"{HWMON}/hwmon2/in0_input": "3\n",
            f"{HWMON}/hwmon2/in1_input": "20000\n",
            f"{HWMON}/hwmon2/curr1_input": "2000\n",
            f"{HWMON}/hwmon2/power1_input": "40500000\n",
        },
    )


def test_an_orin(orin: Path) -> None:
    board = read_board(orin)
    assert board.model == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (board.module, board.soc) == ("p3701-0005", "tegra234")
    assert (board.l4t, board.jetpack) == ("36.4.3", "6.2+b77")
    assert (board.nvpmodel_id, board.nvpmodel) == (2, "30W")
    assert board.gpu_clock == Clock(306, 306, 612)
    assert board.emc_clock == Clock(3199, None, None)
    assert board.cpu_clock == Clock(1728, 729.6, 1728)
    assert board.jetson_clocks is False
    assert (board.throttle_events, board.hottest_c) == (27, 51.25)
    assert (board.cpu, board.load_average) == ("ARMv8 Processor rev 1 (v8l)", (0.52, 0.58, 0.59))
    assert board.memory_bytes == 64349040 * 1024 and board.memory_available_bytes == 60000000 * 1024
    assert board.swap_used_bytes == 12 * 1024


def test_a_thor(thor: Path) -> None:
    board = read_board(thor)
    assert (board.module, board.soc, board.l4t) == ("p3834-0008", "tegra264", "38.2.0")
    assert (board.nvpmodel_id, board.nvpmodel) == (0, "MAXN")
    assert board.gpu_clock == Clock(1575, 1575, 1575)  # not the one of the video decoder
    assert board.emc_clock == Clock(4266, 4266, 4266)
    assert board.jetson_clocks is True
    assert board.jetpack is None and board.throttle_events is None


def test_jetson_clocks_is_off_when_one_cpu_may_move(thor: Path) -> None:
    lay(thor, clock(f"{CPUFREQ}/policy12", 2601000, 54000, 2601000, "scaling_"))
    assert read_board(thor).jetson_clocks is False


def test_a_container_without_debugfs_and_nvpmodel(orin: Path) -> None:
    shutil.rmtree(orin / "sys/kernel")
    shutil.rmtree(orin / "var")
    board = read_board(orin)
    assert (board.emc_clock, board.nvpmodel, board.nvpmodel_id, board.jetpack) == (None,) * 4
    assert board.gpu_clock is not None


def test_a_mode_that_the_configuration_does_not_name(orin: Path) -> None:
    (orin / "etc/nvpmodel.conf").unlink()
    board = read_board(orin)
    assert (board.nvpmodel_id, board.nvpmodel) == (2, None)


def test_nothing_at_all(tmp_path: Path) -> None:
    assert set(vars(read_board(tmp_path)).values()) == {None}
    assert SysfsRails(tmp_path).names == []
    with power_meter(tmp_path) as meter:
        assert meter is None


def test_a_pc_is_no_jetson(orin: Path) -> None:
    (orin / "proc/device-tree/compatible").unlink()
    board = read_board(orin)
    assert (board.soc, board.module, board.jetson_clocks) == (None,) * 3


def test_values_that_are_no_numbers(orin: Path) -> None:
    lay(orin, {f"{DEVFREQ}/17000000.gpu/cur_freq": "busy\n", "sys/class/thermal/thermal_zone1/temp": ""})
    (orin / "sys/class/thermal/thermal_zone0/temp").unlink()
    (orin / "sys/class/thermal/thermal_zone0/temp").mkdir()  # reading it fails, as reading a gated zone does
    board = read_board(orin)
    assert (board.gpu_clock, board.hottest_c) == (None, None)


def test_this_machine() -> None:
    board = read_board()
    assert board.memory_bytes and board.memory_available_bytes and board.load_average
    assert board.memory_available_bytes <= board.memory_bytes


def test_the_peak_of_this_process_begins_anew() -> None:
    block = b"1" * 50_000_000
    peak = status_bytes("VmHWM")
    assert peak >= len(block)
    del block
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    assert status_bytes("VmHWM") < peak - 40_000_000


# Power


def test_rails_of_an_orin(orin: Path) -> None:
    rails = SysfsRails(orin).read()
    assert rails == {"VDD_GPU_SOC": 4, "VDD_CPU_CV": 2, "VIN_SYS_5V0": 4, "VDDQ_VDD2_1V8AO": 0.5}
    assert total(rails) == (10, ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"])


def test_rails_of_a_thor(thor: Path) -> None:
    rails = SysfsRails(thor).read()
    assert rails == {"VDD_GPU": 10, "VDD_CPU_SOC_MSS": 6, "VIN_SYS_5V0": 6.5, "VIN": 40.5}
    assert total(rails) == (40.5, ["VIN"])


def test_an_orin_nano_is_its_input() -> None:
    assert total({"VDD_IN": 5.0, "VDD_CPU_GPU_CV": 2.0, "VDD_SOC": 1.0}) == (5.0, ["VDD_IN"])


def test_a_rail_that_goes_away_is_left_out(orin: Path) -> None:
    rails = SysfsRails(orin)
    (orin / HWMON / "hwmon3/curr2_input").unlink()
    assert rails.read() == {"VDD_GPU_SOC": 4, "VIN_SYS_5V0": 4, "VDDQ_VDD2_1V8AO": 0.5}


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (
            "11-25-2026 10:00:00 RAM 3182/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [8%@1510,3%@1510] "
            "GR3D_FREQ 0%@[305] cpu@48.5C VDD_IN 4983mW/4871mW VDD_CPU_GPU_CV 1121mW/1080mW VDD_SOC 1430mW/1431mW",
            {"VDD_IN": 4.983, "VDD_CPU_GPU_CV": 1.121, "VDD_SOC": 1.43},
        ),
        ("EMC_FREQ 1%@2133 APE 174 VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW", None),
        ("RAM 1/2MB POM_5V_IN 2532/2532 POM_5V_GPU 0/0", {"POM_5V_IN": 2.532, "POM_5V_GPU": 0.0}),
        ("RAM 3182/7620MB CPU [8%@1510]", {}),
    ],
)
def test_a_line_of_tegrastats(line: str, rails: dict[str, float] | None) -> None:
    assert tegrastats_rails(line) == (rails if rails is not None else {"VIN_SYS_5V0": 4.968, "VDDQ_VDD2_1V8AO": 1.091})


def test_tegrastats_runs_until_closed() -> None:
    program = Tegrastats(["sh", "-c", "while echo VDD_IN 5000mW/5000mW; do sleep 0.01; done"])
    meter = PowerMeter(program.read, 0.0)
    try:
        assert meter.mean(0.0) == {"VDD_IN": 5.0}
    finally:
        program.end()
        meter.close()
        program.close()
    assert program._process.poll() is not None and not meter._thread.is_alive()


def test_the_mean_is_of_the_time_asked_for() -> None:
    watts, read = iter([{"VDD_IN": 1.0}, {"VDD_IN": 3.0}]), threading.Event()

    def once() -> dict[str, float]:
        found = next(watts, {})
        if not found:
            read.set()
        return found

    meter = PowerMeter(once, 0.0)
    assert read.wait(10)
    first, second = (time for time, _ in meter._samples)
    assert meter.mean(0.0) == {"VDD_IN": 2.0}
    assert meter.mean(second) == {"VDD_IN": 3.0}
    assert meter.mean(second + 1) == {"VDD_IN": 3.0}  # none since: the last
    assert first <= second
    meter.close()


@pytest.fixture
def metered(orin: Path) -> Iterator[PowerMeter]:
    with power_meter(orin) as meter:
        assert meter
        yield meter
    assert not meter._thread.is_alive()


def test_a_meter_of_a_board(metered: PowerMeter) -> None:
    assert total(metered.mean(0.0))[0] == 10
