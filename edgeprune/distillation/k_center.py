"""`k-center`: texts so that none in the pool is far from one of them (Sener & Savarese, arXiv 1708.00489)."""

from __future__ import annotations

from edgeprune.distillation.base import Basket, Choice, Task
from edgeprune.distillation.matching import farthest_first


def select(task: Task) -> Choice:
    """Go farthest first over the mean hidden states."""
    return farthest_first(task.of_candidates(task.readings.means), Basket(task.quota, task.lengths))
