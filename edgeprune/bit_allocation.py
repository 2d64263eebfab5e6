"""Which type each tensor gets, so that the damage is least under a budget of bytes: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from edgeprune.errors import NothingFits, StageFailed

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
    choices = [(name, kind) for name, kinds in damage.items() for kind in kinds]
    tensor_of = {name: i for i, name in enumerate(damage)}
    rows = [tensor_of[name] for name, _ in choices]
    one_each = csr_array((np.ones(len(choices)), (rows, np.arange(len(choices)))))
    # In units of the budget and of the largest damage, so that the solver's tolerances mean something.
    bytes_share = np.array([[size[name][kind] / budget for name, kind in choices]])
    cost = np.array([damage[name][kind] for name, kind in choices])
    answer = milp(
        cost / max(float(cost.max()), 1e-300),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bytes_share, -np.inf, 1.0)],
        options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": 1e-4},
    )
    if answer.x is None:
        raise StageFailed(f"the solver found no types ({answer.message})", remedy="raise the budget a little")
    return {name: kind for (name, kind), taken in zip(choices, answer.x, strict=True) if taken > 0.5}
