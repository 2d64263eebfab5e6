"""Widths of each layer as the tensors of a checkpoint have them, whatever numbers its `config.json` gives."""

from __future__ import annotations

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.shape import LayerShape, ModelShape


def layer_shapes(checkpoint: Checkpoint, shape: ModelShape) -> tuple[LayerShape, ...]:
    """Widths of each layer by its tensors' dimensions; 0 heads and key/value heads, or 0 neurons, for an absent part.

    Args:
        checkpoint: holds the tensors, separate or fused as the family has them.
        shape: family, hidden size, head size, and which layers lack a part: where a width is 0 there, and only there,
            the part's tensors are absent.

    Raises:
        BadInput: a part that is absent and should not be, or the reverse; widths that are no whole heads, or that do
            not fit each other.
    """
    return tuple(_layer(checkpoint, shape, index) for index in range(len(shape.layers)))


def _layer(checkpoint: Checkpoint, shape: ModelShape, index: int) -> LayerShape:
    family, told, head_dim = shape.family, shape.layers[index], shape.head_dim

    def name(role: str) -> str:
        return f"{family.in_layer(index, role)}.weight"

    def dimensions(role: str) -> tuple[int, int]:
        found = checkpoint.dimensions(name(role))
        if len(found) != 2 or not all(found):
            raise BadInput(f"{name(role)} is {found}, expected (rows, columns)", where=checkpoint.folder)
        return found[0], found[1]

    def present(part: str, roles: tuple[str, ...], width: int) -> bool:
        found = any(name(role) in checkpoint for role in roles)
        if found != bool(width):
            has = "has tensors of an" if found else "has no tensors of its"
            raise BadInput(
                f"layer {index} {has} {part}",
                where=checkpoint.folder,
                remedy="the checkpoint does not match its config.json",
            )
        return found

    query = key = neurons = 0
    expected: dict[str, tuple[int, int]] = {}
    # The columns of the output and down projections are the widths; all else has to fit them.
    if present("attention", (*family.attention_inputs, "output"), told.heads):
        query = dimensions("output")[1]
        rows = [dimensions(role)[0] for role in family.attention_inputs]
        key = (rows[0] - query) // 2 if family.qkv else rows[1]
        if query % head_dim or key < head_dim or key % head_dim or query % key:
            raise BadInput(
                f"layer {index}: {query} query and {key} key rows do not make groups of {head_dim}-wide heads",
                where=checkpoint.folder,
            )
        inward = {"query": query, "key": key, "value": key, "qkv": query + 2 * key}
        expected |= {role: (inward[role], shape.hidden) for role in family.attention_inputs}
        expected["output"] = (shape.hidden, query)
    if present("MLP", (*family.mlp_inputs, "down"), told.neurons):
        neurons = dimensions("down")[1]
        inward = {"gate": neurons, "up": neurons, "gate_up": 2 * neurons}
        expected |= {role: (inward[role], shape.hidden) for role in family.mlp_inputs}
        expected["down"] = (shape.hidden, neurons)
    for role, wanted in expected.items():
        if dimensions(role) != wanted:
            raise BadInput(f"{name(role)} is {dimensions(role)}, expected {wanted}", where=checkpoint.folder)
    return LayerShape(query // head_dim, key // head_dim, neurons)
