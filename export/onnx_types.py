"""How weights are stored in an ONNX export, and how many bytes they will have, told before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import unknown
from edgeprune.shape import LayerShape, ModelShape

MAX_CONTEXT = 8192  # positions in the rotary tables unless more are asked for


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    `bits` is of the matrices in the layers, `table_bits` of embedding and head, in blocks of `block` with a float32
    scale each; where they are None, weights are stored as `dtype`.
    """

    bits: int | None = None
    table_bits: int | None = None
    block: int = 32
    symmetric: bool = True
    dtype: type = np.float32


# Chosen by measurement on SmolLM2-135M-Instruct (AVX-512, ONNX Runtime 1.32; KL to fp32 in nats per token over 1356
# tokens, MB of data, decode on one thread relative to int4):
#   int4, asymmetric     0.37   88 MB  1.00    symmetric: 0.41, 86 MB, same speed; without the search of ranges: 0.40
#   int4-head8           0.23  103 MB  0.84
#   int8, blocks of 64   0.008 145 MB  0.60    blocks of 32: 0.005, 154 MB, slower by 7 %
# DynamicQuantizeMatMul (int8, about 1.3 times as fast) is no choice: it has one scale for the activations of all tokens
# of a call, so a token of large activations spoils the others: 0.62 for a prompt in one piece, 0.02 token by token
# (on the 235 tokens of plain prose among them).
PRECISIONS: dict[str, Precision] = {
    "int4": Precision(bits=4, table_bits=4, symmetric=False),
    "int4-head8": Precision(bits=4, table_bits=8, symmetric=False),
    "int8": Precision(bits=8, table_bits=8, block=64),
    "fp16": Precision(dtype=np.float16),
    "fp32": Precision(),
}


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
        if not layer.heads:
            return 0
        query, kv = layer.heads * shape.head_dim, layer.kv_heads * shape.head_dim
        biases = shape.qkv_bias * (query + 2 * kv) + shape.output_bias * hidden
        return total([(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]) + 4 * biases

    def mlp(layer: LayerShape) -> int:
        if not layer.neurons:
            return 0
        inward = 2 if shape.family.gated else 1
        biases = shape.mlp_bias * (inward * layer.neurons + hidden)
        return total([(layer.neurons, hidden)] * inward + [(hidden, layer.neurons)]) + 4 * biases

    table = _matrix(shape.vocab, hidden, kind.table_bits, kind)
    return {
        "embedding": table,
        "attention": sum(attention(layer) for layer in shape.layers),
        "mlp": sum(mlp(layer) for layer in shape.layers),
        "norms": 4 * shape.norm_parameters,
        "head": (0 if shape.tied else table) + 4 * shape.head_bias * shape.vocab,
    }
