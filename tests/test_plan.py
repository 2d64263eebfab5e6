"""Plans: the ratio asked for is reached, groups stay whole, and broken plans are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BadInput
from edgeprune.families import FAMILIES
from edgeprune.plan import PrunePlan, check, head_options, keep_all, keep_heads, uniform_plan
from edgeprune.shape import LayerShape, ModelShape


def shape_of(heads: int, kv_heads: int, neurons: int, *, n_layers: int = 4, vocab: int = 256) -> ModelShape:
    return ModelShape(
        family=FAMILIES["llama"],
        vocab=vocab,
        hidden=64,
        head_dim=16,
        layers=(LayerShape(heads, kv_heads, neurons),) * n_layers,
        tied=True,
        max_positions=128,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
    )


def scores_for(shape: ModelShape, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [rng.random(w.heads) for w in shape.layers], [rng.random(w.neurons) for w in shape.layers]


SMOLLM2 = ModelShape(
    family=FAMILIES["llama"],
    vocab=49152,
    hidden=576,
    head_dim=64,
    layers=(LayerShape(9, 3, 1536),) * 30,
    tied=True,
    max_positions=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
)


def test_parameters_of_the_demo_model() -> None:
    assert SMOLLM2.parameters == 134_515_008
    assert SMOLLM2.embedding_parameters == 28_311_552
    assert 30 * SMOLLM2.attention_parameters(SMOLLM2.layers[0]) == 26_542_080
    assert 30 * SMOLLM2.mlp_parameters(SMOLLM2.layers[0]) == 79_626_240


@given(
    st.sampled_from([(8, 8), (8, 4), (8, 2), (9, 3), (4, 1)]),
    st.integers(16, 200),
    st.floats(0.0, 0.9),
    st.sampled_from([1, 4, 8, 16]),
    st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_the_ratio_is_reached_within_one_step_or_refused(
    heads: tuple[int, int], neurons: int, ratio: float, align: int, seed: int
) -> None:
    shape = shape_of(*heads, neurons)
    head_scores, neuron_scores = scores_for(shape, seed)
    try:
        plan = uniform_plan(shape, head_scores, neuron_scores, ratio, align=align)
    except BadInput as error:
        # Refused only when no width within a step exists at all; the message names the nearest.
        widths = [*range(align, neurons + 1, align), neurons]
        removed = [
            1 - shape.with_layers((LayerShape(h, kv, n),) * 4).parameters / shape.parameters
            for h, kv in head_options(shape.layers[0])
            for n in widths
        ]
        step = len(shape.layers) * 3 * 64 * align / shape.parameters
        assert min(abs(r - ratio) for r in removed) >= step / 2, error
        assert align > neurons or "nearest" in str(error)
        return
    check(plan, shape)
    step = len(shape.layers) * 3 * 64 * align / shape.parameters
    assert abs(plan.reached_ratio - ratio) <= step + 1e-9
    after = plan.shape_after(shape)
    assert after.uniform
    assert plan.reached_ratio == pytest.approx(1 - after.parameters / shape.parameters)
    assert after.layers[0].neurons % align == 0 or after.layers[0].neurons == neurons


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3))
def test_every_group_keeps_as_many_heads(seed: int, kv_heads: int, per_group: int) -> None:
    scores = np.random.default_rng(seed).random(9)
    kv, heads = keep_heads(scores, LayerShape(9, 3, 1), LayerShape(kv_heads * per_group, kv_heads, 1))
    assert len(kv) == kv_heads
    assert [sum(h // 3 == g for h in heads) for g in kv] == [per_group] * kv_heads
    for group in kv:  # the lowest of each group left
        kept = [h for h in heads if h // 3 == group]
        gone = [h for h in range(group * 3, group * 3 + 3) if h not in kept]
        assert all(scores[k] >= scores[g] for k in kept for g in gone)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4])
def test_the_mlp_scope_keeps_every_head(ratio: float) -> None:
    plan = uniform_plan(SMOLLM2, *scores_for(SMOLLM2), ratio, align=32, scope="mlp")
    assert plan.shape_after(SMOLLM2).layers[0].heads == 9
    assert abs(plan.reached_ratio - ratio) <= 30 * 3 * 576 * 32 / SMOLLM2.parameters


def test_permuting_neurons_permutes_the_plan() -> None:
    shape = shape_of(8, 4, 96)
    head_scores, neuron_scores = scores_for(shape)
    order = np.random.default_rng(3).permutation(96)
    plan = uniform_plan(shape, head_scores, neuron_scores, 0.2, align=8)
    moved = uniform_plan(shape, head_scores, [n[order] for n in neuron_scores], 0.2, align=8)
    for before, after in zip(plan.layers, moved.layers, strict=True):
        assert sorted(order[list(after.neurons)]) == list(before.neurons)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("align", [32, 128, 256])
def test_demo_model_ratios(ratio: float, align: int) -> None:
    plan = uniform_plan(SMOLLM2, *scores_for(SMOLLM2), ratio, align=align)
    assert abs(plan.reached_ratio - ratio) <= 30 * 3 * 576 * align / SMOLLM2.parameters


def test_ratio_zero_keeps_all() -> None:
    shape = shape_of(8, 4, 100)
    assert uniform_plan(shape, *scores_for(shape), 0.0, align=32).layers == keep_all(shape).layers
    assert uniform_plan(shape, *scores_for(shape), 0.0, align=256).layers == keep_all(shape).layers


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99])
def test_impossible_ratio_is_refused(ratio: float) -> None:
    shape = shape_of(8, 4, 96)
    with pytest.raises(BadInput, match="ratio"):
        uniform_plan(shape, *scores_for(shape), ratio, align=8)


def test_save_and_load(tmp_path: Path) -> None:
    shape = shape_of(8, 4, 96)
    plan = uniform_plan(shape, *scores_for(shape), 0.3, align=8, model_hash="m", text_hash="t")
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json", shape) == plan


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("layers"),
        lambda p: p["layers"].pop(),
        lambda p: p["layers"][0]["neurons"].append(10_000),
        lambda p: p["layers"][0]["neurons"].reverse(),
        lambda p: p["layers"][1]["heads"].pop(),
        lambda p: p["layers"][1].update(heads=[]),
        lambda p: p["layers"][1].update(kv_heads="ab"),
        lambda p: p["layers"][1].update(surprise=[1]),
        lambda p: p.update(schema_version=99),
        lambda p: p.update(scope="everything"),
        lambda p: p.update(layers=7),
    ],
)
def test_broken_plans_are_refused(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    shape = shape_of(8, 4, 96)
    value = uniform_plan(shape, *scores_for(shape), 0.3, align=8).to_json()
    value = json.loads(json.dumps(value))
    change(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(BadInput):
        PrunePlan.load(tmp_path / "plan.json", shape)
