"""Nodes of a graph under construction, and the weights they need, taken from a checkpoint and stored in a precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.onnx_quant import quantise
from edgeprune.export.onnx_store import Store
from edgeprune.export.onnx_types import Precision

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
Quantised = tuple[ir.Value, ir.Value, ir.Value | None]  # codes, scales, zero points


class Nodes:
    """Appends nodes to a graph in the order of computation, writing each weight to the store as it is met.

    A node's name is a path, "/model.layers.0/mlp/SiLU"; its outputs are named after it.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision, store: Store) -> None:
        self.checkpoint, self.precision, self.store = checkpoint, precision, store
        self.nodes: list[ir.Node] = []

    def node(self, operator: str, inputs: Sequence[ir.Value | None], *args: Any, name: str, **kw: Any) -> ir.Value:
        """Append a node with one output, and return that; arguments as of `node_of`."""
        return self.node_of(operator, inputs, *args, name=name, outputs=1, **kw)[0]

    def node_of(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        *,
        name: str,
        outputs: int | Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Append a node with `outputs`, given or as many new ones. None among the inputs is an input left out."""
        if isinstance(outputs, int):
            outputs = [ir.Value(name=f"{name}.out{i or ''}") for i in range(outputs)]
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        self.nodes.append(ir.node(operator, given, attributes, domain=domain, outputs=outputs, name=name))
        return list(outputs)

    def integers(self, name: str, *values: int) -> ir.Value:
        """A constant (len(values),) of int64."""
        return self.store.add(name, np.array(values, np.int64))

    def floats(self, name: str, *values: float) -> ir.Value:
        """A constant (len(values),) of float32."""
        return self.store.add(name, np.array(values, np.float32))

    def linear(self, x: ir.Value, path: str, modules: Sequence[str], bits: int | None) -> ir.Value:
        """x times the stacked weights of `modules`, plus their biases where the checkpoint has any."""
        weight = np.concatenate([self.checkpoint.tensor(f"{module}.weight") for module in modules])
        rows, columns = weight.shape
        bias = self.bias(path, modules, rows)
        name = f"{path[1:]}.weight"
        if bits:
            return self.matmul_nbits(x, path, self.quantised(name, weight, bits), bits, (rows, columns), bias)
        stored = self.rounded(name, weight.T)
        product = self.node("MatMul", [x, self.widened(stored, f"{path}/Cast")], name=f"{path}/MatMul")
        return product if bias is None else self.node("Add", [product, bias], name=f"{path}/Add")

    def bias(self, path: str, modules: Sequence[str], rows: int) -> ir.Value | None:
        """The stacked biases of `modules`, (rows,); None where the checkpoint has none of them.

        Not the config but the checkpoint decides: compensation of what was pruned adds biases that no config knows.

        Raises:
            BadInput: a bias of another length than its weight's rows.
        """
        names = [f"{module}.bias" for module in modules]
        if not any(name in self.checkpoint for name in names):
            return None
        parts = [
            self.checkpoint.tensor(name)
            if name in self.checkpoint
            else np.zeros(self.checkpoint.dimensions(f"{module}.weight")[0], np.float32)
            for name, module in zip(names, modules, strict=True)
        ]
        stacked = np.concatenate([part.reshape(-1) for part in parts])
        if len(stacked) != rows:
            raise BadInput(
                f"{' and '.join(names)}: {len(stacked)} values for {rows} rows", where=self.checkpoint.folder
            )
        return self.store.add(f"{path[1:]}.bias", stacked)

    def quantised(self, name: str, weight: NDArray[np.float32], bits: int) -> Quantised:
        """Quantise and store a weight, (rows, columns)."""
        precision = self.precision
        blocks = quantise(weight, bits=bits, block=precision.block, symmetric=precision.symmetric)
        zeros = blocks.zero_points
        return (
            self.store.add(f"{name}.codes", blocks.codes),
            self.store.add(f"{name}.scales", blocks.scales),
            None if zeros is None else self.store.add(f"{name}.zero_points", zeros),
        )

    def rounded(self, name: str, weight: NDArray[np.float32]) -> ir.Value:
        """Store a weight in the precision's number format.

        Raises:
            BadInput: values that the format cannot hold.
        """
        with np.errstate(over="ignore"):  # looked for just below
            stored: NDArray[Any] = weight.astype(self.precision.dtype, copy=False)
        if stored is not weight and np.isinf(stored).any():
            raise BadInput(
                f"{name} has values that {stored.dtype} cannot hold",
                where=self.checkpoint.folder,
                remedy="export it as fp32 or int8",
            )
        return self.store.add(name, stored)

    def matmul_nbits(
        self,
        x: ir.Value,
        path: str,
        weight: Quantised,
        bits: int,
        size: tuple[int, int],
        bias: ir.Value | None = None,
    ) -> ir.Value:
        """x times the transpose of a quantised weight of `size` (rows, columns), plus `bias`."""
        attributes = {
            "N": size[0],
            "K": size[1],
            "bits": bits,
            "block_size": self.precision.block,
            "accuracy_level": 4,  # activations rounded to int8 by blocks: the dot-product instructions of every CPU
        }
        return self.node("MatMulNBits", [x, *weight, None, bias], attributes, MICROSOFT, name=f"{path}/MatMul")

    def widened(self, value: ir.Value, path: str) -> ir.Value:
        """`value` in float32: ONNX Runtime's CPU has no float16 MatMul. A weight's Cast is folded when it is loaded."""
        if self.precision.dtype is np.float32:
            return value
        return self.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=path)


def tensor_value(name: str, dtype: ir.DataType, dimensions: Sequence[int | str]) -> ir.Value:
    """A typed input or output of the graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dimensions))
