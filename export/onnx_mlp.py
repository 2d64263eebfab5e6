"""The MLP of a layer in an ONNX graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from edgeprune.export.onnx_nodes import MICROSOFT, Nodes
from edgeprune.shape import ModelShape

# Activation -> operator, its attributes, and the node's name. All are one kernel each.
_TANH_GELU: tuple[str, dict[str, Any], str] = ("FastGelu", {}, "Gelu")
ACTIVATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}, "SiLU"),  # x * sigmoid(1.0 * x)
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
}


def mlp(nodes: Nodes, shape: ModelShape, x: ir.Value, index: int) -> ir.Value:
    """The MLP of layer `index`, (batch, sequence, hidden) to the same: with a gate five nodes, without three."""
    family, bits = shape.family, nodes.precision.bits
    path = f"/{family.layers}.{index}/mlp"
    operator, attributes, name = ACTIVATIONS[family.activation]
    modules = [family.in_layer(index, role) for role in family.mlp_inputs]
    if family.gated:
        packed = nodes.linear(x, f"{path}/gate_up", modules, bits)
        gate, up = nodes.node_of("Split", [packed], {"axis": -1, "num_outputs": 2}, name=f"{path}/Split", outputs=2)
        active = nodes.node(operator, [gate], attributes, MICROSOFT, name=f"{path}/{name}")
        inner = nodes.node("Mul", [active, up], name=f"{path}/Mul")
    else:
        raised = nodes.linear(x, f"{path}/up", modules, bits)
        inner = nodes.node(operator, [raised], attributes, MICROSOFT, name=f"{path}/{name}")
    return nodes.linear(inner, f"{path}/down", [family.in_layer(index, "down")], bits)
