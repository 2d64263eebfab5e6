"""Embedding and head of an ONNX graph; tied, both use the same bytes of the file."""

from __future__ import annotations

import onnx_ir as ir

from edgeprune.errors import BadInput
from edgeprune.export.onnx_nodes import MICROSOFT, Nodes, Quantised
from edgeprune.shape import ModelShape


class Tables:
    """The embedding's table, and the head's; `vocab` is their rows.

    Args:
        nodes: where the nodes go.
        shape: the model's constants.

    Raises:
        BadInput: the embedding does not have one hidden state a row.
    """

    def __init__(self, nodes: Nodes, shape: ModelShape) -> None:
        self.nodes, self.shape, self.bits = nodes, shape, nodes.precision.table_bits
        self._name = f"{shape.family.embedding}.weight"
        table = nodes.checkpoint.tensor(self._name)
        if table.ndim != 2 or table.shape[1] != shape.hidden:
            raise BadInput(
                f"{self._name} is {table.shape}, expected (rows, {shape.hidden})", where=nodes.checkpoint.folder
            )
        self.vocab = len(table)
        self._stored: ir.Value | Quantised
        if self.bits:
            self._stored = nodes.quantised(self._name, table, self.bits)
        else:
            self._stored = nodes.rounded(self._name, table)

    def embed(self, ids: ir.Value) -> ir.Value:
        """Hidden states (batch, sequence, hidden) of token ids (batch, sequence), scaled where the family does."""
        nodes, path = self.nodes, f"/{self.shape.family.embedding}"
        if isinstance(self._stored, tuple):
            embedded = self._gather_quantised(ids, self._stored, path)
        else:
            embedded = nodes.node("Gather", [self._stored, ids], name=f"{path}/Gather")
            embedded = nodes.widened(embedded, f"{path}/Cast")
        if self.shape.family.scaled_embedding:
            scale = nodes.floats(f"{path[1:]}/scale", self.shape.embedding_scale)
            embedded = nodes.node("Mul", [embedded, scale], name=f"{path}/Scale")
        return embedded

    def logits(self, x: ir.Value) -> ir.Value:
        """Logits (batch, sequence, vocab) of normed hidden states, capped where the model does."""
        nodes, path = self.nodes, f"/{self.shape.family.head}"
        logits = self._tied_product(x, path) if self.shape.tied else self._own_product(x, path)
        cap = self.shape.logit_soft_cap
        if cap is None:
            return logits
        bounds = [nodes.floats(f"{path[1:]}/{name}", value) for name, value in (("shrink", 1 / cap), ("cap", cap))]
        small = nodes.node("Mul", [logits, bounds[0]], name=f"{path}/Shrink")
        bent = nodes.node("Tanh", [small], name=f"{path}/Tanh")
        return nodes.node("Mul", [bent, bounds[1]], name=f"{path}/Cap")

    def _own_product(self, x: ir.Value, path: str) -> ir.Value:
        return self.nodes.linear(x, path, [self.shape.family.head], self.bits)

    def _tied_product(self, x: ir.Value, path: str) -> ir.Value:
        nodes = self.nodes
        bias = nodes.bias(path, [self.shape.family.head], self.vocab)
        if isinstance(self._stored, tuple):
            return nodes.matmul_nbits(x, path, self._stored, self.bits or 0, (self.vocab, self.shape.hidden), bias)
        wide = nodes.widened(self._stored, f"{path}/Cast")
        product = nodes.node("FusedMatMul", [x, wide], {"transB": 1}, MICROSOFT, name=f"{path}/MatMul")
        return product if bias is None else nodes.node("Add", [product, bias], name=f"{path}/Add")

    def _gather_quantised(self, ids: ir.Value, weight: Quantised, path: str) -> ir.Value:
        """Rows of a quantised table, which must have two dimensions here and has three in a matrix product."""
        nodes, block = self.nodes, self.nodes.precision.block
        codes, scales, zeros = weight
        rows, blocks, width = codes.const_value.shape.numpy()
        flat = nodes.store.alias(f"{codes.name}.rows", codes, (rows, blocks * width))
        if not self.shape.tied:
            nodes.store.initializers.remove(codes)
        embedded = nodes.node(
            "GatherBlockQuantized",
            [flat, ids, scales, zeros],
            {"bits": self.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
            MICROSOFT,
            name=f"{path}/Gather",
        )
        if blocks * block == self.shape.hidden:
            return embedded
        # The last block of a row is padded
        limits = (("start", 0), ("end", self.shape.hidden), ("axis", 2))
        bounds = [nodes.integers(f"{path[1:]}/{key}", value) for key, value in limits]
        return nodes.node("Slice", [embedded, *bounds], name=f"{path}/Slice")
