"""Which type each tensor gets, so that the damage is least under a budget of bytes: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.errors import NothingFits
from edgeprune.knapsack import Group, choose_options

SOLVER_SECONDS = 20.0


def allocate(
    damage: Mapping[str, Mapping[str, float]], size: Mapping[str, Mapping[str, int]], budget: int
) -> dict[str, str]:
    """One type for each tensor: the least sum of damages whose bytes are within `budget`.

    Args:
        damage: by tensor and type, in any additive unit (nats a token, say).
        size: bytes by tensor and type.
        budget: bytes.

    Returns:
        A type by tensor. It is within 0.01 % of the least damage, or the best found in `SOLVER_SECONDS`.

    Raises:
        NothingFits: even the smallest types need more than `budget`.
        StageFailed: the solver finds no answer.
    """
    least = sum(min(size[name][kind] for kind in kinds) for name, kinds in damage.items())
    if least > budget:
        raise NothingFits(f"the smallest types need {least} bytes, the budget is {budget}", remedy="prune the model")
    worst = max(max(kinds.values()) for kinds in damage.values())
    # In units of the largest damage, so that the solver's tolerances mean something.
    groups = [
        Group(
            np.array([value / max(worst, 1e-300) for value in kinds.values()]),
            np.array([[size[name][kind]] for kind in kinds], dtype=np.float64),
        )
        for name, kinds in damage.items()
    ]
    chosen = choose_options(groups, np.array([float(budget)]), gap=1e-4, seconds=SOLVER_SECONDS)
    return {name: list(kinds)[index] for (name, kinds), index in zip(damage.items(), chosen, strict=True)}
