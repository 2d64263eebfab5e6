"""Norms in an ONNX graph, each fused with the addition before it where there is one."""

from __future__ import annotations

import onnx_ir as ir

from edgeprune.export.onnx_nodes import MICROSOFT, Nodes
from edgeprune.shape import ModelShape


def norm(nodes: Nodes, shape: ModelShape, x: ir.Value, path: str, module: str) -> ir.Value:
    """The norm `module` over the last axis of x."""
    operator = "SimplifiedLayerNormalization" if shape.family.norm == "rms" else "LayerNormalization"
    attributes = {"epsilon": shape.norm_eps, "axis": -1, "stash_type": 1}
    return nodes.node(operator, [x, *_parameters(nodes, shape, module)], attributes, name=path)


def add_and_norm(
    nodes: Nodes,
    shape: ModelShape,
    residual: ir.Value,
    branch: ir.Value | None,
    path: str,
    module: str,
    *,
    keep_sum: bool = True,
) -> tuple[ir.Value, ir.Value]:
    """The norm `module` of residual + branch; and that sum, the new residual, unless nothing reads it."""
    if branch is None:
        return norm(nodes, shape, residual, path, module), residual
    operator = "SkipSimplifiedLayerNormalization" if shape.family.norm == "rms" else "SkipLayerNormalization"
    normed, total = ir.Value(name=f"{path}.out"), ir.Value(name=f"{path}.sum")
    # Outputs without a name (mean and deviation) are not computed
    outputs = [normed, ir.Value(name=""), ir.Value(name=""), total] if keep_sum else [normed]
    inputs = [residual, branch, *_parameters(nodes, shape, module)]
    nodes.node_of(operator, inputs, {"epsilon": shape.norm_eps}, MICROSOFT, name=path, outputs=outputs)
    return normed, total


def _parameters(nodes: Nodes, shape: ModelShape, module: str) -> list[ir.Value]:
    """What a norm multiplies by and, a LayerNorm, what it adds."""
    scale = nodes.checkpoint.tensor(f"{module}.weight")
    if shape.family.norm_offset:
        scale = scale + scale.dtype.type(shape.family.norm_offset)
    parameters = [nodes.store.add(f"{module}.weight", scale)]
    if shape.family.norm == "layer":
        parameters.append(nodes.store.add(f"{module}.bias", nodes.checkpoint.tensor(f"{module}.bias")))
    return parameters
