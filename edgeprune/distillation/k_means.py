"""`k-means`: the text nearest to the centre of each of as many clusters as texts are taken.

What DiLM's code does (arXiv 2404.00264) under the name k-center, whose figures others cite; `k-center` here is the
covering problem of that name.
"""

from __future__ import annotations

from edgeprune.distillation.base import Basket, Choice, Task
from edgeprune.distillation.matching import central


def select(task: Task) -> Choice:
    """Cluster the mean hidden states and take what is nearest to the centres."""
    lengths, quota = task.lengths, task.quota
    count = round((quota.tokens or 0) / lengths.mean()) if quota.count is None else quota.count
    return central(task.of_candidates(task.readings.means), max(count, 1), task.seed, Basket(quota, lengths))
