"""`el2n`: the texts that the dense model is most wrong about (arXiv 2107.07075). Known to be worse than random where
few texts are taken: they are the pool's oddities."""

from __future__ import annotations

import numpy as np

from edgeprune.distillation.base import Basket, Choice, Task


def select(task: Task) -> Choice:
    """Take texts by falling error."""
    order = np.argsort(-task.of_candidates(task.readings.errors), kind="stable")
    return Choice(Basket(task.quota, task.lengths).fill(order))
