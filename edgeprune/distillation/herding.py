"""`herding`: texts whose mean hidden states have the pool's mean (Welling 2009)."""

from __future__ import annotations

from edgeprune.distillation.base import Basket, Choice, Task
from edgeprune.distillation.matching import herd


def select(task: Task) -> Choice:
    """Herd the mean hidden states."""
    features = task.of_candidates(task.readings.means)
    return Choice(herd(features, features.mean(axis=0), Basket(task.quota, task.lengths)))
