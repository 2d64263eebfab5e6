"""Which widths each layer gets: the least damage that a budget allows, by mixed-integer programming.

One option of every group (a layer's heads, a layer's MLP) is taken: a multiple-choice knapsack. That damages of single
changes add up is an approximation; the best plans are measured afterwards. Sources of the idea: ZipLM (arXiv
2302.04089), NVIDIA's Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.damage import DamageTable
from edgeprune.knapsack import Array, Group, choose_options
from edgeprune.shape import LayerShape, ModelShape

if TYPE_CHECKING:
    from edgeprune.vocabulary_damage import VocabularyOption


@dataclass(frozen=True)
class Options:
    """What the widths of a layer may be."""

    align: int = 32  # neurons are a multiple of this
    heads: bool = True  # heads may leave
    absent: bool = True  # a layer may lose its whole attention or MLP


def layer_options(
    table: DamageTable, dense: Sequence[LayerShape], options: Options
) -> list[tuple[list[tuple[int, int]], Array, list[int], Array]]:
    """For each layer: (heads, kv_heads) options, their damages, widths, their damages."""
    found = []
    for index, layer in enumerate(dense):
        heads = [
            option
            for option in table.attention[index]
            if option.heads == layer.heads
            or (options.heads and (option.heads or (options.absent and index)))  # layer 0 holds the cache's length
        ]
        # Some layer must have an MLP; in the first it is the dearest to lose.
        least = 0 if options.absent and index else options.align
        widths = sorted({layer.neurons, *range(least, layer.neurons, options.align)})
        found.append(
            (
                [(option.heads, option.kv_heads) for option in heads],
                np.array([option.damage for option in heads]),
                widths,
                np.array([table.mlp_damage(index, width) for width in widths]),
            )
        )
    return found


# (heads, kv_heads), or neurons -> what that half of a layer costs, (costs,)
AttentionCost = Callable[[int, int], Sequence[float] | Array]
MlpCost = Callable[[int], Sequence[float] | Array]


def allocate(
    table: DamageTable,
    shape: ModelShape,
    attention_cost: AttentionCost,
    mlp_cost: MlpCost,
    limits: Sequence[float],
    options: Options | None = None,
    extra: Group | None = None,
) -> tuple[tuple[LayerShape, ...], int]:
    """The widths of every layer that do the least damage with costs within `limits`.

    Args:
        shape: the dense model.
        attention_cost, mlp_cost: what the halves of a layer cost, whatever the other half is.
        limits: the most that all costs may add up to, (costs,).
        options: what the widths may be.
        extra: something else to choose along, such as the size of the vocabulary.

    Returns:
        The widths, and the option taken of `extra` (0 without).

    Raises:
        NothingFits: no widths meet the limits.
    """
    groups, meaning = [], []
    for heads, head_damage, widths, width_damage in layer_options(table, shape.layers, options or Options()):
        groups.append(Group(head_damage, np.array([attention_cost(*pair) for pair in heads], dtype=np.float64)))
        groups.append(Group(width_damage, np.array([mlp_cost(n) for n in widths], dtype=np.float64)))
        meaning.append((heads, widths))
    if extra is not None:
        groups.append(extra)
    chosen = choose_options(groups, np.asarray(limits, dtype=np.float64))
    layers = tuple(
        LayerShape(*heads[chosen[2 * i]], widths[chosen[2 * i + 1]]) for i, (heads, widths) in enumerate(meaning)
    )
    return layers, chosen[-1] if extra is not None else 0


def allocate_parameters(
    table: DamageTable,
    shape: ModelShape,
    ratio: float,
    options: Options | None = None,
    vocabulary: Sequence[VocabularyOption] = (),
) -> tuple[tuple[LayerShape, ...], int]:
    """The widths, and the size of the vocabulary, that do the least damage with `ratio` of all parameters gone.

    Args:
        vocabulary: sizes to choose among; none: it stays as it is.

    Raises:
        NothingFits: heads, neurons and tokens together are fewer than that.
    """

    def cost_of(layer: LayerShape) -> tuple[float]:
        norms = shape.with_layers((layer,)).norm_parameters - shape.with_layers(()).norm_parameters
        return (shape.attention_parameters(layer) + shape.mlp_parameters(layer) + norms,)

    def attention_cost(heads: int, kv_heads: int) -> tuple[float]:
        return cost_of(LayerShape(heads, kv_heads, 0))

    def mlp_cost(neurons: int) -> tuple[float]:
        return cost_of(LayerShape(0, 0, neurons))

    sizes = [option.size for option in vocabulary] or [shape.vocab]
    damages = [option.damage for option in vocabulary] or [0.0]
    tables = [float(replace(shape, vocab=size).embedding_parameters) for size in sizes]
    room = sum(cost_of(layer)[0] for layer in shape.layers) + shape.embedding_parameters - ratio * shape.parameters
    extra = Group(np.array(damages), np.array(tables)[:, None])
    layers, index = allocate(table, shape, attention_cost, mlp_cost, (room,), options, extra)
    return layers, sizes[index]
