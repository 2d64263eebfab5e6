"""AMP as published, without its training, and its two controls: heads and neurons in equal shares of every layer."""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.calibration import TextSet
from edgeprune.importance import Scores, random_scores, reversed_scores
from edgeprune.models import Model, load
from edgeprune.pruning import cached_scores, plan_for
from edgeprune.surgery import prune_checkpoint
from rivals import ALIGN

SEED = 0


def apply(model: Model, scores: Scores, ratio: float, out: Path) -> Path:
    """Write the uniform plan of `scores` at `ratio`."""
    return prune_checkpoint(model.folder, plan_for(model.shape, scores, ratio, align=ALIGN), out)


def scores_of(
    model: Model, heads: list[torch.Tensor], neurons: list[torch.Tensor], method: str, calibration: TextSet
) -> Scores:
    """Scores of each layer, (heads,) and (neurons,), as edgeprune plans with them."""
    doubles = (tuple(t.double() for t in heads), tuple(t.double() for t in neurons))
    return Scores(*doubles, method, model.hash, calibration.hash, calibration.tokens)


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """Heads by the mean of ‖h W‖₁, neurons by the mean of |a| (equations 8 and 9)."""
    model = load(folder)
    return apply(model, cached_scores(model, calibration), ratio, out)


def reverse(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """What AMP finds most important goes first."""
    model = load(folder)
    return apply(model, reversed_scores(cached_scores(model, calibration)), ratio, out)


def random(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """By chance, the same at every call."""
    model = load(folder)
    layers = model.shape.layers
    zeros = ([torch.zeros(w.heads) for w in layers], [torch.zeros(w.neurons) for w in layers])
    return apply(model, random_scores(scores_of(model, *zeros, "random", calibration), SEED), ratio, out)
