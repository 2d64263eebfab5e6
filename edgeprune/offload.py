"""Which part of a model a GPU with memory of its own computes, where it has no room for all of it. Pure arithmetic.

As llama.cpp counts, the head is one layer more than the decoder has, and goes to the GPU first; then the decoder's
layers from the last to the first, each with its part of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.devices import Backend
from edgeprune.errors import BadInput
from edgeprune.runtimes.settings import ALL_LAYERS, Values

# ONNX Runtime's provider for a backend, by the name of its setting (`runtimes.ort`).
PROVIDERS: Mapping[Backend, str] = {"cuda": "cuda", "metal": "coreml", "igpu": "directml", "vulkan": "directml"}


@dataclass(frozen=True)
class Split:
    """A model divided between a GPU and the processor.

    Attributes:
        gpu_layers: what llama.cpp is told; `ALL_LAYERS` where nothing is left to the processor.
        layers: how many of the decoder's are on the GPU.
        gpu_bytes: weights and cache on the GPU.
        share: of what a token reads, the part that the GPU reads, 0 to 1.
    """

    gpu_layers: int
    layers: int
    gpu_bytes: float
    share: float


def split(room: float, *, read: float, cache: float, head: float, n_layers: int) -> Split:
    """As many layers on the GPU as it has room for.

    Args:
        room: bytes of the GPU's memory for weights and cache.
        read: bytes of weights that a token reads, the head's among them.
        cache: bytes of the whole key/value cache.
        head: bytes of the head.
        n_layers: the decoder's layers; taken to be of one size.

    Raises:
        BadInput: a negative size, no layers, or a head larger than all that is read.
    """
    if n_layers < 1 or min(read, cache, head) < 0 or head > read:
        raise BadInput("a split needs sizes of at least 0, a layer at least, and a head among what is read")
    layer = (read - head + cache) / n_layers
    if read + cache <= room:
        return Split(ALL_LAYERS, n_layers, read + cache, 1.0)
    if head > room:
        return Split(0, 0, 0.0, 0.0)
    layers = min(int((room - head) / layer), n_layers - 1) if layer else n_layers - 1
    held = head + layers * layer
    return Split(layers + 1, layers, held, held / (read + cache))


def device_settings(runtime: str, backend: Backend, gpu_layers: int | None) -> Values:
    """What a runtime has to be told for a model to be computed by `backend`; nothing for the processor."""
    if backend == "cpu":
        return {}
    if runtime == "onnxruntime":
        return {"provider": PROVIDERS[backend]}
    return {"gpu_layers": ALL_LAYERS if gpu_layers is None else gpu_layers}
