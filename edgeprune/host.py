"""The profile of this machine: that of the known device it is, else one measured here.

`gather` collects the texts that `edgeprune.recognise` reads. The bandwidth is measured once and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from edgeprune import files
from edgeprune.cores import available_cores, memory_limit
from edgeprune.devices import DeviceProfile, Figure, PositiveFigure, load_profile, read_profile
from edgeprune.errors import BadInput
from edgeprune.host_gpu import find_gpu, with_gpu
from edgeprune.recognise import Host, Texts, recognise

GIB = 1 << 30
STEADY = 0.7  # lower quartile over best, of a bandwidth measured on a machine that was not busy
UNSTEADY_SECONDS = 3600.0  # how long one from a busy machine is kept: runs that follow each other agree

# Decode bandwidth of a machine without published rows, from what numpy reads here. Two limits, the lower one counts:
# memory (decode against twice the published memcpy: Raspberry Pi 5 9.9 of 11.8 GB/s, N150 17.5 of 19.1) and the kernels
# of one core (6 GB/s on a Cortex-A76, 8 on a Zen 5 virtual core, 21 on an Apple M2 Ultra, 4-bit models).
READ_EFFICIENCY = (0.5, 0.75, 0.95)
CORE_GBS = (5.0, 9.0, 20.0)


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes()[: 1 << 20].decode("utf-8", errors="replace")
    except OSError:  # absent on most machines
        return ""


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _windows_brand() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            return str(winreg.QueryValueEx(opened, "ProcessorNameString")[0]).strip()
    except OSError:
        return ""


def gather() -> Texts:
    """Read the texts of this machine; what it does not have stays empty."""
    if platform.system() == "Darwin":
        performance = _sysctl("hw.perflevel0.physicalcpu").rpartition(":")[2].strip()
        return Texts(
            brand=_sysctl("machdep.cpu.brand_string").partition(":")[2].strip(),
            features=_sysctl("hw.optional.arm"),
            performance_cores=int(performance) if performance.isdigit() else 0,
        )
    return Texts(
        cpuinfo=_read("/proc/cpuinfo"),
        compatible=_read("/proc/device-tree/compatible"),
        brand=_windows_brand() or platform.processor(),
        power_mode=_read("/var/lib/nvpmodel/status"),
    )


def available_memory() -> int:
    """Bytes of memory of this machine, or of its control group where that is less."""
    total = int(psutil.virtual_memory().total)
    return min(total, memory_limit() or total)


def read_bandwidth(threads: int, *, seconds: float = 2.0, buffer_bytes: int = 512 << 20) -> tuple[float, float, float]:
    """(low, median, best) of 10^9 bytes/s that `threads` threads read of buffers too large for the caches.

    Each pass is a numpy maximum over int32, which is vectorised and releases the interpreter's lock.

    Raises:
        BadInput: fewer than one thread or no buffer to read.
    """
    each = buffer_bytes // max(threads, 1) // 4
    if threads < 1 or each < 1:
        raise BadInput("bandwidth needs at least one thread and one value to read")
    buffers = [np.ones(each, np.int32) for _ in range(threads)]
    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while len(rates) < 4 or (time.perf_counter() < end and len(rates) < 64):
            start = time.perf_counter()
            list(pool.map(np.max, buffers))
            rates.append(4 * each * threads / (time.perf_counter() - start) / 1e9)
    rates = sorted(rates[1:])  # the first pass warms up
    return rates[len(rates) // 4], rates[len(rates) // 2], rates[-1]


def _key(host: Host, cores: int, memory_bytes: int) -> str:
    """A short hash of what speeds that were measured depend on; a new kernel leaves it, and takes a few MiB."""
    memory = round(memory_bytes / GIB, 1)
    key = json.dumps([host.model, host.cores, host.big_cores, memory, f"{platform.system()} cores={cores}"])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _kept_bandwidth(path: Path) -> PositiveFigure | None:
    if not path.is_file():
        return None
    try:
        kept = files.read_json(path)
        figure = PositiveFigure.model_validate(kept["read_gbs"])
        fresh = time.time() - path.stat().st_mtime < UNSTEADY_SECONDS
    except (BadInput, KeyError, ValueError, OSError):  # a damaged entry is measured again and replaced
        return None
    return figure if kept.get("steady") is True or fresh else None


def measured_bandwidth(host: Host, cores: int, memory_bytes: int) -> PositiveFigure:
    """The read bandwidth of this machine, from the cache or measured now (about 2 s)."""
    path = files.cache_dir() / f"host-{_key(host, cores, memory_bytes)}.json"
    if kept := _kept_bandwidth(path):
        return kept
    # A quarter of free memory at most: measuring must not push a small board into swap.
    buffer = int(min(512 << 20, max(16 << 20, psutil.virtual_memory().available // 4)))
    low, median, best = read_bandwidth(cores, buffer_bytes=buffer)
    figure = PositiveFigure(
        value=round(best, 2),
        low=round(low, 2),
        high=round(best, 2),
        kind="measured",
        source=f"numpy streaming read on this machine, {cores} threads, best of several; median {median:.1f}",
    )
    kept_as = {"schema_version": 1, "cpu": host.model, "steady": low >= STEADY * best, "read_gbs": figure.model_dump()}
    files.write_json(path, kept_as)
    return figure


def decode_from_read(read_gbs: Figure, cores: int) -> PositiveFigure:
    """Effective decode bandwidth of a machine without published rows: the lower of its two limits (see above)."""
    low, value, high = (
        min(read * share, cores * core)
        for read, share, core in zip(
            (read_gbs.low, read_gbs.value, read_gbs.high), READ_EFFICIENCY, CORE_GBS, strict=True
        )
    )
    return PositiveFigure(
        value=round(value, 2),
        low=round(low, 2),
        high=round(high, 2),
        kind="derived",
        source=f"the lower of {READ_EFFICIENCY[1]} x measured read bandwidth ({read_gbs.value} GB/s) and {cores} cores "
        f"x {CORE_GBS[1]} GB/s; not a measured decode speed",
    )


def generic_profile(host: Host, *, cores: int, memory_bytes: int, read_gbs: Figure) -> DeviceProfile:
    """The profile of a machine that is no known device. Pure."""
    counted = {"kind": "measured", "source": "this machine"}
    big = min(cores, host.big_cores)
    not_here = "int4 GroupQueryAttention+MatMulNBits graph against llama.cpp Q4_0 on an x86 host: 134 vs 199 tok/s"
    values: Mapping[str, object] = {
        "name": "host",
        "description": f"this machine: {host.model}",
        "memory": {
            "total_gib": {"value": round(memory_bytes / GIB, 3), **counted},
            "usable_share": {
                "value": 0.75,
                "low": 0.6,
                "high": 0.85,
                "kind": "assumed",
                "source": "the rest for the system and other programs",
            },
        },
        "cpu": {
            "model": host.model[:1000],
            "cores": {"value": cores, **counted},
            "big_cores": {"value": big, **counted},
            "isa": host.isa,
        },
        "decode": {"cpu": {"gbs": decode_from_read(read_gbs, big).model_dump()}},
        "runtime": {
            "onnxruntime": {
                "decode": {"value": 0.67, "low": 0.35, "high": 1.1, "kind": "assumed", "source": not_here},
            }
        },
        "start": {
            "runtime": "llamacpp",
            "backend": "cpu",
            "quantisation": "Q4_0",
            "threads": {"value": big, "kind": "derived", "source": "the cores of the fastest kind, of this machine"},
        },
        "budget": {
            "min_tokens_per_s": {
                "value": 10,
                "low": 5,
                "high": 20,
                "kind": "assumed",
                "source": "faster than reading aloud",
            }
        },
    }
    return DeviceProfile.model_validate(values)


def measured_path() -> Path:
    """Where `devices measure` keeps this machine's profile; another machine with the same home has another."""
    cores = available_cores()
    host = recognise(gather(), logical_cores=cores)
    return files.config_dir() / "hosts" / f"{_key(host, cores, available_memory())}.toml"


def host_profile() -> DeviceProfile:
    """The profile of this machine, named "host": what `devices measure` found, else a known device's, else a guess.

    It computes on the GPU where the installed llama.cpp finds one that there are figures of.

    Raises:
        BadInput: the cache folder cannot be written to, or the kept profile is broken.
    """
    kept = measured_path()
    return with_gpu(read_profile(kept) if kept.is_file() else unmeasured_profile(), find_gpu())


def unmeasured_profile() -> DeviceProfile:
    """What is known of this machine before `devices measure`, its GPU left out: a known device's profile, else a guess.

    Raises:
        BadInput: the cache folder cannot be written to.
    """
    cores, memory_bytes = available_cores(), available_memory()
    host = recognise(gather(), logical_cores=cores)
    if host.profile is None:
        return generic_profile(
            host,
            cores=cores,
            memory_bytes=memory_bytes,
            read_gbs=measured_bandwidth(host, min(cores, host.big_cores), memory_bytes),
        )
    base = load_profile(host.profile)
    memory = base.memory
    if not memory.dedicated:
        total = PositiveFigure(
            value=round(memory_bytes / GIB, 3),
            low=round(memory_bytes / GIB, 3),
            high=round(memory_bytes / GIB, 3),
            kind="measured",
            source="this machine",
        )
        memory = memory.model_copy(update={"total_gib": total})
    return base.model_copy(
        update={
            "name": "host",
            "base": base.name,
            "aliases": (),
            "variants": {},
            "description": f"this machine, recognised as {base.name}: {base.description}",
            "memory": memory,
        }
    )
