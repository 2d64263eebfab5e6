"""`gradient-matching`: texts, and weights, whose gradient of the recovery's loss is the whole pool's.

A training step moves weights along a mean gradient; a set with the pool's mean gradient moves them as the pool would.
The gradient is that of KL(dense ‖ pruned) and cross-entropy as recovery mixes them, at the output head and at the
pruned projections of the last layers, known by sketches of its rank-one parts (`gradients`). Texts are taken one by
one so that their mean is nearest to the pool's, then weighed exactly (`matching.match`).
"""

from __future__ import annotations

from edgeprune.distillation.base import Choice, Task
from edgeprune.distillation.matching import match_tokens

RIDGE = 0.5  # as GRAD-MATCH has it, relative to the mean square of a text's gradient


def select(task: Task) -> Choice:
    """Match the mean gradient of the candidates: of their tokens where tokens are counted, else of texts."""
    return match_tokens(task.of_candidates(task.readings.gradients), task, RIDGE)
