"""How many processors this process may use, which in a container or under `taskset` is not what the machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path


def quota_cores(cpu_max: str) -> int | None:
    """Whole processors that a control group's `cpu.max` ("quota period", microseconds) allows; None without limit."""
    found = re.fullmatch(r"(\d{1,12}) (\d{1,12})\s*", cpu_max)
    if found is None or not int(found[1]) or not int(found[2]):
        return None
    return max(1, -(-int(found[1]) // int(found[2])))


def container_quota() -> int | None:
    """Whole processors that this process's control group allows; None without limit, or without control groups (v2)."""
    try:
        return quota_cores(Path("/sys/fs/cgroup/cpu.max").read_text())
    except OSError:
        return None


def available_cores() -> int:
    """Physical cores that this process may run on: the threads of every command that is given no number.

    A second thread on the same core, or more threads than a control group lets run, makes decoding slower, not faster.
    """
    import psutil  # not before: main() only asks for the quota, and this takes 30 ms

    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, container_quota() or allowed))
