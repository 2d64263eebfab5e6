"""Memory of a process on NVIDIA's GPUs, through NVML where `nvidia-ml-py` is installed."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no device: all mean that nothing is told
        return None
    return pynvml


def process_mib(pid: int) -> float | None:
    """MiB that process `pid` holds on all GPUs together; None where NVML does not tell."""
    library = _nvml()
    if library is None:
        return None
    total, told = 0.0, False
    try:
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == pid and process.usedGpuMemory is not None:
                    total, told = total + process.usedGpuMemory / 2**20, True
    except library.NVMLError:  # a virtual GPU, or a part of one without the right to ask
        return None
    return total if told else None
