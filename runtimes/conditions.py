"""The state of the machine around a measurement: what would spoil it, and waiting until that is gone.

A number that was measured beside a compiler run, on a hot board or from a swapped-out model is not the device's speed.
So each batch of repetitions stands between two snapshots; `obstacles` says what between them speaks against it. The
same function judges the quiet moment before (`Gate.wait`) and the measurement itself. What a system does not tell is
None and judged by nobody; the snapshot that goes into the record shows that it was not known.

Sources: proc(5); Linux's sysfs ABI documents for thermal, cpufreq and power_supply; the Raspberry Pi's firmware
interface for `get_throttled`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.errors import StageFailed

OTHERS_SHARE = 0.05  # of all processors, that other programs may take
STEAL_SHARE = 0.02  # of all processors, that the hypervisor may take
HOT_C = 80.0  # a Raspberry Pi slows down from here (raspberrypi.com, "Frequency management and thermal control")
TRIP_MARGIN_C = 3.0  # below the temperature from which the kernel slows a processor down
LEAST_FREE = 0.05  # of memory: below it the kernel drops pages of the model
WINDOW_S = 0.25  # counters of processor time advance in steps of 10 ms; a shorter look would see steps only

# Bits of the Raspberry Pi's get_throttled that speak of now; 16 to 19 say that it happened since boot.
_PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_PI_FIRMWARE = "sys/devices/platform/soc*/soc*:firmware/get_throttled"  # soc/ on a Pi 4, soc@107c000000/ on a Pi 5
_PROCESSOR_ZONE = re.compile(r"cpu|soc|pkg|package|core|big|little|tdie|k10temp", re.IGNORECASE)
_COOLING = re.compile(r"cpufreq|processor", re.IGNORECASE)


@dataclass(frozen=True)
class Snapshot:
    """One look at the machine. None: the system does not tell.

    Attributes:
        at_s: monotonic clock, s.
        processors: logical ones that are online.
        busy_s: time that all processors together have worked since boot, s, without the hypervisor's.
        steal_s: time that the hypervisor gave to others, s.
        temperature_c: of the hottest sensor of the processor, °C.
        trip_c: temperature from which the kernel slows it down, °C.
        throttled: what slows it down now, in words.
        throttle_events: how often it was slowed down since boot.
        mhz: of each frequency domain.
        governor: the frequency governor, where there is one for all.
        on_battery: whether it runs on a battery.
        available_mib: memory that can be had without swapping, MiB.
        total_mib: memory, MiB.
        swap_used_mib: swap in use, MiB.
        swapped_pages: pages swapped in or out since boot.
    """

    at_s: float
    processors: int
    busy_s: float | None = None
    steal_s: float | None = None
    temperature_c: float | None = None
    trip_c: float | None = None
    throttled: tuple[str, ...] = ()
    throttle_events: int | None = None
    mhz: tuple[int, ...] = ()
    governor: str | None = None
    on_battery: bool | None = None
    available_mib: float | None = None
    total_mib: float | None = None
    swap_used_mib: float | None = None
    swapped_pages: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What a record keeps of it: the state, without the counters."""
        counters = ("at_s", "busy_s", "steal_s", "throttle_events", "swapped_pages")
        return {key: value for key, value in asdict(self).items() if key not in counters}


def snapshot(root: Path = Path("/")) -> Snapshot:
    """Look at this machine: through the files of /proc and /sys below `root`, or where there are none by psutil."""
    if not (root / "proc/stat").is_file():
        return _by_psutil()
    memory = dict(_pairs(_read(root / "proc/meminfo")))
    counters = dict(_pairs(_read(root / "proc/vmstat")))
    busy, steal = _processor_time(_read(root / "proc/stat"))
    temperature, trip = _temperature(root)
    governors = {_read(path).strip() for path in _policies(root, "scaling_governor")}
    swap = [memory[key] for key in ("SwapTotal:", "SwapFree:") if key in memory]
    pages = [counters[key] for key in ("pswpin", "pswpout") if key in counters]
    return Snapshot(
        at_s=time.monotonic(),
        processors=os.cpu_count() or 1,
        busy_s=busy,
        steal_s=steal,
        temperature_c=temperature,
        trip_c=trip,
        throttled=tuple(_throttled(root)),
        throttle_events=_throttle_events(root),
        mhz=tuple(round(khz / 1000) for path in _policies(root, "scaling_cur_freq") if (khz := _number(path))),
        governor=governors.pop() if len(governors) == 1 else None,
        on_battery=_on_battery(root),
        available_mib=memory["MemAvailable:"] / 1024 if "MemAvailable:" in memory else None,
        total_mib=memory["MemTotal:"] / 1024 if "MemTotal:" in memory else None,
        swap_used_mib=(swap[0] - swap[1]) / 1024 if len(swap) == 2 else None,
        swapped_pages=sum(pages) if len(pages) == 2 else None,
    )


def obstacles(before: Snapshot, after: Snapshot, own_s: float) -> list[str]:
    """What between two snapshots speaks against what was measured there, in words; empty if nothing does.

    Args:
        before: at the beginning.
        after: at the end.
        own_s: processor time that the measuring process took in between, s.
    """
    found = []
    wall = max(after.at_s - before.at_s, 1e-9)
    if before.busy_s is not None and after.busy_s is not None:
        others = (after.busy_s - before.busy_s - own_s) / wall
        allowed = OTHERS_SHARE * after.processors
        if others > allowed:
            found.append(f"other programs keep {others:.2f} processors busy ({allowed:.2f} allowed)")
    if before.steal_s is not None and after.steal_s is not None:
        stolen = (after.steal_s - before.steal_s) / wall
        if stolen > STEAL_SHARE * after.processors:
            found.append(f"the hypervisor takes {stolen:.2f} processors away")
    # Where the kernel counts how often it slowed a processor down, that tells; other limits than the Pi's are higher.
    if after.temperature_c is not None and (after.trip_c is not None or after.throttle_events is None):
        limit = HOT_C if after.trip_c is None else after.trip_c - TRIP_MARGIN_C
        if after.temperature_c > limit:
            found.append(f"{after.temperature_c:.0f} °C (above {limit:.0f})")
    if after.throttled:
        found.append("slowed down: " + ", ".join(after.throttled))
    elif _more(before.throttle_events, after.throttle_events):
        found.append("slowed down for its temperature meanwhile")
    if after.on_battery:
        found.append("it runs on its battery")
    if after.available_mib is not None and after.total_mib is not None:
        least = LEAST_FREE * after.total_mib
        if after.available_mib < least:
            found.append(f"{after.available_mib:.0f} MiB of memory are free ({least:.0f} wanted)")
    if _more(before.swapped_pages, after.swapped_pages):
        found.append("it swaps")
    return found


def _more(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before


@dataclass
class Gate:
    """Lets a measurement begin when nothing speaks against it, within a deadline.

    Attributes:
        deadline_s: seconds that all waiting, and all measuring that had to be thrown away, may take together.
        look: takes a snapshot.
        sleep: waits for so many seconds.
        lost_s: seconds lost so far.
    """

    deadline_s: float
    look: Callable[[], Snapshot] = snapshot
    sleep: Callable[[float], None] = time.sleep
    lost_s: float = field(default=0.0, init=False)

    def wait(self) -> Snapshot:
        """Wait for a quiet moment of `WINDOW_S`; the snapshot at its end.

        Raises:
            StageFailed: there was none before the deadline.
        """
        while True:
            before = self.look()
            own = time.process_time()
            self.sleep(WINDOW_S)
            after = self.look()
            if not (found := obstacles(before, after, time.process_time() - own)):
                return after
            self.lose(after.at_s - before.at_s, found)

    def lose(self, seconds: float, reasons: list[str]) -> None:
        """Count time that was lost for `reasons`.

        Raises:
            StageFailed: too much was.
        """
        self.lost_s += seconds
        if self.lost_s >= self.deadline_s:
            raise StageFailed(
                f"noisy: the machine was not fit to be measured for {self.lost_s:.0f} s: {'; '.join(reasons)}",
                remedy="see to that and measure again; ungated figures (--no-gate) say that they are",
            )


def _by_psutil() -> Snapshot:
    """What psutil tells on macOS and Windows; where it is not installed, nothing is known."""
    seen = Snapshot(at_s=time.monotonic(), processors=os.cpu_count() or 1)
    try:
        import psutil
    except ImportError:
        return seen
    times, memory, swap = psutil.cpu_times(), psutil.virtual_memory(), psutil.swap_memory()
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return replace(
        seen,
        busy_s=sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "interrupt", "dpc")),
        on_battery=None if battery is None else not battery.power_plugged,
        available_mib=memory.available / 2**20,
        total_mib=memory.total / 2**20,
        swap_used_mib=swap.used / 2**20,
    )


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[: 1 << 20].decode("utf-8", errors="replace")
    except OSError:  # absent on most machines, or not to be read by everyone
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    """Names and whole numbers of lines such as "MemTotal:  24 kB" and "pswpin 0"."""
    for line in text.splitlines():
        name, *rest = line.split()[:2] or [""]
        if rest and rest[0].isdigit():
            yield name, int(rest[0])


def _processor_time(text: str) -> tuple[float | None, float | None]:
    found = re.match(r"cpu +((?:\d+ ?)+)", text)
    if found is None:
        return None, None
    user, nice, system, _, _, irq, softirq, steal = ([int(ticks) for ticks in found[1].split()] + [0] * 8)[:8]
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def _temperature(root: Path) -> tuple[float | None, float | None]:
    """Temperature and the kernel's limit of the hottest zone of the processor, or of any if none is named so."""
    zones = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        milli = _number(zone / "temp")
        if milli is not None and -40_000 < milli < 150_000:  # sensors that are off report nonsense
            zones.append((bool(_PROCESSOR_ZONE.search(_read(zone / "type"))), milli / 1000, _trip(zone)))
    return max(zones, key=lambda zone: zone[:2])[1:] if zones else (None, None)


def _trip(zone: Path) -> float | None:
    trips = []
    for kind in zone.glob("trip_point_*_type"):
        milli = _number(kind.with_name(kind.name.removesuffix("type") + "temp"))
        if _read(kind).strip() == "passive" and milli is not None and milli > 0:
            trips.append(milli / 1000)
    return min(trips, default=None)


def _policies(root: Path, name: str) -> list[Path]:
    return sorted((root / "sys/devices/system/cpu/cpufreq").glob(f"policy*/{name}"))


def _throttled(root: Path) -> Iterator[str]:
    for file in root.glob(_PI_FIRMWARE):
        firmware = _read(file).strip()
        if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", firmware):
            yield from (words for bit, words in _PI_BITS.items() if int(firmware, 16) >> bit & 1)
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind = _read(device / "type").strip()
        if _COOLING.search(kind) and (_number(device / "cur_state") or 0) > 0:
            yield f"cooling device {kind}"


def _throttle_events(root: Path) -> int | None:
    folder = root / "sys/devices/system/cpu"
    counts = [_number(path) for path in folder.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    return sum(count for count in counts if count is not None) if counts else None


def _on_battery(root: Path) -> bool | None:
    """Whether a battery of the machine itself (not of a mouse) discharges while no mains is online."""
    supplies = [
        (_read(path / "type").strip(), path)
        for path in (root / "sys/class/power_supply").glob("*")
        if _read(path / "scope").strip() != "Device"
    ]
    if not any(kind == "Battery" for kind, _ in supplies):
        return None if not supplies else False
    if any(kind in ("Mains", "USB") and _number(path / "online") == 1 for kind, path in supplies):
        return False
    return any(kind == "Battery" and _read(path / "status").strip() == "Discharging" for kind, path in supplies)
