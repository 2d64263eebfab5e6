"""Widths of each layer as the tensors of a checkpoint have them, whatever its `config.json` says."""

from __future__ import annotations

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.shape import LayerShape, ModelShape


def layer_shapes(checkpoint: Checkpoint, shape: ModelShape) -> tuple[LayerShape, ...]:
    """Widths of each layer by its tensors' dimensions.

    Raises:
        BadInput: widths that are no whole heads, or that do not fit each other.
    """
    family = shape.family
    layers = []
    for index in range(len(shape.layers)):

        def outputs(role: str, columns: int, index: int = index) -> int:
            name = f"{family.in_layer(index, role)}.weight"
            dimensions = checkpoint.dimensions(name)
            if len(dimensions) != 2 or dimensions[1] != columns or not dimensions[0]:
                raise BadInput(f"{name} is {dimensions}, expected (rows, {columns})", where=checkpoint.folder)
            return dimensions[0]

        query, key = outputs("query", shape.hidden), outputs("key", shape.hidden)
        neurons = outputs("up", shape.hidden)
        heads, kv_heads = query // shape.head_dim, key // shape.head_dim
        if query % shape.head_dim or key % shape.head_dim or heads % kv_heads:
            raise BadInput(
                f"layer {index}: {query} query and {key} key rows do not make groups of {shape.head_dim}-wide heads",
                where=checkpoint.folder,
            )
        expected = {"value": (key, shape.hidden), "output": (shape.hidden, query), "down": (shape.hidden, neurons)}
        if family.gate:
            expected["gate"] = (neurons, shape.hidden)
        for role, (rows, columns) in expected.items():
            if outputs(role, columns) != rows:
                raise BadInput(
                    f"layer {index}: {role} has {outputs(role, columns)} rows, expected {rows}", where=checkpoint.folder
                )
        layers.append(LayerShape(heads, kv_heads, neurons))
    return tuple(layers)
