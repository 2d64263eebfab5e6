"""How many processors this process may use, which in a container or under `taskset` is not what the machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def _read(file: Path) -> str:
    """What a file says; nothing where it is not, as of limits in the outermost control group."""
    try:
        return file.read_text()
    except OSError:
        return ""


def group_limits(name: str, *, own: Path = Path("/proc/self/cgroup"), root: Path = _GROUPS) -> list[str]:
    """What the file `name` says in this process's control group (v2) and in each above it; where it is not, nothing."""
    found = re.search(r"^0::/(.*)$", _read(own), re.MULTILINE)
    group = Path(found[1] if found else "")
    return [text for folder in (group, *group.parents) if (text := _read(root / folder / name))]


def quota_cores(cpu_max: str) -> int | None:
    """Whole processors that a control group's `cpu.max` ("quota period", microseconds) allows; None without limit.

    Of one and a half it is one: the second would be stopped for half of the time, and the first would wait for it.
    """
    found = re.fullmatch(r"(-?\d{1,12}) (\d{1,12})\s*", cpu_max)
    if found is None or int(found[1]) <= 0 or not int(found[2]):
        return None
    return max(1, int(found[1]) // int(found[2]))


def container_quota() -> int | None:
    """Whole processors that this process's control groups, of either version, allow; None without limit."""
    older = " ".join(_read(_GROUPS / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    quotas = [quota_cores(text) for text in (older, *group_limits("cpu.max"))]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit() -> int | None:
    """Bytes of memory that this process's control groups, of either version, allow; None without limit."""
    texts = (_read(_GROUPS / "memory" / "memory.limit_in_bytes"), *group_limits("memory.max"))
    limits = [int(text) for text in texts if text.strip().isdigit()]
    return min((limit for limit in limits if limit > 0), default=None)


def allowed_processors() -> int:
    """Logical processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def available_cores() -> int:
    """Physical cores that this process may run on: the threads of every command that is given no number.

    A second thread on the same core, or more threads than a control group lets run, makes decoding slower, not faster.
    """
    import psutil  # not before: main() only asks for the quota, and this takes 30 ms

    allowed = allowed_processors()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, container_quota() or allowed))
