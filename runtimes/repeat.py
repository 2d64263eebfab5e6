"""Repeats a measurement until there is enough of it, and throws away what the machine disturbed.

Repetitions *and* a least duration: five repetitions of 10 ms say nothing. A batch of them stands between two looks at
the machine (`conditions`); a disturbed batch is dropped and made again while the gate's deadline allows. Sustained
speed comes after the first repetitions, which are the cold ones, without a pause: heat is what it is about, so being
slowed down is its result and no reason to drop it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.runtimes.conditions import WINDOW_S, Gate, Snapshot, obstacles, snapshot

MAX_REPETITIONS = 2000  # of a test so short that a least duration would take more
FAULTS_PER_S = 50.0  # pages read from disk; above it the weights were not in memory

Sample = Callable[[], int]  # one repetition: its nanoseconds
Told = Callable[[int, int], None]  # repetitions done, nanoseconds of the last


@dataclass
class Samples:
    """What was measured, and how the machine was.

    Attributes:
        ns: nanoseconds of each repetition that counts.
        dropped: repetitions that were disturbed and do not count.
        machine: {"before", "after"}: the machine before the first that counts and after the last; None without a gate.
    """

    ns: list[int] = field(default_factory=list)
    dropped: int = 0
    machine: dict[str, Any] | None = None


def repeat(sample: Sample, *, repetitions: int, least_s: float, gate: Gate | None, told: Told | None = None) -> Samples:
    """Take at least `repetitions` samples and `least_s` seconds of them.

    Args:
        sample: measures once.
        repetitions: samples at least.
        least_s: seconds of measured time at least.
        gate: lets each batch begin and judges it; None takes every sample as it comes.
        told: called after each sample that counts.

    Raises:
        StageFailed: the machine was not fit to be measured before the gate's deadline.
    """
    kept = Samples()

    def enough(also: int = 0, also_ns: int = 0) -> bool:
        count = len(kept.ns) + also
        return count >= MAX_REPETITIONS or (count >= repetitions and sum(kept.ns) + also_ns >= least_s * 1e9)

    while not enough():
        before = gate.wait() if gate else None
        own, faults = time.process_time(), _faults()
        batch: list[int] = []
        spent = 0
        while True:
            batch.append(sample())
            spent += batch[-1]
            if gate is None or spent >= WINDOW_S * 1e9 or enough(len(batch), spent):
                break
        if gate is not None and before is not None:
            after = gate.look()
            seconds = after.at_s - before.at_s
            found = obstacles(before, after, time.process_time() - own)
            if _faults() - faults > FAULTS_PER_S * max(seconds, WINDOW_S):
                found.append("the model was read from disk again: it did not stay in memory")
            if found:
                kept.dropped += len(batch)
                gate.lose(seconds, found)
                continue
            kept.machine = {**(kept.machine or {"before": before.to_json()}), "after": after.to_json()}
        for ns in batch:
            kept.ns.append(ns)
            if told:
                told(len(kept.ns), ns)
    return kept


def sustain(sample: Sample, seconds: float, length: int, look: Callable[[], Snapshot] = snapshot) -> dict[str, Any]:
    """Measure for so many seconds without a pause.

    Args:
        sample: measures once.
        seconds: how long.
        length: tokens of a sample.
        look: takes a snapshot.

    Returns:
        {"s": measured seconds, "ts": tokens/s of the last third, "first_ts": of the first third, "slowed": what slowed
        the machine down at its end or disturbed it meanwhile, in words, "temperature_c"}.
    """
    before, own = look(), time.process_time()
    ends: list[float] = []
    began = time.perf_counter()
    while not ends or ends[-1] < seconds or len(ends) < 3:
        sample()
        ends.append(time.perf_counter() - began)
    after = look()
    times = np.diff(ends, prepend=0.0)
    third = max(1, len(times) // 3)
    return {
        "s": ends[-1],
        "ts": length * third / float(times[-third:].sum()),
        "first_ts": length * third / float(times[:third].sum()),
        "slowed": obstacles(before, after, time.process_time() - own),
        "temperature_c": after.temperature_c,
    }


def _faults() -> int:
    """Pages that this process had to wait for, read from disk; 0 where the system does not tell (Windows)."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return 0
