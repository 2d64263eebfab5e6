"""What `fit` is about to do: candidates, and which of them would be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.candidates import RATIOS, Candidate, PlanFor, candidates_for, nearest_miss, worth_measuring
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import NothingFits
from edgeprune.plan import PrunePlan, Scope, uniform_plan
from edgeprune.shape import ModelShape
from edgeprune.targets import Target

if TYPE_CHECKING:
    from edgeprune.vocabulary_damage import VocabularyOption


@dataclass(frozen=True)
class Proposal:
    """What `fit` is about to do: shown before it runs, and all that `--dry-run` gives."""

    model: str
    shape: ModelShape
    profile: DeviceProfile
    budget: Budget
    candidates: tuple[Candidate, ...]
    to_measure: tuple[Candidate, ...]
    plans_to_make: int = 0  # beside these: plans of least damage for targets with which the dense model does not fit
    vocabulary: tuple[VocabularyOption, ...] = ()  # numbers of tokens that plans could choose among, where measured

    @property
    def n_feasible(self) -> int:
        """How many candidates are predicted to fit or, where the device is at hand, may fit."""
        return sum(c.fits or (self.profile.at_hand and c.doubtful) for c in self.candidates)

    def nothing_fits(self, *, fewer_tokens: bool = False) -> NothingFits:
        """The error for a budget that none of the candidates meets; `fewer_tokens`: with a corpus, some might."""
        miss = nearest_miss(self.candidates)
        return NothingFits(
            f"nothing fits {self.profile.name}; the nearest is {miss}: {'; '.join(miss.reasons)}",
            remedy="relax the budget, take a smaller model"
            + (", or give --corpus FILE: with fewer tokens it may fit" if fewer_tokens else ""),
        )


def plans(shape: ModelShape, heads: Sequence[Any], neurons: Sequence[Any], **origin: str) -> PlanFor:
    """Uniform plans of the same scores by (ratio, alignment, scope), each made once.

    Args:
        heads: a layer: (heads,), importance.
        neurons: a layer: (neurons,), importance.
        origin: what `uniform_plan` notes of where the scores came from.
    """
    made: dict[tuple[float, int, Scope], PrunePlan] = {}

    def plan_for(ratio: float, align: int, scope: Scope) -> PrunePlan:
        key = (ratio, align, scope)
        if key not in made:
            made[key] = uniform_plan(shape, heads, neurons, ratio, align=align, scope=scope, **origin)
        return made[key]

    return plan_for


def propose(
    name: str,
    shape: ModelShape,
    profile: DeviceProfile,
    budget: Budget,
    targets: Sequence[Target],
    plan_for: PlanFor | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    limit: int = 10,
) -> Proposal:
    """What could be shipped, and which of it would be measured. Arithmetic only.

    Without `plan_for` (scores not yet known) all heads and all neurons count alike.
    """
    if plan_for is None:
        heads = [np.ones(layer.heads) for layer in shape.layers]
        plan_for = plans(shape, heads, [np.ones(layer.neurons) for layer in shape.layers])
    candidates = candidates_for(shape, plan_for, targets, profile, budget, ratios=ratios)
    to_measure = worth_measuring(candidates, limit, at_hand=profile.at_hand)
    return Proposal(name, shape, profile, budget, tuple(candidates), tuple(to_measure))
