"""FLAP (arXiv 2312.11983): what fluctuates least leaves, anywhere in the model, and a bias takes over its mean.

- metric (eq. 5): the variance over tokens of an input channel of the attention output or down projection, times the
  squared norm of the weights that read it; of the attention output, the square of that, which the paper does not print
  but its code takes (CASIA-IVA-Lab/FLAP, lib/prune.py);
- adaptive structure (eq. 6): metrics are standardised within each layer's projection, then all compete in one list, so
  that layers end with widths of their own. A unit counts with its parameters;
- bias compensation (eq. 4): the mean of what left, times the weights that read it, becomes the projection's bias.

Under grouped-query attention the unit is a key/value head with all its query heads, so every layer's groups stay equal.
Each layer keeps at least one such group and `ALIGN` neurons: stock runtimes take no less.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgeprune.calibration import TextSet
from edgeprune.checkpoint import Checkpoint
from edgeprune.models import Model, load
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.shape import LayerShape, ModelShape, shape_from_config
from edgeprune.surgery import prune_checkpoint, rows_of_heads
from rivals import ALIGN
from rivals.folders import save_folder, tensors_of
from rivals.inputs import Inputs, inputs_of, projections, weight_of


def fluctuation(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Var(X_j) · ‖W_:j‖₂² of each input channel j: (in,), float64; `weight` is (out, in), `variance` (in,)."""
    return variance.double() * weight.double().square().sum(dim=0)


def standardised(metric: torch.Tensor) -> torch.Tensor:
    """(metric − mean) / standard deviation, over the channels of one projection: (channels,)."""
    return (metric - metric.mean()) / metric.std()


def _left(scores: torch.Tensor, threshold: float, step: int) -> int:
    """How many of one layer's units stay: those above the threshold, rounded to the step, at least one step."""
    above = int((scores > threshold).sum())
    return min(len(scores), max(step, round(above / step) * step))


def choose_widths(
    shape: ModelShape, groups: Sequence[torch.Tensor], neurons: Sequence[torch.Tensor], ratio: float, align: int
) -> tuple[LayerShape, ...]:
    """The widths of each layer under the one threshold that comes nearest to `ratio` of all parameters.

    Args:
        shape: the dense model.
        groups: a layer: standardised scores of its key/value groups, (kv_heads,).
        neurons: a layer: standardised scores of its neurons, (neurons,).
        ratio: share of all parameters to remove.
        align: the number of neurons kept is a multiple of this.
    """

    def widths(threshold: float) -> tuple[LayerShape, ...]:
        layers = []
        for dense, of_groups, of_neurons in zip(shape.layers, groups, neurons, strict=True):
            kv_heads = _left(of_groups, threshold, 1)
            per_group = dense.heads // dense.kv_heads
            layers.append(LayerShape(kv_heads * per_group, kv_heads, _left(of_neurons, threshold, align)))
        return tuple(layers)

    def missed(threshold: float) -> float:
        return shape.with_layers(widths(threshold)).parameters - (1 - ratio) * shape.parameters

    # Parameters fall as the threshold rises, so the nearest lie on either side of where the sign changes.
    every = torch.cat([*groups, *neurons]).unique().tolist()
    every.insert(0, every[0] - 1.0)
    low, high = 0, len(every) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missed(every[middle]) > 0 else (low, middle)
    return widths(min((every[low], every[high]), key=lambda threshold: abs(missed(threshold))))


def _best(scores: torch.Tensor, keep: int) -> tuple[int, ...]:
    return tuple(sorted(torch.argsort(-scores, stable=True)[:keep].tolist()))


def lost_bias(weight: torch.Tensor, mean: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """W_removed · mean(X_removed), (out,), float32; `weight` is the dense (out, in), `mean` (in,)."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[list(kept)] = False
    return (weight.double()[:, gone] @ mean.double()[gone]).float()


def plan_of(model: Model, inputs: dict[str, Inputs], ratio: float, text_hash: str) -> PrunePlan:
    """FLAP's plan: widths of each layer's own, and who stays."""
    shape = model.shape
    groups, neurons = [], []
    for layer, (output, down) in zip(shape.layers, projections(model), strict=True):
        channels = standardised(fluctuation(weight_of(model, output), inputs[output].variance).square())
        groups.append(channels.reshape(layer.kv_heads, -1).mean(dim=1))
        neurons.append(standardised(fluctuation(weight_of(model, down), inputs[down].variance)))
    plans = []
    widths = choose_widths(shape, groups, neurons, ratio, ALIGN)
    for dense, left, of_groups, of_neurons in zip(shape.layers, widths, groups, neurons, strict=True):
        per_group = dense.heads // dense.kv_heads
        kept = _best(of_groups, left.kv_heads)
        heads = tuple(kv * per_group + head for kv in kept for head in range(per_group))
        plans.append(LayerPlan(kept, heads, _best(of_neurons, left.neurons)))
    reached = 1 - shape.with_layers(widths).parameters / shape.parameters
    return PrunePlan(tuple(plans), "flap", ratio, reached, model.hash, text_hash)


def _bias_keys(config: dict[str, Any]) -> dict[str, bool]:
    """The switches of config.json that give the two projections biases, where the family has such."""
    switches = {"attention_bias": True, "mlp_bias": True}
    shape = shape_from_config({**config, **switches})
    return {key: True for key, works in zip(switches, (shape.output_bias, shape.mlp_bias), strict=True) if works}


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """FLAP's plan with its biases. A projection that cannot have a bias in the family stays without compensation."""
    model = load(folder)
    family = model.shape.family
    inputs = inputs_of(model, calibration.begun, [name for pair in projections(model) for name in pair])
    plan = plan_of(model, inputs, ratio, calibration.hash)
    with tempfile.TemporaryDirectory() as scratch:
        pruned = prune_checkpoint(folder, plan, Path(scratch) / "pruned")
        tensors, config = tensors_of(pruned), Checkpoint(pruned).config
    config |= (switches := _bias_keys(config))
    inner = {"attention_bias": ("output", ("query", "key", "value")), "mlp_bias": ("down", ("gate", "up"))}
    for index, layer in enumerate(plan.layers):
        kept = {"output": rows_of_heads(layer.heads, model.shape.head_dim).tolist(), "down": list(layer.neurons)}
        for key in switches:
            role, others = inner[key]
            name = family.in_layer(index, role)
            bias = lost_bias(weight_of(model, name), inputs[name].mean, kept[role])
            tensors[f"{name}.bias"] = tensors.get(f"{name}.bias", torch.zeros_like(bias)) + bias
            for other in others:  # the switch gives these a bias too: nothing
                if getattr(family, other) is not None:
                    path = family.in_layer(index, other)
                    rows = tensors[f"{path}.weight"].shape[0]
                    tensors.setdefault(f"{path}.bias", torch.zeros(rows))
    return save_folder(folder, tensors, config, out)
