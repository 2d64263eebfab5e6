"""`lexical`: texts that cover the pool's tokens evenly; no model is asked.

The value of a set is Σ_v idf(v) · √(uses of v in it): each further use of a token is worth less, and rare tokens more.
That is submodular, so taking the text of most gain per token greedily is within a constant of the best (Nemhauser et
al. 1978). Gains only fall, so a stale one that is still the largest need not be compared with others (Minoux 1978).
"""

from __future__ import annotations

import heapq

import numpy as np

from edgeprune.distillation.base import Basket, Choice, Task


def select(task: Task) -> Choice:
    """Take, again and again, the text that adds most per token."""
    counts = [np.unique(task.pool.ids(int(i)), return_counts=True) for i in task.candidates]
    size = 1 + max((int(ids.max()) for ids, _ in counts if len(ids)), default=0)
    in_texts = np.zeros(size)
    for ids, _ in counts:
        in_texts[ids] += 1
    rarity = np.log((1 + len(counts)) / (1 + in_texts))
    used = np.zeros(size)
    lengths = task.lengths.clip(1)

    def gain(i: int) -> float:
        ids, uses = counts[i]
        return float((rarity[ids] * (np.sqrt(used[ids] + uses) - np.sqrt(used[ids]))).sum() / lengths[i])

    basket = Basket(task.quota, task.lengths)
    waiting = [(-gain(i), i) for i in range(len(counts))]
    heapq.heapify(waiting)
    while waiting:
        _, i = heapq.heappop(waiting)
        if not basket.has_room(i):
            continue
        fresh = gain(i)
        if waiting and fresh < -waiting[0][0]:
            heapq.heappush(waiting, (-fresh, i))
            continue
        basket.take(i)
        used[counts[i][0]] += counts[i][1]
    return Choice(basket.indices)
