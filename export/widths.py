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
    family, head_dim = shape.family, shape.head_dim
    layers = []
    for index in range(len(shape.layers)):

        def dimensions(role: str, index: int = index) -> tuple[int, int]:
            name = f"{family.in_layer(index, role)}.weight"
            found = checkpoint.dimensions(name)
            if len(found) != 2 or not all(found):
                raise BadInput(f"{name} is {found}, expected (rows, columns)", where=checkpoint.folder)
            return found[0], found[1]

        # The columns of the output and down projections are the widths; all else has to fit them.
        query, neurons = dimensions("output")[1], dimensions("down")[1]
        rows = [dimensions(role)[0] for role in family.attention_inputs]
        key = (rows[0] - query) // 2 if family.qkv else rows[1]
        heads, kv_heads = query // head_dim, key // head_dim
        if query % head_dim or key % head_dim or kv_heads < 1 or heads % kv_heads:
            raise BadInput(
                f"layer {index}: {query} query and {key} key rows do not make groups of {head_dim}-wide heads",
                where=checkpoint.folder,
            )
        expected = {"output": (shape.hidden, query), "down": (shape.hidden, neurons)}
        inward = {"query": query, "key": key, "value": key, "qkv": query + 2 * key}
        inward |= {"gate": neurons, "up": neurons, "gate_up": 2 * neurons}
        for role in (*family.attention_inputs, *family.mlp_inputs):
            expected[role] = (inward[role], shape.hidden)
        for role, wanted in expected.items():
            if dimensions(role) != wanted:
                raise BadInput(
                    f"layer {index}: {role} is {dimensions(role)}, expected {wanted}", where=checkpoint.folder
                )
        layers.append(LayerShape(heads, kv_heads, neurons))
    return tuple(layers)
