"""Candidates for a device: what could be shipped, what it is predicted to cost, and which deserve to be measured.

Everything here is arithmetic on plans and profiles; nothing is exported or run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeprune.cost import DEFAULT_DEPTH, Cost, bytes_read_per_token, judge, predict
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import BadInput
from edgeprune.offload import device_settings
from edgeprune.plan import SCOPES, PrunePlan, Scope, WidthPlan
from edgeprune.runtimes.settings import Values
from edgeprune.shape import ModelShape
from edgeprune.targets import Target

# Ratios tried by default, of all parameters. The steps are those of a 32-wide alignment on a small model, doubled;
# beyond 60 % heads and neurons of a small model are nearly all gone.
RATIOS = tuple(step / 40 for step in range(25))

PlanFor = Callable[[float, int, Scope], PrunePlan]  # (ratio, alignment, scope) -> plan


@dataclass(frozen=True)
class Candidate:
    """One thing that could be shipped, with its predicted cost."""

    plan: PrunePlan | WidthPlan
    target: Target
    shape: ModelShape
    cost: Cost
    reasons: tuple[str, ...]  # why it does not fit; empty if it does
    doubtful: bool  # it does not fit by the middle of the prediction, but its interval reaches into the budget
    notes: tuple[str, ...] = field(default=())
    recovery_s: float = 0.0  # seconds of recovery the pruned model gets before it is exported

    @property
    def fits(self) -> bool:
        """Whether the prediction meets the budget."""
        return not self.reasons

    @property
    def settings(self) -> Values:
        """What its runtime has to be told on the device."""
        return device_settings(self.target.runtime, self.cost.backend, self.cost.gpu_layers)

    @property
    def dense(self) -> bool:
        """Whether nothing is removed."""
        return self.plan.reached_ratio == 0.0

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it keeps; None where its vocabulary is the dense one."""
        return self.plan.vocabulary if isinstance(self.plan, WidthPlan) else None

    @property
    def name(self) -> str:
        """A short name, unique among the candidates of one run and fit for a file name."""
        share = self._share("dense", "pruned{:.1f}", "-mlp")
        share += f"-vocabulary{self.vocabulary}" if self.vocabulary else ""
        # Colons part the options of a quantisation's name; in file names some systems refuse them.
        return f"{share}{'-recovered' if self.recovery_s else ''}-{self.target.quantisation.replace(':', '-')}"

    def __str__(self) -> str:
        share = self._share("dense", "{:.1f} % pruned", " (MLP)")
        share += f" ({self.vocabulary:,} tokens left)" if self.vocabulary else ""
        return f"{share}{' and recovered' if self.recovery_s else ''}, {self.target}"

    def _share(self, dense: str, pruned: str, mlp: str) -> str:
        if self.dense:
            return dense
        return pruned.format(100 * self.plan.reached_ratio) + (mlp if self.plan.scope == "mlp" else "")

    @property
    def plan_hash(self) -> str:
        """Identity of what is kept."""
        kept: list[Any] = [asdict(layer) for layer in self.plan.layers]
        if isinstance(self.plan, WidthPlan) and self.plan.vocabulary:
            kept += [self.plan.vocabulary, self.plan.corpus]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()

    @property
    def key(self) -> tuple[str, str]:
        """Tells candidates of one run apart: names have rounded shares."""
        return self.name, self.plan_hash

    def to_json(self) -> dict[str, Any]:
        """The candidate as it stands in the record, without the lists of indices."""
        return {
            "name": self.name,
            "plan": {
                "method": self.plan.method,
                "scope": self.plan.scope,
                "asked_ratio": self.plan.asked_ratio,
                "reached_ratio": self.plan.reached_ratio,
                "predicted_damage_nats": self.plan.damage if isinstance(self.plan, WidthPlan) else None,
                "recovery_s": self.recovery_s,
                "sha256": self.plan_hash,
                **self.shape.widths(),
                "vocabulary": self.shape.vocab,
                "parameters": self.shape.parameters,
            },
            "quantisation": self.target.quantisation,
            "runtime": self.target.runtime,
            "threads": self.cost.threads,
            "predicted": asdict(self.cost),
            "fits": self.fits,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
        }


def usable_targets(targets: Sequence[Target], profile: DeviceProfile) -> list[Target]:
    """Of `targets` those whose runtime the profile has a figure for.

    Raises:
        BadInput: none.
    """
    usable = [target for target in targets if profile.backend_for(target.runtime) is not None]
    if not usable:
        raise BadInput(
            f"the profile has no figure for {', '.join(sorted({t.runtime for t in targets}))}",
            where=profile.name,
            remedy="choose another --runtime or quantisation",
        )
    return usable


def kv_bytes(shape: ModelShape, target: Target, context: int) -> int:
    """Bytes of the key/value cache in the target's runtime: float32 in ONNX Runtime, F16 in llama.cpp."""
    return shape.kv_cache_bytes(context, bytes_per_value=4.0 if target.runtime == "onnxruntime" else 2.0)


def candidate_of(
    plan: PrunePlan | WidthPlan, dense: ModelShape, target: Target, profile: DeviceProfile, budget: Budget
) -> Candidate:
    """The candidate of a plan and a target, with its predicted cost and what of the budget that breaks."""
    after = plan.shape_after(dense)
    cost = cost_of(after, target, profile, budget)
    usual = target.format.fallbacks(dense, target.quantisation)
    notes = tuple(note for note in target.format.fallbacks(after, target.quantisation) if note not in usual)
    reasons = tuple(judge(cost, budget, profile))
    doubtful = bool(reasons) and not judge(cost, budget, profile, hopeful=True)
    return Candidate(plan, target, after, cost, reasons, doubtful, notes)


def cost_of(
    shape: ModelShape,
    target: Target,
    profile: DeviceProfile,
    budget: Budget,
    *,
    threads: int | None = None,
    depth: int = DEFAULT_DEPTH,
) -> Cost:
    """Predicted cost of a model of `shape` exported to `target`; `threads` and `depth` as `cost.predict` has them.

    Raises:
        BadInput: the profile has no figure for the target's runtime.
    """
    parts = target.format.parts(shape, target.quantisation)
    weights = sum(parts.values())
    return predict(
        profile,
        runtime=target.runtime,
        vocab=shape.vocab,
        bytes_per_token=bytes_read_per_token(parts, tied=shape.tied, vocab=shape.vocab),
        n_layers=len(shape.layers),
        weights_bytes=weights,
        kv_bytes=kv_bytes(shape, target, budget.context),
        repack_bytes=target.format.repacked(shape, target.quantisation, profile.cpu.isa),
        threads=threads,
        context=budget.context,
        depth=depth,
        parameters=shape.parameters,
        quantisation=target.mixture,
        types=target.format.types(shape, target.quantisation),
        head_bytes=parts["embedding" if shape.tied else "head"],
        gpu_memory_mib=budget.max_memory_mib,
    )


def candidates_for(
    shape: ModelShape,
    plan_for: PlanFor,
    targets: Sequence[Target],
    profile: DeviceProfile,
    budget: Budget,
    *,
    ratios: Sequence[float] = RATIOS,
) -> list[Candidate]:
    """Every ratio with every target, dense first; those that do not fit say why.

    A candidate's notes tell which tensors pruning costs their type. Targets of a runtime the profile has no figure for
    are left out. A ratio that heads and neurons cannot reach, or that rounds to a plan already there, is skipped.

    Raises:
        BadInput: no target is left.
    """
    found: list[Candidate] = []
    for target in usable_targets(targets, profile):
        seen = set()
        for ratio, scope in itertools.product(sorted({0.0, *ratios}), SCOPES):
            try:
                plan = plan_for(ratio, target.format.alignment(target.quantisation), scope)
            except BadInput:
                continue  # out of reach of what the scope may remove
            after = plan.shape_after(shape)
            if after.layers in seen:
                continue
            seen.add(after.layers)
            found.append(candidate_of(plan, shape, target, profile, budget))
    return found


def worth_measuring(candidates: Sequence[Candidate], limit: int, *, at_hand: bool = False) -> list[Candidate]:
    """The candidates whose quality must be measured to choose, at most `limit`, and dense as a baseline.

    Of one target and scope, a less pruned model is the better one, so only the least pruned that fits can win. They
    are ordered by how little is removed, then by bits kept: removing costs more than rounding. This is an order of
    search, not a figure: the choice is by measured quality. Each runtime keeps at least its first. Where dense fits
    nowhere, its fastest version is measured all the same, last: it shows what quantisation alone would have cost.

    Where the device is `at_hand`, measuring settles what the prediction leaves in doubt: the least pruned that may fit
    is measured beside the least pruned that is predicted to.
    """
    first: dict[tuple[str, Scope, bool], Candidate] = {}
    all_heads = max(sum(layer.heads for layer in candidate.shape.layers) for candidate in candidates)
    for candidate in sorted(candidates, key=lambda c: c.plan.reached_ratio):
        if candidate.fits or (at_hand and candidate.doubtful):
            # What keeps every head, dense too, is a plan of either scope.
            scopes: set[Scope] = {candidate.plan.scope}
            if sum(layer.heads for layer in candidate.shape.layers) == all_heads:
                scopes.add("mlp")
            for scope in scopes:
                first.setdefault((candidate.target.quantisation, scope, candidate.doubtful), candidate)
    unique = {id(candidate): candidate for candidate in first.values()}
    ordered = sorted(unique.values(), key=lambda c: (c.plan.reached_ratio, -c.cost.file_mib))
    chosen = ordered[:limit]
    for runtime in {c.target.runtime for c in ordered} - {c.target.runtime for c in chosen}:
        chosen[-1:] = [next(c for c in ordered if c.target.runtime == runtime)]
    dense = [c for c in candidates if c.dense]
    if chosen and dense and not any(c.dense for c in chosen):
        chosen.append(max(dense, key=lambda c: c.cost.decode_tps.value))
    return chosen


def nearest_miss(candidates: Sequence[Candidate]) -> Candidate:
    """Of candidates none of which fits, the one that breaks the fewest limits, and is fastest among those."""
    return min(candidates, key=lambda c: (len(c.reasons), -c.cost.decode_tps.value))
