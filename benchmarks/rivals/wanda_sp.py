"""Wanda-sp: Wanda's |weight| · ‖activation‖₂ (arXiv 2306.11695, eq. 1), summed over what leaves together.

The structured form is that of FLAP's authors (arXiv 2312.11983): scores of the attention output's and the down
projection's weights, summed over each input channel, and for a head over its channels; every layer loses as much. As in
their code, a layer is scored on what the pruned layers before it say.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.blocks import HALVES, Half, LayeredModel
from edgeprune.calibration import TextSet
from edgeprune.checkpoint import Checkpoint
from edgeprune.elimination import rows_of
from edgeprune.importance import Scores
from edgeprune.layerwise import after_half, chunks
from edgeprune.models import Model, load
from edgeprune.plan import Scope, keep_heads, top
from edgeprune.pruning import windows_of
from edgeprune.shape import LayerShape
from rivals.amp import apply, scores_of, widths_of


def channel_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ over outputs i of |W_ij| · ‖X_j‖₂ of each input channel j: (in,), float64.

    Args:
        weight: (out, in).
        squares: Σ over tokens of X_j², (in,).
    """
    return weight.double().abs().sum(dim=0) * squares.double().sqrt()


@torch.inference_mode()
def scores_on_the_way(model: Model, left: LayerShape, calibration: TextSet) -> Scores:
    """Scores of each layer on what the layers before it say once they are pruned to `left`."""
    layered = LayeredModel(Checkpoint(model.folder))
    stream = layered.embed(windows_of(calibration))
    parts = list(chunks(*stream.shape[:2]))
    found: dict[Half, list[torch.Tensor]] = {"attention": [], "mlp": []}
    for index, dense in enumerate(model.shape.layers):
        block = layered.block(index)
        sums: dict[Half, torch.Tensor] = {}
        for part in parts:
            inner = block.inner("attention", stream[part])
            _add(sums, "attention", inner)
            after = after_half(block, "attention", stream[part], inner)
            _add(sums, "mlp", block.inner("mlp", stream[part] if block.family.parallel else after))
        by_channel = {half: channel_scores(block.projection(half).weight, sums[half]) for half in sums}
        heads, neurons = by_channel["attention"].reshape(dense.heads, -1).sum(dim=1), by_channel["mlp"]
        found["attention"].append(heads)
        found["mlp"].append(neurons)
        _, kept = keep_heads(heads.numpy(), dense, left)
        rows = {
            "attention": rows_of(kept, model.shape.head_dim),
            "mlp": torch.tensor(top(neurons.numpy(), left.neurons)),
        }
        for part in parts:
            began = residual = stream[part]
            for half in HALVES:
                inner = block.inner(half, began if block.family.parallel else residual)
                weight = block.projection(half).weight[:, rows[half]]
                bias = block.projection(half).bias
                weight = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
                residual = after_half(block, half, residual, inner, rows[half], weight)
            stream[part] = residual
    return scores_of(model, found["attention"], found["mlp"], "wanda-sp", calibration)


def _add(sums: dict[Half, torch.Tensor], half: Half, inner: torch.Tensor) -> None:
    squares = inner.flatten(0, 1).double().square().sum(dim=0)
    sums[half] = sums[half] + squares if half in sums else squares


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path, *, scope: Scope = "both") -> Path:
    """What the scores keep at AMP's widths."""
    model = load(folder)
    left = widths_of(model, ratio, calibration, scope)
    scores = scores_on_the_way(model, left, calibration)
    return apply(model, scores, ratio, calibration, out, scope=scope)


def neurons(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """Neurons alone, by the same scores."""
    return prune(folder, ratio, calibration, out, scope="mlp")
