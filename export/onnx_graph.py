"""Writes a decoder as one fused ONNX graph that ONNX Runtime and onnxruntime-genai load as it is.

A layer is ten nodes: norm with residual, packed q/k/v, attention with rotary embedding and cache in the operator,
output projection, norm with residual, packed gate/up, Split, SiLU, Mul, down projection. Names of inputs and outputs
are those of onnxruntime-genai. All widths are read from each layer's own tensors, so layers may differ.

The graph has one input more, `LOGITS_FROM`, with a default value: the first position whose logits are computed. Callers
that do not know it get `LOGITS_DEFAULT`; ours asks for the last position only, or for all, call by call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, unknown
from edgeprune.export.onnx_bundle import write_bundle
from edgeprune.export.onnx_quant import quantise
from edgeprune.export.onnx_store import Store
from edgeprune.export.widths import layer_shapes
from edgeprune.files import atomic_folder
from edgeprune.shape import LayerShape, ModelShape, rotary_frequencies

MODEL, DATA = "model.onnx", "model.onnx.data"
LOGITS_FROM = "logits_from"
LOGITS_DEFAULT = 0
MAX_CONTEXT = 8192  # positions in the rotary tables unless more are asked for
_MICROSOFT = "com.microsoft"
Quantised = tuple[ir.Value, ir.Value, ir.Value | None]  # codes, scales, zero points
_OPSETS = {"": 21, _MICROSOFT: 1}


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


def export_onnx(
    folder: Path, out: Path, *, precision: str, shape: ModelShape | None = None, context: int | None = None
) -> Path:
    """Write the checkpoint `folder` as an ONNX folder `out`, whole or not at all; returns `out`.

    Args:
        precision: a name in `PRECISIONS`.
        shape: constants other than those of the folder's `config.json`; widths come from the tensors in any case.
        context: positions the rotary tables hold; default: the model's, at most `MAX_CONTEXT`.

    Raises:
        BadInput: an unknown precision, a folder that is no checkpoint, tensors that do not fit each other, or a head
            size that ONNX Runtime's attention does not take.
    """
    if precision not in PRECISIONS:
        raise unknown("ONNX precision", precision, PRECISIONS)
    checkpoint = Checkpoint(folder)
    shape = shape or checkpoint.shape
    if context is not None and not 0 < context <= shape.max_positions:
        raise BadInput(f"context {context} is not in 1 ... {shape.max_positions}, the model's positions", where=folder)
    context = context or min(shape.max_positions, MAX_CONTEXT)
    if not shape.family.gate or shape.family.activation != "silu":
        raise BadInput(
            f"family {shape.family.name} has an MLP that this graph does not know",
            where=folder,
            remedy="use --exporter optimum",
        )
    shape = shape.with_layers(layer_shapes(checkpoint, shape))
    if shape.head_dim % 16:
        raise BadInput(
            f"head size {shape.head_dim} is no multiple of 16, which ONNX Runtime's attention needs",
            where=folder,
            remedy="export to GGUF, or use --exporter optimum",
        )
    with atomic_folder(out) as temporary:
        with Store(temporary, DATA) as store:
            model = _Decoder(checkpoint, shape, PRECISIONS[precision], store).model(context)
        ir.save(model, temporary / MODEL)
        write_bundle(checkpoint, shape, temporary, context=context)
    return out


class _Decoder:
    """Builds the graph's nodes in order, writing each weight to the store as it is met."""

    def __init__(self, checkpoint: Checkpoint, shape: ModelShape, precision: Precision, store: Store) -> None:
        self.checkpoint, self.shape, self.precision, self.store = checkpoint, shape, precision, store
        self.nodes: list[ir.Node] = []

    def model(self, context: int) -> ir.Model:
        """The whole model; hidden states are (batch, sequence, hidden) float32 throughout."""
        family = self.shape.family
        ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = _value("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        logits_from = self.store.add(LOGITS_FROM, np.array([LOGITS_DEFAULT], np.int64))
        inputs, presents = [ids, mask], []
        lengths = self._lengths(mask)
        rotary = self._rotary(context)
        embedded, head = self._embedding(ids)

        residual, branch = embedded, None
        for index, layer in enumerate(self.shape.layers):
            path = f"/{family.layers}.{index}"
            normed, residual = self._norm(
                residual, branch, f"{path}/attention_norm", family.in_layer(index, "attention_norm")
            )
            past = [self._cache("past_key_values", index, kind, layer) for kind in ("key", "value")]
            present = [self._cache("present", index, kind, layer) for kind in ("key", "value")]
            branch = self._attention(normed, index, layer, [*past, *lengths, *rotary], present)
            inputs += past
            presents += present
            normed, residual = self._norm(residual, branch, f"{path}/mlp_norm", family.in_layer(index, "mlp_norm"))
            branch = self._mlp(normed, index)
        normed, _ = self._norm(residual, branch, f"/{family.final_norm}", family.final_norm, keep_sum=False)

        bounds = [self.store.add(f"logits/{k}", np.array([v], np.int64)) for k, v in (("end", 1 << 62), ("axis", 1))]
        selected = self._node("Slice", [normed, logits_from, *bounds], name="/logits/Slice")
        logits = head(selected)
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch_size", "logits_length", self.vocab])
        graph = ir.Graph(
            [*inputs, logits_from],
            [logits, *presents],
            nodes=self.nodes,
            initializers=self.store.initializers,
            opset_imports=_OPSETS,
            name=family.name,
        )
        return ir.Model(graph, ir_version=10, producer_name="edgeprune")

    # Parts, in the order of the graph.

    def _lengths(self, mask: ir.Value) -> list[ir.Value]:
        """Attention's `seqlens_k` (batch,), valid keys less one, and `total_sequence_length` (1,), both int32."""
        one = self.store.add("one", np.array([1], np.int64))
        count = self._node("ReduceSum", [mask, one], {"keepdims": 0}, name="/lengths/count")
        last = self._node("Sub", [count, one], name="/lengths/last")
        total = self._node("Shape", [mask], {"start": 1, "end": 2}, name="/lengths/total")
        return [
            self._node("Cast", [value], {"to": ir.DataType.INT32}, name=f"/lengths/{name}_int32")
            for name, value in (("last", last), ("total", total))
        ]

    def _rotary(self, context: int) -> list[ir.Value]:
        """Cosines and sines of all positions, (context, head_dim / 2) each, rounded once from float64."""
        angles = np.arange(context, dtype=np.float64)[:, None] * rotary_frequencies(self.shape)
        return [
            self.store.add(name, function(angles).astype(np.float32))
            for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin))
        ]

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Any]:
        """Embedded tokens, and the function that makes logits; tied, both use the same bytes of the file."""
        family, precision = self.shape.family, self.precision
        name = f"{family.embedding}.weight"
        table = self.checkpoint.tensor(name)
        if table.ndim != 2 or table.shape[1] != self.shape.hidden:
            raise BadInput(
                f"{name} is {table.shape}, expected (rows, {self.shape.hidden})", where=self.checkpoint.folder
            )
        self.vocab, hidden = table.shape
        path = f"/{family.embedding}"
        if precision.table_bits:
            weight = self._quantised(name, table, precision.table_bits)
            embedded = self._gather_quantised(ids, weight, precision.table_bits, path)
        else:
            stored = self.store.add(name, table.astype(precision.dtype, copy=False))
            embedded = self._widened(self._node("Gather", [stored, ids], name=f"{path}/Gather"), f"{path}/Cast")

        def head(x: ir.Value) -> ir.Value:
            path = f"/{family.head}"
            if not self.shape.tied:
                return self._linear(x, path, [family.head], precision.table_bits)
            if precision.table_bits:
                return self._matmul_nbits(x, path, weight, precision.table_bits, (self.vocab, hidden))
            wide = self._widened(stored, f"{path}/Cast")
            return self._node("FusedMatMul", [x, wide], {"transB": 1}, _MICROSOFT, name=f"{path}/MatMul")

        return embedded, head

    def _gather_quantised(self, ids: ir.Value, weight: Quantised, bits: int, path: str) -> ir.Value:
        """Rows of a quantised table, which must have two dimensions here and has three in a matrix product."""
        codes, scales, zeros = weight
        rows, blocks, width = codes.const_value.shape.numpy()
        flat = self.store.alias(f"{codes.name}.rows", codes, (rows, blocks * width))
        if not self.shape.tied:
            self.store.initializers.remove(codes)
        embedded = self._node(
            "GatherBlockQuantized",
            [flat, ids, scales, *([zeros] if zeros else [])],
            {"bits": bits, "block_size": self.precision.block, "gather_axis": 0, "quantize_axis": 1},
            _MICROSOFT,
            name=f"{path}/Gather",
        )
        if blocks * self.precision.block == self.shape.hidden:
            return embedded
        # The last block of a row is padded
        limits = (("start", 0), ("end", self.shape.hidden), ("axis", 2))
        bounds = [self.store.add(f"{path[1:]}/{key}", np.array([value], np.int64)) for key, value in limits]
        return self._node("Slice", [embedded, *bounds], name=f"{path}/Slice")

    def _norm(
        self, residual: ir.Value, branch: ir.Value | None, path: str, module: str, *, keep_sum: bool = True
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of residual + branch; and that sum, the new residual."""
        scale = self.store.add(f"{module}.weight", self.checkpoint.tensor(f"{module}.weight"))
        epsilon = {"epsilon": self.shape.norm_eps}
        if branch is None:
            attributes = {**epsilon, "axis": -1, "stash_type": 1}
            return self._node("SimplifiedLayerNormalization", [residual, scale], attributes, name=path), residual
        normed, total = ir.Value(name=f"{path}.out"), ir.Value(name=f"{path}.sum")
        # Outputs without a name (mean and deviation) are not computed
        outputs = [normed, ir.Value(name=""), ir.Value(name=""), total] if keep_sum else [normed]
        node = ir.node(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, scale],
            epsilon,
            domain=_MICROSOFT,
            outputs=outputs,
            name=path,
        )
        self.nodes.append(node)
        return normed, total

    def _attention(
        self, x: ir.Value, index: int, layer: LayerShape, state: Sequence[ir.Value], present: Sequence[ir.Value]
    ) -> ir.Value:
        family = self.shape.family
        path = f"/{family.layers}.{index}/attention"
        modules = [family.in_layer(index, role) for role in ("query", "key", "value")]
        packed = self._linear(x, f"{path}/qkv", modules, self.precision.bits)
        attended = ir.Value(name=f"{path}/GroupQueryAttention.out")
        node = ir.node(
            "GroupQueryAttention",
            [packed, None, None, *state],
            {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "do_rotary": 1},
            domain=_MICROSOFT,
            outputs=[attended, *present],
            name=f"{path}/GroupQueryAttention",
        )
        self.nodes.append(node)
        return self._linear(attended, f"{path}/output", [family.in_layer(index, "output")], self.precision.bits)

    def _mlp(self, x: ir.Value, index: int) -> ir.Value:
        family = self.shape.family
        path = f"/{family.layers}.{index}/mlp"
        gate_up = [family.in_layer(index, role) for role in ("gate", "up")]
        packed = self._linear(x, f"{path}/gate_up", gate_up, self.precision.bits)
        gate, up = self._node_of("Split", [packed], {"axis": -1, "num_outputs": 2}, name=f"{path}/Split", outputs=2)
        # x * sigmoid(1.0 * x): SiLU, in one kernel
        active = self._node("QuickGelu", [gate], {"alpha": 1.0}, _MICROSOFT, name=f"{path}/SiLU")
        gated = self._node("Mul", [active, up], name=f"{path}/Mul")
        return self._linear(gated, f"{path}/down", [family.in_layer(index, "down")], self.precision.bits)

    # Weights.

    def _linear(self, x: ir.Value, path: str, modules: Sequence[str], bits: int | None) -> ir.Value:
        """x times the stacked weights of `modules`, plus their biases where the checkpoint has any."""
        weight = np.concatenate([self.checkpoint.tensor(f"{module}.weight") for module in modules])
        rows, columns = weight.shape
        bias = self._bias(path, modules)
        name = f"{path[1:]}.weight"
        if bits:
            return self._matmul_nbits(x, path, self._quantised(name, weight, bits), bits, (rows, columns), bias)
        stored = self.store.add(name, weight.T.astype(self.precision.dtype, copy=False))
        product = self._node("MatMul", [x, self._widened(stored, f"{path}/Cast")], name=f"{path}/MatMul")
        return product if bias is None else self._node("Add", [product, bias], name=f"{path}/Add")

    def _bias(self, path: str, modules: Sequence[str]) -> ir.Value | None:
        names = [f"{module}.bias" for module in modules]
        if not any(name in self.checkpoint for name in names):
            return None
        parts = [
            self.checkpoint.tensor(name)
            if name in self.checkpoint
            else np.zeros(self.checkpoint.dimensions(f"{module}.weight")[0], np.float32)
            for name, module in zip(names, modules, strict=True)
        ]
        return self.store.add(f"{path[1:]}.bias", np.concatenate(parts))

    def _quantised(self, name: str, weight: NDArray[np.float32], bits: int) -> Quantised:
        precision = self.precision
        blocks = quantise(weight, bits=bits, block=precision.block, symmetric=precision.symmetric)
        zeros = blocks.zero_points
        return (
            self.store.add(f"{name}.codes", blocks.codes),
            self.store.add(f"{name}.scales", blocks.scales),
            None if zeros is None else self.store.add(f"{name}.zero_points", zeros),
        )

    def _matmul_nbits(
        self,
        x: ir.Value,
        path: str,
        weight: Quantised,
        bits: int,
        size: tuple[int, int],
        bias: ir.Value | None = None,
    ) -> ir.Value:
        attributes = {
            "N": size[0],
            "K": size[1],
            "bits": bits,
            "block_size": self.precision.block,
            "accuracy_level": 4,  # activations rounded to int8 by blocks: the dot-product instructions of every CPU
        }
        inputs = [x, *weight, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self._node("MatMulNBits", inputs, attributes, _MICROSOFT, name=f"{path}/MatMul")

    def _widened(self, value: ir.Value, path: str) -> ir.Value:
        """`value` in float32: ONNX Runtime's CPU has no float16 MatMul. A weight's Cast is folded when it is loaded."""
        if self.precision.dtype is np.float32:
            return value
        return self._node("Cast", [value], {"to": ir.DataType.FLOAT}, name=path)

    # Nodes.

    def _cache(self, prefix: str, index: int, kind: str, layer: LayerShape) -> ir.Value:
        length = "past_sequence_length" if prefix.startswith("past") else "total_sequence_length"
        dimensions: list[int | str] = ["batch_size", layer.kv_heads, length, self.shape.head_dim]
        return _value(f"{prefix}.{index}.{kind}", ir.DataType.FLOAT, dimensions)

    def _node(self, operator: str, inputs: Sequence[ir.Value | None], *args: Any, name: str, **kw: Any) -> ir.Value:
        return self._node_of(operator, inputs, *args, name=name, outputs=1, **kw)[0]

    def _node_of(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        *,
        name: str,
        outputs: int,
    ) -> list[ir.Value]:
        results = [ir.Value(name=f"{name}.out{i or ''}") for i in range(outputs)]
        self.nodes.append(ir.node(operator, inputs, attributes, domain=domain, outputs=results, name=name))
        return results


def _value(name: str, dtype: ir.DataType, dimensions: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dimensions))
