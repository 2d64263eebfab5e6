"""Attention in an ONNX graph: packed q/k/v, and rotary embedding and cache inside ONNX Runtime's GroupQueryAttention.

What the operator takes on the CPU (ONNX Runtime 1.32, tried): heads of a multiple of 16 values, of which any leading
multiple of 16 may be rotated; a scale, a soft cap and a window for each node. Norms of q and k it has inputs for, and
refuses; so they are nodes before it, on unpacked q and k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprune.errors import BadInput
from edgeprune.export.onnx_nodes import MICROSOFT, Nodes, tensor_value
from edgeprune.export.onnx_norm import norm
from edgeprune.shape import LayerShape, ModelShape, rotary_frequencies

_MULTIPLE = 16  # of values in a head, and of those rotated


def check_heads(shape: ModelShape, *, where: object) -> None:
    """Refuse heads that the operator does not take.

    Raises:
        BadInput: the size of a head, or of its rotated part, is no multiple of 16.
    """
    for what, size in (("head size", shape.head_dim), ("rotated part of a head", shape.rotary_dim)):
        if size % _MULTIPLE:
            raise BadInput(
                f"{what} {size} is no multiple of {_MULTIPLE}, which ONNX Runtime's attention needs",
                where=where,
                remedy="export to GGUF, or use --exporter optimum",
            )


class Attention:
    """The attention of all layers; `pasts` and `presents` are the caches that the graph takes and returns.

    Args:
        nodes: where the nodes go.
        shape: the model's constants.
        mask: the input `attention_mask`, (batch, total length).
        context: positions of the rotary tables.
    """

    def __init__(self, nodes: Nodes, shape: ModelShape, mask: ir.Value, *, context: int) -> None:
        self.nodes, self.shape = nodes, shape
        self.pasts: list[ir.Value] = []
        self.presents: list[ir.Value] = []
        self._lengths = self._count(mask)
        self._rotary = self._tables("", context, local=False)
        layers = range(len(shape.layers))
        self._local = self._tables("local_", context, local=True) if any(map(shape.local_rope, layers)) else []
        self._unpacking = self._unpacked_shapes() if shape.family.head_norms else []

    def __call__(self, x: ir.Value, index: int, layer: LayerShape) -> ir.Value:
        """Attention of layer `index`, output projection included, (batch, sequence, hidden) to the same."""
        nodes, family = self.nodes, self.shape.family
        path = f"/{family.layers}.{index}/attention"
        modules = [family.in_layer(index, role) for role in family.attention_inputs]
        packed = nodes.linear(x, f"{path}/qkv", modules, nodes.precision.bits)
        qkv = self._normed(packed, path, index, layer) if family.head_norms else [packed, None, None]
        past = [self._cache("past_key_values", index, kind, layer) for kind in ("key", "value")]
        present = [self._cache("present", index, kind, layer) for kind in ("key", "value")]
        self.pasts += past
        self.presents += present
        attended = ir.Value(name=f"{path}/GroupQueryAttention.out")
        rotary = self._local if self.shape.local_rope(index) else self._rotary
        nodes.node_of(
            "GroupQueryAttention",
            [*qkv, *past, *self._lengths, *rotary],
            self._attributes(index, layer),
            MICROSOFT,
            name=f"{path}/GroupQueryAttention",
            outputs=[attended, *present],
        )
        return nodes.linear(attended, f"{path}/output", [family.in_layer(index, "output")], nodes.precision.bits)

    def _attributes(self, index: int, layer: LayerShape) -> dict[str, Any]:
        shape = self.shape
        attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "do_rotary": 1}
        window = shape.window(index)
        if shape.query_scalar is not None:
            attributes["scale"] = shape.attention_scale
        if shape.attention_soft_cap is not None:
            attributes["softcap"] = shape.attention_soft_cap
        if window is not None:
            attributes["local_window_size"] = window  # counts the query's own position, as `window` does
        return attributes

    def _normed(self, packed: ir.Value, path: str, index: int, layer: LayerShape) -> list[ir.Value]:
        """Query, key and value apart, (batch, sequence, heads · head_dim) each, the first two normed head by head."""
        nodes, size = self.nodes, self.shape.head_dim
        to_heads, to_rows = self._unpacking
        widths = [layer.heads * size, layer.kv_heads * size, layer.kv_heads * size]
        sizes = nodes.integers(f"{path[1:]}/sizes", *widths)
        *apart, value = nodes.node_of("Split", [packed, sizes], {"axis": -1}, name=f"{path}/Split", outputs=3)
        normed = []
        for rows, role in zip(apart, ("query_norm", "key_norm"), strict=True):
            heads = nodes.node("Reshape", [rows, to_heads], name=f"{path}/{role}/heads")
            scaled = norm(nodes, self.shape, heads, f"{path}/{role}", self.shape.family.in_layer(index, role))
            normed.append(nodes.node("Reshape", [scaled, to_rows], name=f"{path}/{role}/rows"))
        return [*normed, value]

    def _unpacked_shapes(self) -> list[ir.Value]:
        """Targets of Reshape, 0 for what stays: (batch, sequence, heads, head_dim), and back."""
        return [
            self.nodes.integers("heads_apart", 0, 0, -1, self.shape.head_dim),
            self.nodes.integers("heads_together", 0, 0, -1),
        ]

    def _count(self, mask: ir.Value) -> list[ir.Value]:
        """The operator's `seqlens_k` (batch,), valid keys less one, and `total_sequence_length` (1,), both int32."""
        nodes = self.nodes
        one = nodes.integers("one", 1)
        count = nodes.node("ReduceSum", [mask, one], {"keepdims": 0}, name="/lengths/count")
        last = nodes.node("Sub", [count, one], name="/lengths/last")
        total = nodes.node("Shape", [mask], {"start": 1, "end": 2}, name="/lengths/total")
        return [
            nodes.node("Cast", [value], {"to": ir.DataType.INT32}, name=f"/lengths/{name}_int32")
            for name, value in (("last", last), ("total", total))
        ]

    def _tables(self, prefix: str, context: int, *, local: bool) -> list[ir.Value]:
        """Cosines and sines of all positions, (context, rotary_dim / 2) each, rounded once from float64."""
        angles = np.arange(context, dtype=np.float64)[:, None] * rotary_frequencies(self.shape, local=local)
        return [
            self.nodes.store.add(f"{prefix}{name}", function(angles).astype(np.float32))
            for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin))
        ]

    def _cache(self, prefix: str, index: int, kind: str, layer: LayerShape) -> ir.Value:
        length = "past_sequence_length" if prefix.startswith("past") else "total_sequence_length"
        dimensions: list[int | str] = ["batch_size", layer.kv_heads, length, self.shape.head_dim]
        return tensor_value(f"{prefix}.{index}.{kind}", ir.DataType.FLOAT, dimensions)
