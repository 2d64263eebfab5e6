"""Activation energy: what a head or a neuron adds to the residual stream, squared, tokens weighed by 1 / RMS².

AMP (`importance`) sums |a|, so a neuron whose output weights are small counts as much as one whose are large, and the
few tokens of massive activations rule the sum. Here the output weights count, and each token counts by its size
relative to the residual stream that it is added to (`compensation.token_weights`). No head or neuron is asked whether
another could make up for it: that is `elimination`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.blocks import HALVES, LayeredModel
from edgeprune.compensation import Moments
from edgeprune.importance import Scores, text_hash
from edgeprune.layerwise import Compensation, Streams, run_half

Progress = Callable[[int, int], None]


def activation_energy(moments: Moments, size: int) -> torch.Tensor:
    """Σ over tokens of s ‖W_gᵀ x_g‖² = tr(W_gᵀ G_gg W_g) for each group g of inputs of a projection.

    Args:
        moments: of the projection.
        size: inputs of a group: the head's dimension, or 1 for neurons.

    Returns:
        (inputs / size,), float64, in units of `Moments.scale`.
    """
    blocks = [moments.gram[start : start + size, start : start + size] for start in range(0, moments.inputs, size)]
    gram = torch.stack(blocks).double()  # (groups, size, size)
    weight = (
        moments.weight[: moments.inputs].double().reshape(-1, size, moments.weight.shape[1])
    )  # (groups, size, outputs)
    energies: torch.Tensor = ((gram @ weight) * weight).sum((1, 2)) / moments.scale
    return energies


@torch.inference_mode()
def energy_scores(
    model: LayeredModel, ids: torch.Tensor, *, model_hash: str = "", progress: Progress | None = None
) -> Scores:
    """Activation energies of every head and neuron of a dense model, one layer in memory at a time.

    Args:
        ids: calibration text, (windows, length).
    """
    residual = model.embed(ids)
    how = Compensation(stream=0.0)
    found: dict[str, list[torch.Tensor]] = {half: [] for half in HALVES}
    for index in range(len(model.shape.layers)):
        block = model.block(index)
        streams = Streams(residual, residual)
        began = Streams(residual.clone(), residual.clone()) if block.family.parallel else streams
        for half in HALVES:
            moments = run_half(block, half, streams, began, None, how)
            assert moments is not None
            found[half].append(activation_energy(moments, model.shape.head_dim if half == "attention" else 1))
        if progress:
            progress(index + 1, len(model.shape.layers))
    heads, neurons = (tuple(found[half]) for half in HALVES)
    return Scores(heads, neurons, "energy", model_hash, text_hash(list(ids)), ids.numel())
