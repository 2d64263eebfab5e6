"""The choice of widths under a budget, against trying everything."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.allocation import Options, allocate_parameters
from edgeprune.damage import DamageTable, HeadOption, WidthOption
from edgeprune.errors import NothingFits
from edgeprune.families import FAMILIES
from edgeprune.knapsack import Group, choose_options
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.vocabulary_damage import VocabularyOption

DENSE = LayerShape(4, 2, 128)


def shape(layers: int = 3) -> ModelShape:
    return ModelShape(
        family=FAMILIES["llama"],
        vocab=64,
        hidden=32,
        head_dim=16,
        layers=(DENSE,) * layers,
        tied=True,
        max_positions=64,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
    )


def table(sensitivity: list[float]) -> DamageTable:
    """Damages that grow in proportion to what is removed, a factor a layer."""
    heads = [(4, 2, 0.0), (2, 2, 0.5), (2, 1, 0.6), (1, 1, 0.9), (0, 0, 1.5)]
    losses = tuple(1 - n / 128 for n in range(129))
    return DamageTable(
        attention=tuple(tuple(HeadOption(h, k, f * d) for h, k, d in heads) for f in sensitivity),
        mlp=tuple(
            tuple(WidthOption(n, f * (1 - n / 128), losses[n]) for n in (128, 96, 64, 32, 0)) for f in sensitivity
        ),
        losses=(losses,) * len(sensitivity),
        model_hash="m",
        text_hash="t",
    )


@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.2, 1.0))
@settings(max_examples=30, deadline=None)
def test_choice_is_the_best_of_all(seed: int, n_groups: int, tightness: float) -> None:
    random = np.random.default_rng(seed)
    groups = [Group(random.random(4), random.random((4, 2))) for _ in range(n_groups)]
    limits = tightness * sum(group.costs.max(axis=0) for group in groups)
    feasible = [
        (sum(g.damages[i] for g, i in zip(groups, choice, strict=True)), choice)
        for choice in itertools.product(range(4), repeat=n_groups)
        if (sum(g.costs[i] for g, i in zip(groups, choice, strict=True)) <= limits + 1e-9).all()
    ]
    if not feasible:
        with pytest.raises(NothingFits):
            choose_options(groups, limits)
        return
    chosen = choose_options(groups, limits)
    damage = sum(g.damages[i] for g, i in zip(groups, chosen, strict=True))
    assert damage <= min(feasible)[0] * 1.0011 + 1e-9
    assert (sum(g.costs[i] for g, i in zip(groups, chosen, strict=True)) <= limits + 1e-6).all()


def test_nothing_of_the_solver_reaches_standard_output() -> None:
    """HiGHS prints a line while it solves this one; a command's JSON goes where it would stand."""
    code = """
import numpy as np
from edgeprune.knapsack import Group, choose_options
random = np.random.default_rng(10)
groups = [
    Group(np.sort(random.exponential(size=8))[::-1] ** 3, np.sort(random.integers(1, 10**6, (8, 1)), axis=0) * 1.0)
    for _ in range(60)
]
choose_options(groups, np.array([60 * 4.2e5]), gap=1e-4, seconds=5)
print("chosen")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "chosen\n"


def test_sensitive_layers_keep_more_and_the_ratio_is_met() -> None:
    dense = shape()
    widths, _ = allocate_parameters(table([10.0, 0.1, 1.0]), dense, 0.3, Options(align=16))
    after = dense.with_layers(widths)
    assert after.parameters <= 0.7 * dense.parameters
    assert widths[0] == DENSE and widths[1].neurons < widths[2].neurons
    assert all(layer.neurons % 16 == 0 for layer in widths)


def test_first_layer_keeps_attention_and_options_are_heeded() -> None:
    dense = shape()
    with_absent, _ = allocate_parameters(table([0.01, 1.0, 1.0]), dense, 0.5, Options(align=32))
    assert with_absent[0].heads
    without, _ = allocate_parameters(table([0.01, 1.0, 1.0]), dense, 0.4, Options(align=32, heads=False, absent=False))
    assert all(layer.heads == 4 and layer.neurons for layer in without)


def test_vocabulary_shrinks_where_that_is_the_cheaper_way() -> None:
    dense = shape()
    cheap = [VocabularyOption(64, 0.0), VocabularyOption(16, 1e-4), VocabularyOption(8, 50.0)]
    widths, size = allocate_parameters(table([1.0] * 3), dense, 0.2, Options(align=16), cheap)
    assert size == 16
    after = replace(dense.with_layers(widths), vocab=size)
    assert after.parameters <= 0.8 * dense.parameters
    alone, whole = allocate_parameters(table([1.0] * 3), dense, 0.2, Options(align=16))
    assert whole == dense.vocab
    assert sum(layer.neurons for layer in alone) <= sum(layer.neurons for layer in widths)


def test_more_than_there_is_cannot_leave() -> None:
    with pytest.raises(NothingFits):
        allocate_parameters(table([1.0] * 3), shape(), 0.99)


def test_damage_between_measured_widths_follows_the_loss() -> None:
    assert table([2.0]).mlp_damage(0, 80) == pytest.approx(2.0 * (1 - 80 / 128))
