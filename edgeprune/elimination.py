"""Which inputs of a projection to drop: those that the others can best make up for, found by backward elimination.

With the second moments of `compensation`, P = (G + Λ)⁻¹ and B = P (C + Λ W₀), dropping the inputs S at once raises the
damped least squares' error by tr(B_Sᵀ P_SS⁻¹ B_S): the saliency of Optimal Brain Surgeon (Hassibi & Stork 1992), for a
set. What stays is then B - P_:S P_SS⁻¹ B_S, with P - P_:S P_SS⁻¹ P_S: for the next time. One inversion so serves every
set that is weighed and every width, and ends in the compensated weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from edgeprune.compensation import Moments, factored
from edgeprune.shape import LayerShape

_EXHAUSTIVE = 256  # head subsets of one layer tried one by one; beyond, heads leave greedily


class Surgeon:
    """A projection some of whose inputs have been dropped, with the weights of the others compensated.

    Args:
        moments: its second moments.
        ridge: λ of the damping.
        what: what the projection is, for errors.

    Raises:
        StageFailed: see `compensation.factored`.
    """

    def __init__(self, moments: Moments, ridge: float, *, what: str = "a projection") -> None:
        matrix = moments.gram.to(torch.float64, copy=True)
        matrix.diagonal().add_(moments.damping(ridge))
        matrix = factored(matrix, what)
        self._inverse = torch.cholesky_inverse(matrix)
        del matrix  # as large as the inverse: with ten thousand inputs each is a gigabyte
        self._solution = moments.solved_with(self._inverse, ridge)
        self._scale = moments.scale
        self._lost = 0.0
        self._inputs = moments.inputs
        self.alive = torch.ones(len(self._inverse), dtype=torch.bool)  # the constant, which never goes, included

    def copy(self) -> Surgeon:
        """Another with the same inputs gone; what is dropped from one stays in the other."""
        twin = copy(self)
        twin._inverse, twin._solution = self._inverse.clone(), self._solution.clone()
        twin.alive = self.alive.clone()
        return twin

    @property
    def lost(self) -> float:
        """How much the error has risen so far, in units of `Moments.scale`."""
        return self._lost / self._scale

    def saliencies(self) -> torch.Tensor:
        """What dropping each input alone would cost, (inputs,); inf for one that is gone."""
        each = self._solution.square().sum(1) / self._inverse.diagonal()
        return torch.where(self.alive, each, torch.inf)[: self._inputs]

    def cost(self, inputs: torch.Tensor) -> float:
        """What dropping `inputs`, none of them gone yet, would cost, in units of `Moments.scale`."""
        return self._rise(inputs)[1] / self._scale

    def _rise(self, inputs: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The Cholesky factor L of P_SS, and tr(B_Sᵀ P_SS⁻¹ B_S)."""
        factor = torch.linalg.cholesky(self._inverse[inputs][:, inputs])
        half = torch.linalg.solve_triangular(factor, self._solution[inputs], upper=False)
        return factor, float(half.square().sum())

    def drop(self, inputs: torch.Tensor) -> None:
        """Drop `inputs`, none of them gone yet; the others take over."""
        factor, rise = self._rise(inputs)
        self._lost += rise
        columns = self._inverse[:, inputs].clone()
        self._solution.addmm_(columns, torch.cholesky_solve(self._solution[inputs], factor), alpha=-1)
        self._inverse.addmm_(columns, torch.cholesky_solve(columns.T, factor), alpha=-1)
        # What has left must not come back through rounding, nor divide by zero.
        self.alive[inputs] = False
        self._inverse.diagonal()[inputs] = 1.0
        self._solution[inputs] = 0.0

    def weights(self) -> torch.Tensor:
        """The weights of the inputs that are left, (outputs, left), float32; the bias, if any, as the last column."""
        return self._solution[self.alive].T.float().contiguous()


@dataclass(frozen=True)
class Elimination:
    """In which order inputs leave, what is lost by then, and what the others become.

    Attributes:
        order: (removed,), input indices, first to leave first.
        errors: (removed,), cumulative loss after each, in units of `Moments.scale`.
        inputs: how many there were.
        weights: by number of inputs left, where it was asked for: as `Surgeon.weights`.
    """

    order: torch.Tensor
    errors: torch.Tensor
    inputs: int
    weights: dict[int, torch.Tensor]

    def kept(self, width: int) -> torch.Tensor:
        """The inputs left at `width`, ascending."""
        mask = torch.ones(self.inputs, dtype=torch.bool)
        mask[self.order[: self.inputs - width]] = False
        return mask.nonzero().flatten()

    def error(self, width: int) -> float:
        """What is lost at `width`."""
        removed = self.inputs - width
        return float(self.errors[removed - 1]) if removed else 0.0


def eliminate(
    moments: Moments, ridge: float, *, widths: Sequence[int], step: int | None = None, what: str = "a projection"
) -> Elimination:
    """Backward elimination: again and again those inputs leave that are best made up for by the ones that stay.

    Sets are nested: one run serves every width.

    Args:
        widths: numbers of inputs left at which the weights are wanted; the least of them ends the run.
        step: inputs that leave at once, chosen by the saliencies before any of them does; default: at most 1/128 of
            all, which costs nothing measurable against one at a time.

    Raises:
        StageFailed: see `compensation.factored`.
    """
    surgeon = Surgeon(moments, ridge, what=what)
    left = count = moments.inputs
    step = step or max(1, count // 128)
    order: list[torch.Tensor] = []
    errors: list[float] = []
    weights: dict[int, torch.Tensor] = {}
    for width in sorted(set(widths), reverse=True):
        while left > width:
            leaving = min(step, left - width)
            chosen = torch.topk(surgeon.saliencies(), leaving, largest=False, sorted=True).indices
            surgeon.drop(chosen)
            order.append(chosen)
            errors += [surgeon.lost] * leaving
            left -= leaving
        weights[width] = surgeon.weights()
    return Elimination(
        torch.cat(order) if order else torch.empty(0, dtype=torch.int64),
        torch.tensor(errors, dtype=torch.float64),
        count,
        weights,
    )


def rows_of(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Inputs of the output projection that belong to `heads`, (len(heads) · head_dim,)."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim + torch.arange(head_dim)).flatten()


@dataclass(frozen=True)
class HeadChoice:
    """Heads that stay, and what becomes of the output projection.

    Attributes:
        kv_heads, heads: ascending.
        loss: in units of `Moments.scale`.
        weights: as `Surgeon.weights`.
    """

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]
    loss: float
    weights: torch.Tensor


def _subsets(dense: LayerShape, left: LayerShape) -> Iterator[tuple[int, ...]]:
    group, per_group = dense.heads // dense.kv_heads, left.heads // left.kv_heads
    for groups in itertools.combinations(range(dense.kv_heads), left.kv_heads):
        members = [itertools.combinations(range(kv * group, (kv + 1) * group), per_group) for kv in groups]
        for heads in itertools.product(*members):
            yield tuple(itertools.chain(*heads))


def choose_heads(surgeon: Surgeon, dense: LayerShape, left: LayerShape, head_dim: int) -> HeadChoice:
    """Which key/value heads and query heads stay at the widths `left`.

    Every key/value head that stays keeps as many query heads as every other. All subsets are tried where they are few,
    as they are in small models; else whole groups leave first and then a head of every group, the cheapest first.

    Args:
        surgeon: of the output projection with nothing dropped; the heads that go are dropped from it.
        dense, left: widths before and after.
        head_dim: inputs a head.
    """
    group, per_group = dense.heads // dense.kv_heads, left.heads // left.kv_heads
    count = math.comb(dense.kv_heads, left.kv_heads) * math.comb(group, per_group) ** left.kv_heads
    every = range(dense.heads)

    def cheapest(choices: Sequence[Sequence[int]]) -> int:
        costs = [surgeon.cost(rows_of(gone, head_dim)) for gone in choices]
        return min(range(len(costs)), key=costs.__getitem__)

    if count <= _EXHAUSTIVE:
        subsets = list(_subsets(dense, left))
        gone = [[head for head in every if head not in kept] for kept in subsets]
        index = cheapest(gone) if gone[0] else 0
        heads = subsets[index]
        if gone[index]:
            surgeon.drop(rows_of(gone[index], head_dim))
    else:
        members = {kv: list(range(kv * group, (kv + 1) * group)) for kv in range(dense.kv_heads)}
        while len(members) > left.kv_heads:
            kv = list(members)[cheapest(list(members.values()))]
            surgeon.drop(rows_of(members.pop(kv), head_dim))
        for _ in range(group - per_group):
            for kept in members.values():
                head = kept[cheapest([[head] for head in kept])]
                surgeon.drop(rows_of([head], head_dim))
                kept.remove(head)
        heads = tuple(itertools.chain(*members.values()))
    return HeadChoice(tuple(sorted({head // group for head in heads})), heads, surgeon.lost, surgeon.weights())
