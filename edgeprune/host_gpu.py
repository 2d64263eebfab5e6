"""The GPU in a machine's profile: what the installed llama.cpp finds decides what a model runs on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgeprune.devices import Backend, DeviceProfile, load_profile
from edgeprune.errors import BadInput
from edgeprune.runtimes.gpu import Gpu
from edgeprune.runtimes.isolate import Execute, run_isolated

# How ggml's names of devices begin.
_BACKENDS: Mapping[str, Backend] = {"CUDA": "cuda", "MTL": "metal", "Metal": "metal", "Vulkan": "vulkan"}
# What ggml calls a GPU, and the profile with its figures.
_KNOWN = (
    (r"NVIDIA GeForce RTX 4050 Laptop GPU", "rtx4050-laptop"),
    (r"NVIDIA GeForce RTX 4060 Laptop GPU", "rtx4060-laptop"),
)
_USABLE = {
    "value": 0.9,
    "low": 0.8,
    "high": 0.95,
    "kind": "assumed",
    "source": "the rest for the display and the driver",
}


def backend_of(gpu: Gpu) -> Backend | None:
    """The backend of profiles that computes on `gpu`; None for one that they do not know."""
    return next((backend for prefix, backend in _BACKENDS.items() if gpu.name.startswith(prefix)), None)


def find_gpu(execute: Execute = run_isolated) -> Gpu | None:
    """The GPU that llama.cpp would use: one with memory of its own first, the largest of them. None without any.

    Args:
        execute: runs a function on the machine in question, in a process of its own.
    """
    try:
        outcome = execute("edgeprune.runtimes.llamacpp_devices:listed", {}, timeout_s=60)
    except BadInput:  # llama.cpp is not installed
        return None
    found = [Gpu(**each) for each in outcome.value] if outcome.status == "ok" else []
    known = [gpu for gpu in found if backend_of(gpu)]
    return max(known, key=lambda gpu: (not gpu.integrated, gpu.total_mib), default=None)


def with_memory_of(profile: DeviceProfile, gpu: Gpu) -> DeviceProfile:
    """`profile` with the memory of `gpu`, and the machine's beside it; as it was where the GPU shares that. Pure."""
    if gpu.integrated:
        return profile
    gib = round(gpu.total_mib / 1024, 3)
    memory = {"total_gib": {"value": gib, "kind": "measured", "source": f"{gpu.name} of this machine"}}
    beside = (profile.beside or profile.memory).model_dump(exclude_none=True)
    return _changed(
        profile, gpu=gpu.description[:200], beside=beside, memory={**memory, "usable_share": _USABLE, "dedicated": True}
    )


def with_gpu(profile: DeviceProfile, gpu: Gpu | None) -> DeviceProfile:
    """`profile` as the machine computes: on `gpu` where there are figures of it, else on the processor. Pure.

    Figures are the profile's own (`devices measure`), or those of a known GPU with memory of its own.
    """
    backend = None if gpu is None else backend_of(gpu)
    if gpu is None or backend is None:
        if profile.start.backend == "cpu" or "cpu" not in profile.decode:
            return profile  # without a figure of the processor, measuring will say what is missing
        memory = (profile.beside or profile.memory).model_dump(exclude_none=True)
        start = profile.start.model_copy(update={"backend": "cpu"})
        return _changed(profile, start=start.model_dump(), memory=memory, beside=None)
    if backend in profile.decode or gpu.integrated:
        return profile
    name = next((name for pattern, name in _KNOWN if re.fullmatch(pattern, gpu.description)), None)
    known = None if name is None else load_profile(name)
    if known is None or backend not in known.decode:
        return profile
    values = profile.model_dump(exclude_none=True)
    theirs = known.model_dump(exclude_none=True)
    return _changed(
        with_memory_of(profile, gpu),
        decode={**values["decode"], backend: theirs["decode"][backend]},
        prefill={**values["prefill"], backend: theirs["prefill"].get(backend, {})},
        start={**values["start"], "backend": backend},
    )


def _changed(profile: DeviceProfile, **changes: Any) -> DeviceProfile:
    values = profile.model_dump(exclude_none=True) | changes
    return DeviceProfile.model_validate({name: value for name, value in values.items() if value is not None})
