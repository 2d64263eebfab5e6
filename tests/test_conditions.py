"""The machine's state is read from its files, judged in words, and waited for until a deadline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import StageFailed
from edgeprune.runtimes.conditions import Gate, Snapshot, obstacles, snapshot
from edgeprune.runtimes.repeat import repeat, sustain

Write = Callable[[str, str], None]
CALM = Snapshot(
    at_s=0.0, processors=4, busy_s=100.0, steal_s=0.0, temperature_c=50.0, available_mib=3000.0, total_mib=4000.0
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """/proc and /sys of a board with nothing wrong."""
    for name, text in {
        "proc/stat": "cpu  1000 0 500 90000 10 0 7 3 0 0\ncpu0 1 2 3\n",
        "proc/meminfo": "MemTotal:  4096000 kB\nMemAvailable:  2048000 kB\nSwapTotal: 1024 kB\nSwapFree: 1024 kB\n",
        "proc/vmstat": "pgpgin 7\npswpin 0\npswpout 0\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "51540\n",
        "sys/class/thermal/thermal_zone1/type": "pmic\n",
        "sys/class/thermal/thermal_zone1/temp": "70000\n",
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
        "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",  # it was slowed down once, not now
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2400000\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
        "sys/class/power_supply/mouse/type": "Battery\n",
        "sys/class/power_supply/mouse/scope": "Device\n",
        "sys/class/power_supply/mouse/status": "Discharging\n",
    }.items():
        put(tmp_path, name, text)
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_board_is_read(root: Path) -> None:
    seen = snapshot(root)
    tick = os.sysconf("SC_CLK_TCK")
    assert (seen.busy_s, seen.steal_s) == (1507 / tick, 3 / tick)
    assert (seen.temperature_c, seen.trip_c, seen.throttled) == (51.54, None, ())
    assert (seen.mhz, seen.governor, seen.on_battery) == ((2400,), "ondemand", None)
    assert (seen.available_mib, seen.total_mib, seen.swap_used_mib, seen.swapped_pages) == (2000.0, 4000.0, 0.0, 0)
    assert obstacles(seen, seen, 0.0) == []
    assert "busy_s" not in seen.to_json() and seen.to_json()["temperature_c"] == 51.54


def test_this_machine_is_read_and_a_bare_one_too(tmp_path: Path) -> None:
    here = snapshot()
    assert here.busy_s and here.available_mib and here.processors == os.cpu_count()
    put(tmp_path, "proc/stat", "nothing that is known\n")
    bare = snapshot(tmp_path)
    assert (bare.busy_s, bare.temperature_c, bare.on_battery, bare.swapped_pages) == (None, None, None, None)
    assert obstacles(bare, bare, 0.0) == []


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("sys/class/thermal/thermal_zone0/temp", "84000\n", "84 °C"),
        ("sys/class/thermal/cooling_device0/cur_state", "2\n", "cooling device cpufreq-cpu0"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n", "under-voltage, throttled"),
        ("sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "1\n", "under-voltage"),
        ("proc/meminfo", "MemTotal: 4096000 kB\nMemAvailable: 102400 kB\n", "100 MiB of memory are free"),
        ("proc/vmstat", "pswpin 5\npswpout 1\n", "it swaps"),
        ("sys/class/power_supply/bat/type", "Battery\n", "battery"),
    ],
)
def test_each_obstacle_is_seen_in_its_file(root: Path, file: str, text: str, word: str) -> None:
    before = snapshot(root)
    put(root, file, text)
    if "power_supply" in file:
        put(root, "sys/class/power_supply/bat/status", "Discharging\n")
    (found,) = obstacles(before, snapshot(root), 0.0)
    assert word in found


def test_mains_power_and_the_kernels_own_limit_count(root: Path) -> None:
    for name, text in (
        ("bat/type", "Battery"),
        ("bat/status", "Discharging"),
        ("ac/type", "Mains"),
        ("ac/online", "1"),
    ):
        put(root, f"sys/class/power_supply/{name}", text + "\n")
    assert snapshot(root).on_battery is False
    put(root, "sys/class/thermal/thermal_zone0/trip_point_0_type", "critical\n")
    put(root, "sys/class/thermal/thermal_zone0/trip_point_0_temp", "110000\n")
    put(root, "sys/class/thermal/thermal_zone0/trip_point_1_type", "passive\n")
    put(root, "sys/class/thermal/thermal_zone0/trip_point_1_temp", "95000\n")
    put(root, "sys/class/thermal/thermal_zone0/temp", "91000\n")
    seen = snapshot(root)
    assert seen.trip_c == 95.0 and obstacles(seen, seen, 0.0) == []  # above 80 °C, but this processor may be
    put(root, "sys/class/thermal/thermal_zone0/temp", "93000\n")
    assert "above 92" in obstacles(seen, snapshot(root), 0.0)[0]


def test_counters_tell_more_than_a_temperature() -> None:
    hot = replace(CALM, temperature_c=88.0, trip_c=None)
    assert obstacles(hot, replace(hot, throttle_events=None), 0.0) == ["88 °C (above 80)"]
    counted = replace(hot, throttle_events=3)
    assert obstacles(counted, counted, 0.0) == []
    assert obstacles(counted, replace(counted, throttle_events=4), 0.0) != []


@given(st.floats(0.3, 100), st.floats(0, 4), st.floats(0, 4), st.integers(1, 64))
def test_only_what_others_take_counts(wall: float, own: float, others: float, processors: int) -> None:
    before = replace(CALM, processors=processors)
    after = replace(before, at_s=wall, busy_s=100.0 + wall * (own + others))
    found = obstacles(before, after, wall * own)
    if abs(others - 0.05 * processors) > 1e-6:
        assert bool(found) == (others > 0.05 * processors)


def looks(*snapshots: Snapshot) -> Callable[[], Snapshot]:
    """Each snapshot in turn, the last for ever."""
    left: Iterator[Snapshot] = iter(snapshots)
    return lambda: next(left, snapshots[-1])


def ticking(busy: float) -> Callable[[], Snapshot]:
    """A machine on which other programs keep so many processors busy, a second a look."""
    count = iter(range(10**6))
    return lambda: replace(CALM, at_s=float(n := next(count)), busy_s=100.0 + busy * n)


def test_the_gate_waits_until_it_is_quiet() -> None:
    hot = replace(CALM, at_s=1.0, temperature_c=90.0)
    gate = Gate(60.0, look=looks(CALM, hot, hot, replace(CALM, at_s=2.0)), sleep=lambda _: None)
    assert gate.wait().temperature_c == 50.0 and gate.lost_s == 1.0


def test_the_gate_refuses_after_its_deadline() -> None:
    gate = Gate(5.0, look=ticking(2.0), sleep=lambda _: None)
    with pytest.raises(StageFailed, match=r"noisy: .* for 5 s: other programs keep 2\.\d\d processors busy") as caught:
        gate.wait()
    assert "--no-gate" in str(caught.value)


def test_disturbed_repetitions_are_made_again() -> None:
    swapping = replace(CALM, swapped_pages=0)
    steps = [swapping, swapping, replace(swapping, at_s=1.0, swapped_pages=9)]  # the gate's two looks, and one after
    gate = Gate(60.0, look=looks(*steps, replace(swapping, at_s=2.0, swapped_pages=9)), sleep=lambda _: None)
    told: list[int] = []
    kept = repeat(lambda: 3 * 10**8, repetitions=3, least_s=0.0, gate=gate, told=lambda done, _: told.append(done))
    assert (kept.ns, kept.dropped, told) == ([3 * 10**8] * 3, 1, [1, 2, 3])
    assert kept.machine is not None and set(kept.machine) == {"before", "after"}


def test_a_measurement_that_is_always_disturbed_fails() -> None:
    shaking = iter(range(10**6))
    gate = Gate(3.0, look=lambda: replace(CALM, at_s=0.5 * (n := next(shaking)), throttle_events=(n + 1) // 3))
    gate.sleep = lambda _: None
    with pytest.raises(StageFailed, match="slowed down for its temperature"):
        repeat(lambda: 10**9, repetitions=5, least_s=0.0, gate=gate)


@given(st.integers(1, 20), st.floats(0.0, 3.0), st.integers(10**6, 10**9))
def test_repetitions_and_a_least_duration(repetitions: int, least_s: float, ns: int) -> None:
    kept = repeat(lambda: ns, repetitions=repetitions, least_s=least_s, gate=None)
    count = len(kept.ns)
    assert kept.machine is None and count >= repetitions
    assert count == 2000 or sum(kept.ns) >= least_s * 1e9
    assert count == repetitions or (count - 1) * ns < least_s * 1e9  # and not one more than that


def test_sustained_speed_is_that_of_the_end() -> None:
    import time

    pauses = iter([0.001] * 6 + [0.004] * 10**4)

    def sample() -> int:
        time.sleep(next(pauses))
        return 1

    hot = replace(CALM, at_s=1.0, temperature_c=85.0, throttle_events=None)
    found = sustain(sample, 0.05, 10, look=looks(CALM, hot))
    assert found["s"] >= 0.05 and found["ts"] < found["first_ts"]
    assert found["slowed"] == ["85 °C (above 80)"] and found["temperature_c"] == 85.0
