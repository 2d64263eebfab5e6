"""A GPU, as a runtime tells of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: ggml's, such as "Vulkan0" or "CUDA0".
        description: its maker's name.
        integrated: whether it shares the machine's memory.
        free_mib: memory that is free, MiB.
        total_mib: memory, MiB.
    """

    name: str
    description: str
    integrated: bool
    free_mib: float
    total_mib: float

    def __str__(self) -> str:
        kind = "shared memory" if self.integrated else "own memory"
        return f"{self.name}: {self.description}, {self.free_mib:.0f} of {self.total_mib:.0f} MiB free, {kind}"
