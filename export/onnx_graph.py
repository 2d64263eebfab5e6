"""Writes a decoder as one fused ONNX graph that ONNX Runtime and onnxruntime-genai load as it is.

LLaMA's layer is ten nodes: norm with residual, packed q/k/v, attention with rotary embedding and cache in the operator,
output projection, norm with residual, packed gate/up, Split, SiLU, Mul, down projection; other families add what they
need (`onnx_attention`, `onnx_mlp`, `onnx_norm`, `onnx_tables`). Names of inputs and outputs are those of
onnxruntime-genai. All widths are read from each layer's own tensors, so layers may differ, and lack attention, which
leaves them without cache inputs, or the MLP.

The graph has one input more, `LOGITS_FROM`, with a default value: the first position whose logits are computed. Callers
that do not know it get `LOGITS_DEFAULT`; ours asks for the last position only, or for all, call by call. Graphs for
transformers.js have `LOGITS_KEPT` in its place: how many positions, from the last, 0 for all; without a default, for
that library only looks at inputs that have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, unknown
from edgeprune.export.onnx_attention import Attention, check_heads
from edgeprune.export.onnx_bundle import write_bundle
from edgeprune.export.onnx_mlp import ACTIVATIONS, mlp
from edgeprune.export.onnx_nodes import OPSETS, Nodes, tensor_value
from edgeprune.export.onnx_norm import add_and_norm, norm
from edgeprune.export.onnx_store import Store
from edgeprune.export.onnx_tables import Tables
from edgeprune.export.onnx_types import MAX_CONTEXT, PRECISIONS
from edgeprune.export.widths import layer_shapes
from edgeprune.files import atomic_folder
from edgeprune.shape import LayerShape, ModelShape

LOGITS_FROM, LOGITS_KEPT = "logits_from", "num_logits_to_keep"
LOGITS_DEFAULT = 0


@dataclass(frozen=True)
class Layout:
    """How a loader wants its graph.

    Attributes:
        model: name of the graph's file.
        data: name of the file with its weights.
        logits: the input that says which logits are computed.
        fused_gather: whether a quantised embedding is looked up by ONNX Runtime's own operator. Its build for browsers
            with WebGPU has that only on the GPU (1.31, tried).
    """

    model: str = "model.onnx"
    data: str = "model.onnx.data"
    logits: str = LOGITS_FROM
    fused_gather: bool = True


def export_onnx(
    folder: Path, out: Path, *, precision: str, shape: ModelShape | None = None, context: int | None = None
) -> Path:
    """Write the checkpoint `folder` as an ONNX folder `out`, whole or not at all; returns `out`.

    Args:
        precision: a name in `PRECISIONS`.
        shape: constants other than those of the folder's `config.json`, and which layers lack a part (a width of 0);
            all other widths come from the tensors in any case.
        context: positions the rotary tables hold; default: the model's, at most `MAX_CONTEXT`.

    Raises:
        BadInput: an unknown precision, a folder that is no checkpoint, tensors that do not fit each other, or a head
            size that ONNX Runtime's attention does not take.
    """
    with atomic_folder(out) as temporary:
        shape, context = write_graph(folder, temporary, precision=precision, shape=shape, context=context)
        write_bundle(Checkpoint(folder), shape, temporary, context=context)
    return out


def write_graph(
    folder: Path,
    out: Path,
    *,
    precision: str,
    layout: Layout | None = None,
    shape: ModelShape | None = None,
    context: int | None = None,
) -> tuple[ModelShape, int]:
    """Write the graph of the checkpoint `folder` and its weights, alone, into the folder `out`.

    Args and errors are those of `export_onnx`; `layout` is by default onnxruntime-genai's.

    Returns:
        The shape with each layer's own widths, and the context.
    """
    layout = layout or Layout()
    if precision not in PRECISIONS:
        raise unknown("ONNX precision", precision, PRECISIONS)
    checkpoint = Checkpoint(folder)
    shape = shape or checkpoint.shape
    if context is not None and not 0 < context <= shape.max_positions:
        raise BadInput(f"context {context} is not in 1 ... {shape.max_positions}, the model's positions", where=folder)
    context = context or min(shape.max_positions, MAX_CONTEXT)
    if shape.family.activation not in ACTIVATIONS:
        raise BadInput(
            f"activation {shape.family.activation} is not one of {', '.join(ACTIVATIONS)}",
            where=folder,
            remedy="use --exporter optimum",
        )
    check_heads(shape, where=folder)
    shape = shape.with_layers(layer_shapes(checkpoint, shape))
    with Store(out, layout.data) as store:
        nodes = Nodes(checkpoint, PRECISIONS[precision], store)
        model = _Decoder(nodes, shape, layout).model(context)
    ir.save(model, out / layout.model)
    return shape, context


class _Decoder:
    """Builds the graph's nodes in order; hidden states are (batch, sequence, hidden) float32 throughout."""

    def __init__(self, nodes: Nodes, shape: ModelShape, layout: Layout) -> None:
        self.nodes, self.shape, self.layout = nodes, shape, layout

    def model(self, context: int) -> ir.Model:
        """The whole model."""
        family, nodes = self.shape.family, self.nodes
        ids = tensor_value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = tensor_value("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        selector, first = self._first_logits()
        attention = Attention(nodes, self.shape, mask, context=context)
        tables = Tables(nodes, self.shape, fused_gather=self.layout.fused_gather)

        residual, branch = tables.embed(ids), None
        layer_of = self._parallel_layer if family.parallel else self._layer
        for index, layer in enumerate(self.shape.layers):
            residual, branch = layer_of(attention, residual, branch, index, layer)
        path = f"/{family.final_norm}"
        normed, _ = add_and_norm(nodes, self.shape, residual, branch, path, family.final_norm, keep_sum=False)

        bounds = [nodes.integers(f"logits/{key}", value) for key, value in (("end", 1 << 62), ("axis", 1))]
        logits = tables.logits(nodes.node("Slice", [normed, first, *bounds], name="/logits/Slice"))
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch_size", "logits_length", tables.vocab])
        graph = ir.Graph(
            [ids, mask, *attention.pasts, selector],
            [logits, *attention.presents],
            nodes=nodes.nodes,
            initializers=nodes.store.initializers,
            opset_imports=OPSETS,
            name=family.name,
        )
        return ir.Model(graph, ir_version=10, producer_name="edgeprune")

    def _first_logits(self) -> tuple[ir.Value, ir.Value]:
        """The input that selects logits, and the first position that it selects, (1,): negative counts from the end."""
        if self.layout.logits == LOGITS_FROM:
            selector = self.nodes.integers(LOGITS_FROM, LOGITS_DEFAULT)
            return selector, selector
        selector = tensor_value(self.layout.logits, ir.DataType.INT64, [])
        count = self.nodes.node("Reshape", [selector, self.nodes.integers("one_value", 1)], name="/logits/count")
        return selector, self.nodes.node("Neg", [count], name="/logits/first")  # none kept is -0: all of them

    # A layer takes the residual and what is to be added to it, None for nothing, and gives the same: the addition is
    # left to the next norm, which does it in the same kernel. A part that the layer lacks leaves no node.

    def _layer(
        self, attention: Attention, residual: ir.Value, branch: ir.Value | None, index: int, layer: LayerShape
    ) -> tuple[ir.Value, ir.Value | None]:
        """Attention, then MLP, each between its norms."""
        if layer.heads:
            normed, residual = self._norm(residual, branch, index, "attention_norm")
            branch = self._post_norm(attention(normed, index, layer), index, "attention_post_norm")
        if layer.neurons:
            normed, residual = self._norm(residual, branch, index, "mlp_norm")
            branch = self._post_norm(mlp(self.nodes, self.shape, normed, index), index, "mlp_post_norm")
        return residual, branch

    def _parallel_layer(
        self, attention: Attention, residual: ir.Value, branch: ir.Value | None, index: int, layer: LayerShape
    ) -> tuple[ir.Value, ir.Value | None]:
        """Attention and MLP of the same normed hidden states, added up."""
        if not layer.heads and not layer.neurons:
            return residual, branch
        normed, residual = self._norm(residual, branch, index, "attention_norm")
        parts = [attention(normed, index, layer)] if layer.heads else []
        parts += [mlp(self.nodes, self.shape, normed, index)] if layer.neurons else []
        path = f"/{self.shape.family.layers}.{index}/Add"
        return residual, parts[0] if len(parts) == 1 else self.nodes.node("Add", parts, name=path)

    def _norm(self, residual: ir.Value, branch: ir.Value | None, index: int, role: str) -> tuple[ir.Value, ir.Value]:
        family = self.shape.family
        path = f"/{family.layers}.{index}/{role}"
        return add_and_norm(self.nodes, self.shape, residual, branch, path, family.in_layer(index, role))

    def _post_norm(self, branch: ir.Value, index: int, role: str) -> ir.Value:
        family = self.shape.family
        if role not in family.hidden_norms:
            return branch
        return norm(self.nodes, self.shape, branch, f"/{family.layers}.{index}/{role}", family.in_layer(index, role))
