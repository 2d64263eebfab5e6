"""Weight compensation: which inputs of a projection to drop, and how the others take over what they did.

Pure tensor functions of second moments. For a projection with inputs x (one row a token), token weights s and targets
t, `gram` is G = Σ s x xᵀ and `cross` is C = Σ s x tᵀ. Keeping the inputs K, the weights W (rows: inputs) that lose
least are those of weighted ridge regression towards the old weights W₀:

    min over W_K of  Σ s ‖t - W_Kᵀ x_K‖² + Σ_k λ G_kk ‖W_k - W₀_k‖²
    (G_KK + Λ) W_K = C_K + Λ W₀_K,     Λ = diag(λ G_kk)

Damping by each input's own second moment makes λ free of scale: neurons differ in it by orders of magnitude.
Sources: the update is that of Optimal Brain Surgeon (Hassibi & Stork 1992) for a whole projection, as ZipLM
(arXiv 2302.04089) and OSSCAR (arXiv 2403.12983) use it for structures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edgeprune.errors import StageFailed
from edgeprune.shape import LayerShape

# Of the mean second moment; keeps an input that never fires from making the matrix singular.
_FLOOR = 1e-6
# Relative error of a solution in float64 grows with the condition number; above this it would reach per cents.
MAX_CONDITION = 1e13
_EXHAUSTIVE = 256  # head subsets of one layer tried one by one; beyond, heads leave greedily


def token_weights(residual: torch.Tensor) -> torch.Tensor:
    """Weight of each token in a layer's least squares: 1 / RMS² of the residual stream after the layer, mean 1.

    The next norm divides a token by its RMS, so an error counts by its size relative to that. Without the weights the
    few tokens of massive activations (190 times the median on SmolLM2-135M) rule every statistic.

    Args:
        residual: (..., hidden), the dense model's.

    Returns:
        (...), float32.
    """
    weights = 1.0 / residual.float().pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return weights / weights.mean()


def add_moments(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, symmetric: bool = False) -> None:
    """total += leftᵀ right, in place; of a `symmetric` total only the blocks on and above the diagonal.

    Args:
        total: (m, n).
        left: (tokens, m).
        right: (tokens, n).
        symmetric: the product is symmetric; `mirrored` makes it whole when all tokens are in. Saves near half the work.
    """
    if not symmetric:
        total.addmm_(left.T, right)
        return
    width = total.shape[0]
    blocks = max(1, min(8, width // 128))
    edges = [width * i // blocks for i in range(blocks + 1)]
    for start, stop in itertools.pairwise(edges):
        total[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """A whole symmetric matrix from its upper triangle, in place: it can be as large as all else together."""
    upper = torch.triu(total, 1)
    return total.triu_().add_(upper.T)


@dataclass(frozen=True)
class Moments:
    """Second moments of one projection's inputs with themselves and with its targets, and the weights it has.

    Attributes:
        gram: (inputs, inputs), float64.
        cross: (inputs, outputs), float64.
        weight: (inputs, outputs), the dense weights, transposed to a row an input.
        scale: what losses are told in units of, e.g. the weighted energy of the residual stream.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    weight: torch.Tensor
    scale: float

    def damping(self, ridge: float) -> torch.Tensor:
        """The diagonal of Λ, (inputs,)."""
        diagonal = self.gram.diagonal()
        return ridge * diagonal + _FLOOR * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)

    def damped_cross(self, ridge: float) -> torch.Tensor:
        """C + Λ W₀, (inputs, outputs)."""
        return self.cross + self.damping(ridge)[:, None] * self.weight


def factored(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Cholesky factor of a symmetric matrix in float64; the matrix itself is overwritten.

    Raises:
        StageFailed: it is not positive definite, or so ill-conditioned that a solution would mean nothing.
    """
    diagonal = matrix.diagonal().clone()
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty(0, dtype=torch.int32)))
    # How much of each input the ones before it do not explain already. Cholesky does not mind how inputs are scaled,
    # so the condition that counts is that of the correlations; this is near it in practice.
    unexplained = factor.diagonal().square() / diagonal
    if int(info) or not bool(torch.isfinite(unexplained).all()):
        raise StageFailed(f"second moments of {what} are not positive definite", remedy="give more calibration text")
    condition = float(1.0 / unexplained.min())
    if condition > MAX_CONDITION:
        raise StageFailed(
            f"second moments of {what} have condition {condition:.0e}", remedy="give more calibration text"
        )
    return factor


def solve(moments: Moments, kept: torch.Tensor, ridge: float, *, what: str = "a projection") -> torch.Tensor:
    """The best weights of a projection that keeps the inputs `kept`: (outputs, len(kept)), float32.

    Raises:
        StageFailed: see `factored`.
    """
    damping, cross = moments.damping(ridge), moments.damped_cross(ridge)
    gram = moments.gram[kept][:, kept]
    gram.diagonal().add_(damping[kept])
    return torch.cholesky_solve(cross[kept], factored(gram, what)).T.float().contiguous()


def errors_of(moments: Moments, choices: Sequence[torch.Tensor], ridge: float, *, what: str) -> list[float]:
    """What keeping only each of `choices` costs: the damped least squares' gain that is lost by it.

    In units of `Moments.scale`; the constant part, which no choice changes, is left out, so that keeping everything
    costs 0.

    Raises:
        StageFailed: see `factored`.
    """
    damping, cross = moments.damping(ridge), moments.damped_cross(ridge)

    def gain(kept: torch.Tensor) -> float:
        gram = moments.gram[kept][:, kept]
        gram.diagonal().add_(damping[kept])
        half = torch.linalg.solve_triangular(factored(gram, what), cross[kept], upper=False)
        return float((half * half).sum())

    full = gain(torch.arange(len(damping)))
    return [max(0.0, full - (gain(kept) if len(kept) else 0.0)) / moments.scale for kept in choices]


@dataclass(frozen=True)
class Elimination:
    """In which order inputs leave, and what is lost by then.

    Attributes:
        order: (removed,), input indices, first to leave first.
        errors: (removed,), cumulative loss after each, in units of `Moments.scale`.
        inputs: how many there were.
    """

    order: torch.Tensor
    errors: torch.Tensor
    inputs: int

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
    moments: Moments, ridge: float, *, least: int, step: int | None = None, what: str = "a projection"
) -> Elimination:
    """Backward elimination: again and again those inputs leave that are best made up for by the ones that stay.

    With P = (G + Λ)⁻¹ and B = P C, dropping input j raises the error by ‖B_j‖² / P_jj (the saliency of Optimal Brain
    Surgeon, summed over outputs); P and B are then updated by block elimination. Sets are nested: one run serves every
    width.

    Args:
        least: stop when so many are left.
        step: inputs that leave at once, chosen by the saliencies before any of them does; default: at most 1/128 of
            all, which costs nothing measurable against one at a time.

    Raises:
        StageFailed: see `factored`.
    """
    count = moments.gram.shape[0]
    step = step or max(1, count // 128)
    inverse = moments.gram.clone()
    inverse.diagonal().add_(moments.damping(ridge))
    inverse = torch.cholesky_inverse(factored(inverse, what))
    solution = inverse @ moments.damped_cross(ridge)
    alive = torch.ones(count, dtype=torch.bool)
    order: list[torch.Tensor] = []
    errors: list[float] = []
    left, lost = count, 0.0
    while left > least:
        leaving = min(step, left - least)
        saliency = torch.where(alive, solution.square().sum(1) / inverse.diagonal(), torch.inf)
        chosen = torch.topk(saliency, leaving, largest=False, sorted=True).indices
        factor = torch.linalg.cholesky(inverse[chosen][:, chosen])
        columns = inverse[:, chosen].clone()
        rows = torch.cholesky_solve(solution[chosen], factor)
        lost += float((solution[chosen] * rows).sum())
        solution -= columns @ rows
        inverse.addmm_(columns, torch.cholesky_solve(columns.T, factor), alpha=-1)
        # What has left must not come back through rounding, nor divide by zero.
        alive[chosen] = False
        inverse.diagonal()[chosen] = 1.0
        solution[chosen] = 0.0
        order.append(chosen)
        errors += [lost / moments.scale] * leaving
        left -= leaving
    return Elimination(
        torch.cat(order) if order else torch.empty(0, dtype=torch.int64),
        torch.tensor(errors, dtype=torch.float64),
        count,
    )


def rows_of(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Inputs of the output projection that belong to `heads`, (len(heads) · head_dim,)."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _subsets(dense: LayerShape, left: LayerShape) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    group, per_group = dense.heads // dense.kv_heads, left.heads // left.kv_heads
    for groups in itertools.combinations(range(dense.kv_heads), left.kv_heads):
        members = [itertools.combinations(range(kv * group, (kv + 1) * group), per_group) for kv in groups]
        for heads in itertools.product(*members):
            yield groups, tuple(itertools.chain(*heads))


def choose_heads(
    moments: Moments, dense: LayerShape, left: LayerShape, head_dim: int, ridge: float, *, what: str = "attention"
) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Which key/value heads and query heads stay at the widths `left`, and what is lost then.

    Every key/value head that stays keeps as many query heads as every other. All subsets are tried where they are few,
    as they are in small models; else whole groups leave first and then a head of every group, the cheapest first.

    Returns:
        Key/value heads, query heads (both ascending), and the loss in units of `Moments.scale`.

    Raises:
        StageFailed: see `factored`.
    """
    group, per_group = dense.heads // dense.kv_heads, left.heads // left.kv_heads
    count = math.comb(dense.kv_heads, left.kv_heads) * math.comb(group, per_group) ** left.kv_heads

    def best(choices: Sequence[tuple[int, ...]]) -> tuple[int, float]:
        errors = errors_of(moments, [rows_of(heads, head_dim) for heads in choices], ridge, what=what)
        index = min(range(len(errors)), key=errors.__getitem__)
        return index, errors[index]

    if count <= _EXHAUSTIVE:
        subsets = list(_subsets(dense, left))
        index, error = best([heads for _, heads in subsets])
        return *subsets[index], error
    members = {kv: tuple(range(kv * group, (kv + 1) * group)) for kv in range(dense.kv_heads)}

    def with_group(kv: int, replacement: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(itertools.chain(*(replacement if each == kv else kept for each, kept in members.items())))

    while len(members) > left.kv_heads:
        groups = list(members)
        del members[groups[best([with_group(kv, ()) for kv in groups])[0]]]
    for _ in range(group - per_group):
        for kv, kept in list(members.items()):
            shorter = [tuple(head for head in kept if head != gone) for gone in kept]
            members[kv] = shorter[best([with_group(kv, each) for each in shorter])[0]]
    heads = tuple(itertools.chain(*members.values()))
    return tuple(members), heads, best([heads])[1]
