"""How many bytes an ONNX export will have, told before anything is written."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgeprune.errors import unknown
from edgeprune.export.onnx_graph import PRECISIONS, Precision
from edgeprune.shape import LayerShape, ModelShape


def _matrix(rows: int, columns: int, bits: int | None, precision: Precision) -> int:
    """Bytes of a weight (rows, columns): codes, a float32 scale a block and, asymmetric, packed zero points."""
    if bits is None:
        return rows * columns * np.dtype(precision.dtype).itemsize
    blocks = -(-columns // precision.block)
    zero_points = 0 if precision.symmetric else -(-blocks * bits // 8)
    return rows * (blocks * precision.block * bits // 8 + 4 * blocks + zero_points)


def predicted_bytes(shape: ModelShape, precision: str) -> dict[str, int]:
    """Bytes of the weights of each part in a model exported as `precision`; the graph itself is not counted.

    With a tied head "embedding" is read whole for every token; without, "head" is, and one row of "embedding".

    Raises:
        BadInput: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise unknown("ONNX precision", precision, PRECISIONS)
    kind = PRECISIONS[precision]
    hidden = shape.hidden

    def total(matrices: Iterable[tuple[int, int]]) -> int:
        return sum(_matrix(rows, columns, kind.bits, kind) for rows, columns in matrices)

    def attention(layer: LayerShape) -> int:
        query, kv = layer.heads * shape.head_dim, layer.kv_heads * shape.head_dim
        biases = shape.qkv_bias * (query + 2 * kv) + shape.output_bias * hidden
        return total([(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]) + 4 * biases

    def mlp(layer: LayerShape) -> int:
        inward = 2 if shape.family.gated else 1
        biases = shape.mlp_bias * (inward * layer.neurons + hidden)
        return total([(layer.neurons, hidden)] * inward + [(hidden, layer.neurons)]) + 4 * biases

    table = _matrix(shape.vocab, hidden, kind.table_bits, kind)
    return {
        "embedding": table,
        "attention": sum(attention(layer) for layer in shape.layers),
        "mlp": sum(mlp(layer) for layer in shape.layers),
        "norms": 4 * shape.norm_parameters,
        "head": 0 if shape.tied else table,
    }
