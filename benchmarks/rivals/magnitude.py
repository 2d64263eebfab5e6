"""The L2 norm of all weights that leave with a head or a neuron: its rows where it reads, its columns where it writes.

No text is read. Keys and values are shared by the heads of a group and leave with the last of them: no head is scored
by them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.calibration import TextSet
from edgeprune.models import Model, load
from rivals.amp import apply, scores_of
from rivals.inputs import weight_of


def head_norms(query: torch.Tensor, output: torch.Tensor, heads: int) -> torch.Tensor:
    """L2 norms of the heads, (heads,).

    Args:
        query: (heads · head_dim, hidden).
        output: (hidden, heads · head_dim).
        heads: number of query heads.
    """
    squares = query.double().square().sum(dim=1) + output.double().square().sum(dim=0)
    return squares.reshape(heads, -1).sum(dim=1).sqrt()


def neuron_norms(inputs: list[torch.Tensor], down: torch.Tensor) -> torch.Tensor:
    """L2 norms of the neurons, (neurons,).

    Args:
        inputs: gate, where there is one, and up: (neurons, hidden) each.
        down: (hidden, neurons).
    """
    rows = sum((w.double().square().sum(dim=1) for w in inputs), down.double().square().sum(dim=0))
    return rows.sqrt()


def _inputs(model: Model, index: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The rows of the queries, and those of gate and up, of a layer, whether the family fuses them or not."""
    family, layer = model.shape.family, model.shape.layers[index]
    if getattr(family, "qkv", None):
        query = weight_of(model, family.in_layer(index, "qkv"))[: layer.heads * model.shape.head_dim]
    else:
        query = weight_of(model, family.in_layer(index, "query"))
    if getattr(family, "gate_up", None):
        return query, list(weight_of(model, family.in_layer(index, "gate_up")).chunk(2))
    roles = ("gate", "up") if family.gate else ("up",)
    return query, [weight_of(model, family.in_layer(index, role)) for role in roles]


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """The uniform plan of the norms."""
    model = load(folder)
    heads, neurons = [], []
    for index, layer in enumerate(model.shape.layers):
        query, inputs = _inputs(model, index)
        output, down = (weight_of(model, model.shape.family.in_layer(index, role)) for role in ("output", "down"))
        heads.append(head_norms(query, output, layer.heads))
        neurons.append(neuron_norms(inputs, down))
    return apply(model, scores_of(model, heads, neurons, "magnitude", calibration), ratio, calibration, out)
