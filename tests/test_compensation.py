"""Least squares, elimination and the choice of heads, against literal computations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.compensation import (
    Moments,
    add_moments,
    mirrored,
    solve,
    token_weights,
)
from edgeprune.elimination import Surgeon, choose_heads, eliminate, rows_of
from edgeprune.errors import StageFailed
from edgeprune.shape import LayerShape

RIDGE = 0.01


def correlated(
    inputs: int, outputs: int, *, seed: int = 0, tokens: int = 400
) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    """Moments of random inputs that partly make up for each other; the inputs; the targets."""
    generator, tokens = torch.Generator().manual_seed(seed), 400
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    target = x @ weight + 0.1 * torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    return Moments(x.T @ x, x.T @ target, weight, float(target.square().sum())), x, target


def damped_loss(
    moments: Moments, x: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor
) -> float:
    """What `solve` minimises, by its definition; `weight` is (kept, outputs)."""
    pull = moments.damping(RIDGE)[kept, None] * (weight - moments.weight[kept]).square()
    return float((target - x[:, kept] @ weight).square().sum() + pull.sum())


def errors_of(moments: Moments, choices: Sequence[torch.Tensor]) -> list[float]:
    """What keeping only each of `choices` loses against keeping everything, by the gain of each least squares."""

    def gain(kept: torch.Tensor) -> float:
        gram = moments.gram[kept][:, kept] + torch.diag(moments.damping(RIDGE)[kept])
        cross = moments.damped_cross(RIDGE, kept)
        return float((cross * torch.linalg.solve(gram, cross)).sum())

    full = gain(torch.arange(len(moments.gram)))
    return [(full - gain(kept)) / moments.scale for kept in choices]


def test_solution_is_the_ridge_regression() -> None:
    moments, x, target = correlated(12, 5)
    kept = torch.tensor([0, 3, 4, 7, 8, 11])
    root = moments.damping(RIDGE)[kept].sqrt()
    rows = torch.cat([x[:, kept], torch.diag(root)])
    wanted = torch.cat([target, root[:, None] * moments.weight[kept]])
    expected = torch.linalg.lstsq(rows, wanted).solution.T.float()
    torch.testing.assert_close(solve(moments, kept, RIDGE), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.sets(st.integers(0, 11), min_size=1))
@settings(max_examples=25, deadline=None)
def test_the_projections_own_output_may_be_a_share_of_the_target(seed: int, share: float, left: set[int]) -> None:
    moments, _, _ = correlated(12, 3, seed=seed)
    mixed = (1 - share) * moments.cross + share * moments.gram @ moments.weight
    literal, kept = replace(moments, cross=mixed), torch.tensor(sorted(left))
    shared = replace(moments, own=share)
    torch.testing.assert_close(solve(shared, kept, RIDGE), solve(literal, kept, RIDGE), rtol=1e-4, atol=1e-4)
    widths = [len(left)]
    found, expected = (eliminate(each, RIDGE, widths=widths, step=1) for each in (shared, literal))
    assert found.error(len(left)) == pytest.approx(expected.error(len(left)), rel=1e-6, abs=1e-12)


def test_all_inputs_with_their_own_output_as_target_keep_their_weights() -> None:
    moments, _, _ = correlated(10, 4)
    own = replace(moments, cross=torch.empty(10, 0), own=1.0)
    torch.testing.assert_close(solve(own, torch.arange(10), RIDGE), moments.weight.T.float())


@given(st.integers(0, 1000), st.integers(1, 11), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_elimination_tells_the_loss_of_what_it_keeps(seed: int, least: int, step: int) -> None:
    moments, x, target = correlated(12, 3, seed=seed)
    found = eliminate(moments, RIDGE, widths=range(least, 12), step=step)
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist()))
    every = torch.arange(12)
    full = damped_loss(moments, x, target, every, solve(moments, every, RIDGE).T.double())
    previous = 0.0
    for width in range(11, least - 1, -1):
        kept = found.kept(width)
        assert len(kept) == width
        if (12 - width) % step == 0:  # between steps the loss told is that of the whole step
            lost = damped_loss(moments, x, target, kept, solve(moments, kept, RIDGE).T.double())
            # The pull on the weights that left counts too: they would have moved from the old ones to nothing.
            gone = torch.tensor([i for i in range(12) if i not in kept.tolist()])
            pull = float((moments.damping(RIDGE)[gone, None] * moments.weight[gone].square()).sum())
            assert found.error(width) == pytest.approx((lost + pull - full) / moments.scale, rel=1e-3, abs=1e-7)
            assert found.error(width) == pytest.approx(errors_of(moments, [kept])[0], rel=1e-6, abs=1e-9)
            torch.testing.assert_close(found.weights[width], solve(moments, kept, RIDGE), rtol=1e-4, atol=1e-4)
        assert found.error(width) >= previous
        previous = found.error(width)


def test_elimination_one_by_one_takes_the_cheapest_each_time() -> None:
    moments, _, _ = correlated(8, 3, seed=5)
    found = eliminate(moments, RIDGE, widths=[3], step=1)
    left = list(range(8))
    for gone in found.order.tolist():
        choices = [[i for i in left if i != j] for j in left]
        errors = errors_of(moments, [torch.tensor(choice) for choice in choices])
        assert left[min(range(len(left)), key=errors.__getitem__)] == gone
        left.remove(gone)


def test_a_bias_takes_over_the_mean_of_what_goes() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(400, 9, generator=generator, dtype=torch.float64)
    x[:, 4] = 3.0  # a neuron that always says the same
    x[:, 8] = 1.0
    weight = torch.randn(9, 5, generator=generator, dtype=torch.float64)  # the last row is the bias
    target = x @ weight
    moments = Moments(x.T @ x, x.T @ target, weight, float(target.square().sum()), constant=True)
    assert moments.inputs == 8
    found = eliminate(moments, 1e-6, widths=[7, 3], step=1)
    assert found.order[0] == 4 and 8 not in found.order
    assert found.error(7) < 1e-4 < found.error(3)
    without, bias = found.weights[7][:, :-1], found.weights[7][:, -1]
    kept = found.kept(7)
    torch.testing.assert_close(without, weight[kept].T.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, (weight[8] + 3 * weight[4]).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.weights[7], solve(moments, kept, 1e-6), rtol=1e-4, atol=1e-4)
    heads = choose_heads(Surgeon(moments, 1e-6), LayerShape(4, 4, 1), LayerShape(3, 3, 1), 2)
    assert heads.weights.shape == (5, 3 * 2 + 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (2, 1), (2, 2), (6, 3)])
def test_heads_are_the_best_of_all_that_grouped_attention_allows(heads: int, kv_heads: int) -> None:
    dense, head_dim = LayerShape(6, 3, 1), 4
    moments, _, _ = correlated(24, 5, seed=2)
    found = choose_heads(Surgeon(moments, RIDGE), dense, LayerShape(heads, kv_heads, 1), head_dim)
    allowed = [
        choice
        for choice in itertools.combinations(range(6), heads)
        if len({h // 2 for h in choice}) == kv_heads
        and len({[h // 2 for h in choice].count(h // 2) for h in choice}) == 1
    ]
    errors = errors_of(moments, [rows_of(choice, head_dim) for choice in allowed])
    assert found.loss == pytest.approx(min(errors), abs=1e-12)
    assert found.heads in allowed and found.kv_heads == tuple(sorted({h // 2 for h in found.heads}))
    kept = rows_of(found.heads, head_dim)
    torch.testing.assert_close(found.weights, solve(moments, kept, RIDGE), rtol=1e-4, atol=1e-4)


def test_many_heads_leave_greedily_and_evenly() -> None:
    dense, head_dim = LayerShape(16, 8, 1), 2
    moments, _, _ = correlated(32, 4, seed=3)
    found = choose_heads(Surgeon(moments, RIDGE), dense, LayerShape(5, 5, 1), head_dim)
    assert len(found.kv_heads) == 5 and [h // 2 for h in found.heads] == list(found.kv_heads)
    kept = rows_of(found.heads, head_dim)
    assert found.loss == pytest.approx(errors_of(moments, [kept])[0])
    torch.testing.assert_close(found.weights, solve(moments, kept, RIDGE), rtol=1e-4, atol=1e-4)


def test_moments_that_determine_nothing_are_told() -> None:
    flat = torch.full((4, 4), -1.0, dtype=torch.float64)
    moments = Moments(flat, torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64), 1.0)
    with pytest.raises(StageFailed, match="more calibration text"):
        solve(moments, torch.arange(4), RIDGE)


def test_symmetric_sums_equal_plain_ones() -> None:
    x = torch.randn(50, 300)
    total = torch.zeros(300, 300)
    for part in x.split(20):
        add_moments(total, part, part, symmetric=True)
    torch.testing.assert_close(mirrored(total), x.T @ x, rtol=1e-4, atol=1e-4)


def test_a_token_twice_as_large_counts_a_quarter() -> None:
    weights = token_weights(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))
    assert weights.mean() == pytest.approx(1.0)
    assert float(weights[0] / weights[1]) == pytest.approx(4.0)


def test_inputs_that_are_all_zero_give_no_nan() -> None:
    flat = Moments(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 2), torch.ones(4, 2), 1.0)
    found = eliminate(flat, RIDGE, widths=[2], step=1)
    assert all(torch.isfinite(weights).all() for weights in found.weights.values())
