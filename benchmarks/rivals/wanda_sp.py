"""Wanda-sp: Wanda's |weight| · ‖activation‖₂ (arXiv 2306.11695, eq. 1), summed over what leaves together.

The structured form is that of FLAP's authors (arXiv 2312.11983): scores of the attention output's and the down
projection's weights, summed over each input channel, and for a head over its channels; every layer loses as much.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.calibration import TextSet
from edgeprune.models import load
from rivals.amp import apply, scores_of
from rivals.inputs import inputs_of, projections, weight_of


def channel_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ over outputs i of |W_ij| · ‖X_j‖₂ of each input channel j: (in,), float64.

    Args:
        weight: (out, in).
        squares: Σ over tokens of X_j², (in,).
    """
    return weight.double().abs().sum(dim=0) * squares.double().sqrt()


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """The uniform plan of the scores."""
    model = load(folder)
    names = projections(model)
    inputs = inputs_of(model, calibration.begun, [name for pair in names for name in pair])
    heads, neurons = [], []
    for layer, (output, down) in zip(model.shape.layers, names, strict=True):
        by_channel = channel_scores(weight_of(model, output), inputs[output].squares)
        heads.append(by_channel.reshape(layer.heads, -1).sum(dim=1))
        neurons.append(channel_scores(weight_of(model, down), inputs[down].squares))
    return apply(model, scores_of(model, heads, neurons, "wanda-sp", calibration), ratio, out)
