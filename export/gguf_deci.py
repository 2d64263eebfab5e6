"""GGUF for layers that differ: llama.cpp's architecture `deci`, LLaMA's graph with widths of each layer's own.

Its rules (llama.cpp `src/models/deci.cpp` at the version the tests run with), beside those of architecture `llama`:
head counts, key/value head counts and MLP widths are arrays; q and k, weights and biases, are stored with rotary pairs
next to each other, layer by layer; a layer without heads has no attention tensors and no norm before them.

Its graph leaves a layer without MLP before the residual stream is updated: the layer's attention is lost, and in the
last layer so is the choice of the tokens whose logits are wanted. There a narrow MLP of zeros is written.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.errors import BadInput
from edgeprune.runtimes.gguf_file import Value, ValueType
from edgeprune.shape import LayerShape, ModelShape

DECI = "deci"
ZERO_MLP = 32  # neurons: the narrowest that every type of blocks of 32 takes


def architecture(shape: ModelShape, *, where: object = "model") -> str:
    """`general.architecture` of a model: its family's own while layers are alike, else the one with widths a layer.

    Raises:
        BadInput: layers differ, and llama.cpp has no such architecture for the family.
    """
    family = shape.family
    if shape.uniform:
        return family.gguf_arch
    if family.gguf_per_layer is None:
        raise BadInput(
            f"layers differ, and llama.cpp's architecture {family.gguf_arch!r} has one width for all",
            where=where,
            remedy="prune with a uniform plan, or export to ONNX",
        )
    return family.gguf_per_layer


def file_layers(shape: ModelShape) -> tuple[LayerShape, ...]:
    """The widths as the file has them: `shape`'s, with an MLP of zeros where the graph needs one."""
    if shape.uniform:
        return shape.layers
    last = len(shape.layers) - 1
    return tuple(
        replace(layer, neurons=ZERO_MLP) if not layer.neurons and (layer.heads or index == last) else layer
        for index, layer in enumerate(shape.layers)
    )


def is_filler(tensor: str, shape: ModelShape) -> bool:
    """Whether a tensor, by its llama.cpp name, belongs to an MLP of zeros that the model itself does not have."""
    if not tensor.startswith("blk."):
        return False
    _, layer, role, _ = tensor.split(".")
    return role.startswith("ffn_") and not shape.layers[int(layer)].neurons


def width_values(shape: ModelShape) -> dict[str, Value]:
    """The metadata of widths, without the architecture's prefix: numbers while layers are alike, else arrays."""
    keys = {"attention.head_count": "heads", "attention.head_count_kv": "kv_heads", "feed_forward_length": "neurons"}
    layers = file_layers(shape)
    if shape.uniform:
        return {key: Value(getattr(layers[0], field), ValueType.UINT32) for key, field in keys.items()}
    return {
        key: Value([getattr(layer, field) for layer in layers], ValueType.ARRAY, ValueType.UINT32)
        for key, field in keys.items()
    }
