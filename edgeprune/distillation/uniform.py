"""`random`: every text is as likely as any other. What all methods are compared with."""

from __future__ import annotations

from edgeprune.distillation.base import Basket, Choice, Task


def select(task: Task) -> Choice:
    """Take texts in random order as long as there is room."""
    order = task.rng.permutation(len(task.candidates))
    return Choice(Basket(task.quota, task.lengths).fill(order))
