"""Choosing rows of a matrix so that their sum, or they themselves, stand for all rows: pure functions of features."""

from __future__ import annotations

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import nnls

from edgeprune.distillation.base import Basket, Choice, Floats, Indices

_FEW = 64  # up to so many chosen rows weights are solved exactly in each turn; beyond, improved and solved at the end
_SWEEPS = 30  # steps of improving them
_CONSTANT = 10.0  # mean squares of a row that a sum of weights which is wrong by 1 counts for


def herd(features: Floats, target: Floats, basket: Basket) -> Choice:
    """Herding (Welling 2009): one by one the row that brings the mean of the chosen ones nearest to the target.

    Args:
        features: (n, k).
        target: (k,).
        basket: what there is room for.
    """
    norms = np.einsum("ij,ij->i", features, features)
    along = features @ target
    total = np.zeros_like(target)
    while (room := basket.open).any():
        size = len(basket.taken) + 1
        # ‖(total + f) / size - target‖² without what all candidates share.
        distance = (norms + 2 * (features @ total)) / size**2 - 2 * along / size
        best = int(np.where(room, distance, np.inf).argmin())
        basket.take(best)
        total = total + features[best]
    return Choice(basket.indices)


def pursue(features: Floats, target: Floats, basket: Basket, ridge: float) -> Choice:
    """Orthogonal matching pursuit with weights that are not negative: rows whose weighted mean is the target.

    Minimises ‖target - Σ w_i f_i‖² + ridge · mean‖f‖² · ‖w‖² over w ≥ 0 with Σ w_i = 1; in each turn the row that is
    most along what is left, by its own length, is added and all weights are solved again (Pati et al. 1993; for
    gradients of data GRAD-MATCH, arXiv 2103.00123). Without the sum, rows of large norm with small weights would be as
    good as a mean, but a training on them would not. It is kept by one more value, the same in all rows and the target.

    Args:
        features: (n, k).
        target: (k,).
        basket: what there is room for.
        ridge: damps weights: with 0 a few rows may bear the whole sum.
    """
    squares = np.einsum("ij,ij->i", features, features)
    # Whatever its size the first row is one that is along the target; later it keeps the sum of weights.
    constant = _CONSTANT * max(float(np.mean(squares)), 1e-30)
    norms = np.sqrt(squares + constant)
    damping = ridge * float(np.mean(squares))
    gram, along = np.zeros((0, 0)), np.zeros(0)
    weights: Floats = np.zeros(0)
    while (room := basket.open).any():
        taken = basket.indices
        left = target - weights @ features[taken] if len(taken) else target
        lacking = constant * (1.0 - weights.sum())
        best = int(np.where(room, (features @ left + lacking) / norms, -np.inf).argmax())
        row = features[[*taken, best]] @ features[best] + constant
        gram = np.block([[gram, row[:-1, None]], [row[None]]])
        gram[-1, -1] += damping
        along = np.append(along, features[best] @ target + constant)
        basket.take(best)
        weights = nonnegative(gram, along, np.append(weights, 0.0))
    if not len(weights):
        return Choice(basket.indices)
    weights = _exact(gram, along)
    if not weights.any():
        return Choice(basket.indices)
    # A row that came out with no weight was added for a reason that later rows took away; it still counts a little.
    weights = np.maximum(weights, 0.1 * weights[weights > 0].mean())
    return Choice(basket.indices, weights / weights.mean())


def nonnegative(gram: Floats, along: Floats, start: Floats) -> Floats:
    """Weights w ≥ 0 of least w'Gw - 2 w'a: exact where they are few, else improved from `start` by projected steps."""
    if len(along) <= _FEW:
        return _exact(gram, along)
    weights: Floats = start.copy()
    step = 1.0 / float(np.abs(gram).sum(axis=1).max())
    for _ in range(_SWEEPS):
        weights = np.maximum(0.0, weights - step * (gram @ weights - along))
    return weights


def _exact(gram: Floats, along: Floats) -> Floats:
    """The same by scipy's active sets, from a square root of the Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(values.clip(values.max(initial=0.0) * 1e-12))
    solved, _ = nnls(root[:, None] * vectors.T, (vectors.T @ along) / root.clip(1e-30), maxiter=50 * len(along))
    return np.asarray(solved)


def farthest_first(features: Floats, basket: Basket) -> Choice:
    """k-center, greedily (Gonzalez 1985): first the row nearest to the mean, then always the one farthest from all."""
    nearest = np.full(len(features), np.inf)
    following = int(np.square(features - features.mean(axis=0)).sum(axis=1).argmin())
    while (room := basket.open).any():
        if not room[following]:
            following = int(np.where(room, nearest, -np.inf).argmax())
        basket.take(following)
        nearest = np.minimum(nearest, np.square(features - features[following]).sum(axis=1))
        following = int(np.where(basket.open, nearest, -np.inf).argmax())
    return Choice(basket.indices)


def clusters(features: Floats, count: int, seed: int) -> Indices:
    """The cluster of each row, (n,), of at most `count` by k-means (k-means++ starts)."""
    count = min(count, len(np.unique(features, axis=0)))
    if count <= 1:
        return np.zeros(len(features), dtype=np.int64)
    data = np.asarray(features, dtype=np.float64)
    _, labels = kmeans2(data, count, minit="++", seed=np.random.default_rng(seed), missing="warn")
    return np.asarray(labels, dtype=np.int64)
