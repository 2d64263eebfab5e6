"""`divergence`: recovery text from where pruning hurt (after PASER, arXiv 2502.12594).

The pool is clustered by mean hidden states, so that clusters stand for capabilities; each gets a part of the tokens in
proportion to its mean KL(dense ‖ pruned) and its size, and in it the texts of most KL a token come first. PASER divides
by the mean alone; then a cluster of a few odd texts gets as much as one that is a tenth of the pool.
"""

from __future__ import annotations

import numpy as np

from edgeprune.distillation.base import Basket, Choice, Task
from edgeprune.distillation.matching import clusters

_TEXTS_A_CLUSTER = 64  # on average


def select(task: Task) -> Choice:
    """Divide the quota over clusters, then take the most divergent texts of each."""
    means, damage = task.of_candidates(task.readings.means), task.of_candidates(task.readings.divergences)
    lengths = task.lengths
    groups = clusters(means, max(2, len(means) // _TEXTS_A_CLUSTER), task.seed)
    mass = np.bincount(groups, weights=damage * lengths)
    if not mass.sum():  # the student says what the dense model says
        mass = np.bincount(groups, weights=lengths)
    taken: list[int] = []
    for group in np.argsort(-mass):
        members = (groups == group).nonzero()[0]
        if not len(members):
            continue
        order = members[np.argsort(-damage[members], kind="stable")]
        basket = Basket(task.quota.share(float(mass[group] / mass.sum())), lengths[order])
        taken += order[basket.fill(range(len(order)))].tolist()
    # What rounding left over goes to the most divergent of the rest.
    whole = Basket(task.quota, lengths)
    whole.fill(taken)
    return Choice(whole.fill(np.argsort(-damage, kind="stable")))
