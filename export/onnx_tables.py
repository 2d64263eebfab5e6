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
        fused_gather: look rows of a quantised embedding up by ONNX Runtime's own operator, not by ONNX's.

    Raises:
        BadInput: the embedding does not have one hidden state a row.
    """

    def __init__(self, nodes: Nodes, shape: ModelShape, *, fused_gather: bool = True) -> None:
        self.nodes, self.shape, self.bits = nodes, shape, nodes.precision.table_bits
        self._fused_gather = fused_gather
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
            gather = self._gather_fused if self._fused_gather else self._gather_plain
            embedded = self._whole_blocks(gather(ids, self._stored, path), self._stored, path)
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

    def _gather_fused(self, ids: ir.Value, weight: Quantised, path: str) -> ir.Value:
        """Rows of a quantised table, which must have two dimensions here and has three in a matrix product."""
        nodes, block = self.nodes, self.nodes.precision.block
        codes, scales, zeros = weight
        rows, blocks, width = codes.const_value.shape.numpy()
        flat = nodes.store.alias(f"{codes.name}.rows", codes, (rows, blocks * width))
        if not self.shape.tied:
            nodes.store.initializers.remove(codes)
        return nodes.node(
            "GatherBlockQuantized",
            [flat, ids, scales, zeros],
            {"bits": self.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
            MICROSOFT,
            name=f"{path}/Gather",
        )

    def _gather_plain(self, ids: ir.Value, weight: Quantised, path: str) -> ir.Value:
        """The same rows by ONNX's own operators: codes, scales and zero points gathered, then (code - zero) * scale."""
        nodes = self.nodes
        codes, scales, zeros = weight
        _, blocks, _ = codes.const_value.shape.numpy()
        last = nodes.integers(f"{path[1:]}/last", -1)
        levels = self._unpacked(nodes.node("Gather", [codes, ids], name=f"{path}/codes"), f"{path}/codes")
        if zeros is None:
            zero = nodes.floats(f"{path[1:]}/zero", 1 << ((self.bits or 0) - 1))
        else:
            packed = self._unpacked(nodes.node("Gather", [zeros, ids], name=f"{path}/zeros"), f"{path}/zeros")
            zero = nodes.node(
                "Unsqueeze", [self._cut(packed, blocks, f"{path}/zeros"), last], name=f"{path}/zeros/column"
            )
        scale = nodes.node("Gather", [scales, ids], name=f"{path}/scales")
        scale = nodes.node("Unsqueeze", [scale, last], name=f"{path}/scales/column")
        values = nodes.node(
            "Mul", [nodes.node("Sub", [levels, zero], name=f"{path}/Sub"), scale], name=f"{path}/Scaled"
        )
        flat = nodes.integers(f"{path[1:]}/flat", 0, 0, -1)
        return nodes.node("Reshape", [values, flat], name=f"{path}/Flat")

    def _unpacked(self, packed: ir.Value, path: str) -> ir.Value:
        """Codes as float32, the last dimension twice as long where a byte holds two, the low half first."""
        nodes = self.nodes
        whole = nodes.node("Cast", [packed], {"to": ir.DataType.FLOAT}, name=f"{path}/Cast")
        if self.bits == 8:
            return whole
        sixteen = nodes.floats(f"{path[1:]}/sixteen", 16.0)
        last = nodes.integers(f"{path[1:]}/last", -1)
        high = nodes.node("Floor", [nodes.node("Div", [whole, sixteen], name=f"{path}/Div")], name=f"{path}/High")
        low = nodes.node("Sub", [whole, nodes.node("Mul", [high, sixteen], name=f"{path}/Mul")], name=f"{path}/Low")
        halves = [nodes.node("Unsqueeze", [half, last], name=f"{half.producer().name}/column") for half in (low, high)]
        pairs = nodes.node("Concat", halves, {"axis": -1}, name=f"{path}/Pairs")
        # (..., n, 2) to (..., 2 n): three dimensions stay before codes of blocks, two before zero points
        kept = 3 if path.endswith("codes") else 2
        return nodes.node("Reshape", [pairs, nodes.integers(f"{path[1:]}/row", *[0] * kept, -1)], name=f"{path}/Row")

    def _whole_blocks(self, embedded: ir.Value, weight: Quantised, path: str) -> ir.Value:
        """Rows without the padding of their last block."""
        _, blocks, _ = weight[0].const_value.shape.numpy()
        if blocks * self.nodes.precision.block == self.shape.hidden:
            return embedded
        return self._cut(embedded, self.shape.hidden, path)

    def _cut(self, value: ir.Value, length: int, path: str) -> ir.Value:
        """The first `length` entries of (batch, sequence, ...)."""
        limits = (("start", 0), ("end", length), ("axis", 2))
        bounds = [self.nodes.integers(f"{path[1:]}/{key}", limit) for key, limit in limits]
        return self.nodes.node("Slice", [value, *bounds], name=f"{path}/Slice")
