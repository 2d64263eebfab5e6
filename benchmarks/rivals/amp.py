"""AMP as published, without its training, its two controls, and AMP of neurons alone.

As published, heads and neurons leave in equal shares of every layer. Under grouped-query attention heads leave in
coarse steps, and neurons alone may be the better choice.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.calibration import TextSet
from edgeprune.importance import Scores, random_scores, reversed_scores
from edgeprune.models import Model, load
from edgeprune.plan import LayerPlan, PrunePlan, Scope, keep_heads, top
from edgeprune.pruning import cached_scores, plan_for
from edgeprune.shape import LayerShape
from edgeprune.surgery import prune_checkpoint
from rivals import ALIGN

SEED = 0


def widths_of(model: Model, ratio: float, calibration: TextSet, scope: Scope = "both") -> LayerShape:
    """The widths that AMP leaves in every layer: those of all methods here that choose by scores."""
    return plan_for(model.shape, cached_scores(model, calibration), ratio, align=ALIGN, scope=scope).layers[0].widths


def apply(
    model: Model, scores: Scores, ratio: float, calibration: TextSet, out: Path, *, scope: Scope = "both"
) -> Path:
    """Write what `scores` keep at AMP's widths."""
    shape, left = model.shape, widths_of(model, ratio, calibration, scope)
    layers = tuple(
        LayerPlan(*keep_heads(heads.numpy(), dense, left), top(neurons.numpy(), left.neurons))
        for dense, heads, neurons in zip(shape.layers, scores.heads, scores.neurons, strict=True)
    )
    reached = 1 - shape.with_layers((left,) * len(layers)).parameters / shape.parameters
    plan = PrunePlan(layers, scores.method, ratio, reached, model.hash, calibration.hash)
    return prune_checkpoint(model.folder, plan, out)


def scores_of(
    model: Model, heads: list[torch.Tensor], neurons: list[torch.Tensor], method: str, calibration: TextSet
) -> Scores:
    """Scores of each layer, (heads,) and (neurons,), as edgeprune plans with them."""
    doubles = (tuple(t.double() for t in heads), tuple(t.double() for t in neurons))
    return Scores(*doubles, method, model.hash, calibration.hash, calibration.tokens)


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """Heads by the mean of ‖h W‖₁, neurons by the mean of |a| (equations 8 and 9)."""
    model = load(folder)
    return apply(model, cached_scores(model, calibration), ratio, calibration, out)


def neurons(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """Neurons alone, by the same scores."""
    model = load(folder)
    return apply(model, cached_scores(model, calibration), ratio, calibration, out, scope="mlp")


def reverse(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """What AMP finds most important goes first."""
    model = load(folder)
    return apply(model, reversed_scores(cached_scores(model, calibration)), ratio, calibration, out)


def random(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """By chance, the same at every call."""
    model = load(folder)
    layers = model.shape.layers
    zeros = ([torch.zeros(w.heads) for w in layers], [torch.zeros(w.neurons) for w in layers])
    return apply(model, random_scores(scores_of(model, *zeros, "random", calibration), SEED), ratio, calibration, out)
