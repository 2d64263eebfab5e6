"""From the damage table and a device's budget to the candidates that deserve to be made: arithmetic only.

For each target the plan of least damage within the budget is found by `allocation`; which targets are worth an export
is told by the sum of two figures: the plan's predicted damage, and what the target's rounding alone costs the dense
model, which is measured. The choice among those made is by measured quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeprune.allocation import Options, allocate
from edgeprune.candidates import Candidate, candidate_of, cost_of, kv_bytes, usable_targets
from edgeprune.cost import DEFAULT_DEPTH, MIB, OVERHEAD_MIB, bytes_allowed, bytes_read_per_token, judge
from edgeprune.damage import DamageTable
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import NothingFits
from edgeprune.knapsack import Group
from edgeprune.plan import WidthPlan, keep_all
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.targets import Target

if TYPE_CHECKING:
    from edgeprune.vocabulary_damage import VocabularyOption

Array = NDArray[np.float64]

METHOD = "obs"
# Nats a token from which on a model says something else than the dense one two times out of three: nobody ships that,
# and to make it takes minutes.
HOPELESS = 1.5
# What is expected to lose so much more than the best is not made: sums of damage and rounding were 12 to 16 % above
# what was measured of four files of SmolLM2-135M, but their ratios were off by 1 % only.
_MARGIN = 1.1
_ROUNDS = 10  # of the integer program
_CLOSE = 5e-4  # of a limit: what fits and leaves no more than that is good enough
_LEAST_STEP = 1e-3  # of the limits, where a plan within them does not fit; doubled each time


def sizes(shape: ModelShape, target: Target, profile: DeviceProfile, budget: Budget) -> Array:
    """What a model of `shape` needs: bytes read a token, bytes in memory, bytes of file, (3,)."""
    parts = target.format.parts(shape, target.quantisation)
    weights = sum(parts.values())
    cache = kv_bytes(shape, target, budget.context)
    cached = cache * min(DEFAULT_DEPTH, budget.context) / budget.context
    read = bytes_read_per_token(parts, tied=shape.tied, vocab=shape.vocab) + cached
    on_cpu = profile.backend_for(target.runtime) == "cpu"
    copied = target.format.repacked(shape, target.quantisation, profile.cpu.isa) if on_cpu else 0
    return np.array([read, weights + cache + copied, weights], np.float64)


def limits(shape: ModelShape, target: Target, profile: DeviceProfile, budget: Budget) -> Array:
    """The most that `sizes` may be on the device, by the middle of its figures, (3,); inf where there is no limit."""
    read = held = file = np.inf
    if budget.min_tokens_per_s is not None:
        read = bytes_allowed(
            profile,
            target.runtime,
            len(shape.layers),
            budget.min_tokens_per_s,
            target.mixture,
            target.format.types(shape, target.quantisation),
            budget.max_memory_mib,
        )
    on_cpu = profile.backend_for(target.runtime) == "cpu"
    own = profile.beside if profile.beside and on_cpu else profile.memory
    memory = min(own.usable_mib, budget.max_memory_mib or np.inf)
    if profile.beside and target.runtime == "llamacpp" and not on_cpu:
        memory += profile.beside.usable_mib
    held = (memory - OVERHEAD_MIB[target.runtime].value) * MIB
    if budget.max_file_mib is not None:
        file = budget.max_file_mib * MIB
    return np.array([read, held, file], np.float64)


def best_plan(
    table: DamageTable,
    shape: ModelShape,
    target: Target,
    profile: DeviceProfile,
    budget: Budget,
    *,
    uniform: bool,
    vocabulary: Sequence[VocabularyOption] = (),
) -> WidthPlan:
    """The plan of least predicted damage with which `target` meets the budget.

    Args:
        uniform: all layers alike.
        vocabulary: numbers of tokens to choose among; none: all stay.

    Raises:
        NothingFits: no widths meet it.
    """
    most = limits(shape, target, profile, budget)
    align = target.format.alignment(target.quantisation)

    def fits(after: ModelShape) -> bool:
        return not judge(cost_of(after, target, profile, budget), budget, profile)

    def sizes_of(after: ModelShape) -> Array:
        return sizes(after, target, profile, budget)

    def needs(after: ModelShape) -> Array:
        found = sizes_of(after)
        if budget.min_tokens_per_s is not None:
            slower = budget.min_tokens_per_s / cost_of(after, target, profile, budget).decode_tps.value
            found[0] = most[0] * slower
        return found

    if uniform:
        layers, tokens = uniform_widths(table, shape, align, fits, vocabulary)
    else:
        layers, tokens = per_layer_widths(table, shape, sizes_of, needs, most, align, fits, vocabulary)
    lost = next((option.damage for option in vocabulary if option.size == tokens), 0.0)
    plan = WidthPlan(
        layers, METHOD, 0.0, 0.0, table.damage(layers) + lost, vocabulary=tokens if tokens != shape.vocab else None
    )
    reached = 1 - plan.shape_after(shape).parameters / shape.parameters
    return replace(plan, asked_ratio=reached, reached_ratio=reached)


Sizes = Callable[[ModelShape], Array]
Fits = Callable[[ModelShape], bool]


@dataclass(frozen=True)
class _Halves:
    """What the halves of a layer add to `sizes`: the mean over all layers, since mixtures give some of them more bits.

    A layer that has attention and no MLP may cost more than the attention, where the file's graph needs an MLP of zeros
    there: that is what no neurons cost.
    """

    shape: ModelShape
    sizes_of: Sizes
    limited: NDArray[np.bool_]
    align: int
    known: dict[tuple[int, ...], Array] = field(default_factory=dict)

    @cached_property
    def whole(self) -> Array:
        return self._of(self.shape)

    @cached_property
    def fixed(self) -> Array:
        """What is there without any layer."""
        dense = self.shape.layers[0]
        return self.whole - self._count * (self.attention(dense.heads, dense.kv_heads) + self.mlp(dense.neurons))

    @property
    def _count(self) -> int:
        return len(self.shape.layers)

    def attention(self, heads: int, kv_heads: int) -> Array:
        neurons = self.shape.layers[0].neurons
        return (self._alike(heads, kv_heads, neurons) - self._alike(0, 0, neurons)) / self._count

    def mlp(self, neurons: int) -> Array:
        dense = self.shape.layers[0]
        heads = (dense.heads, dense.kv_heads)
        if neurons:
            return (self._alike(*heads, neurons) - self._alike(*heads, 0)) / self._count
        return self.mlp(self.align) + self._one(*heads, 0) - self._one(*heads, self.align)

    def tokens(self, shapes: Sequence[ModelShape]) -> Array:
        """What models with other vocabularies add, (models, sizes)."""
        return np.array([self._of(each) - self.whole for each in shapes])

    def total(self, layers: Sequence[LayerShape]) -> Array:
        return self.fixed + sum(self.attention(each.heads, each.kv_heads) + self.mlp(each.neurons) for each in layers)

    def _of(self, shape: ModelShape) -> Array:
        return self.sizes_of(shape)[self.limited]

    def _alike(self, *widths: int) -> Array:
        if widths not in self.known:
            self.known[widths] = self._of(self.shape.with_layers((LayerShape(*widths),) * self._count))
        return self.known[widths]

    def _one(self, *widths: int) -> Array:
        layers = list(self.shape.layers)
        layers[self._count // 2] = LayerShape(*widths)
        return self._of(self.shape.with_layers(tuple(layers)))


def per_layer_widths(
    table: DamageTable,
    shape: ModelShape,
    sizes_of: Sizes,
    needs: Sizes,
    most: Array,
    align: int,
    fits: Fits,
    vocabulary: Sequence[VocabularyOption] = (),
) -> tuple[tuple[LayerShape, ...], int]:
    """Widths of each layer and the number of tokens, by mixed-integer programming.

    That sizes add up is nearly true. So the whole is checked, and the program asked again with as much more or less as
    the plan before leaves or lacks; where that leads nowhere, since a model that a GPU has no room for is slower at a
    stroke, by halving. The best of the plans that fit is taken.

    Args:
        sizes_of: what a model needs, roughly.
        needs: the same as the device's figures have it, which `most` bounds.
        fits: whether a model meets the budget.
    """
    limited = np.isfinite(most)
    halves = _Halves(shape, sizes_of, limited, align)
    shapes = [replace(shape, vocab=option.size) for option in vocabulary] or [shape]
    tokens = Group(np.array([option.damage for option in vocabulary] or [0.0]), halves.tokens(shapes))
    options = Options(align=align, heads=not shape.fixed_heads)
    best: tuple[float, tuple[LayerShape, ...], int] | None = None
    room, scale = most[limited] - halves.fixed, _Scale()
    for _ in range(_ROUNDS):
        try:
            layers, index = allocate(
                table,
                shape,
                halves.attention,
                halves.mlp,
                (room + (scale.value - 1) * most[limited]).tolist(),
                options,
                tokens,
            )
        except NothingFits:
            break
        after = shapes[index].with_layers(layers)
        fitting, needed = fits(after), needs(after)[limited]
        damage = table.damage(layers) + float(tokens.damages[index])
        if fitting and (best is None or damage < best[0]):
            best = (damage, layers, after.vocab)
        if not scale.tried:  # what adding up was wrong of the first plan it is of others like it
            room = room - (needed - halves.total(layers) - tokens.costs[index])
        if scale.settled(fitting, float((needed / most[limited]).max(initial=0.0))):
            break
    if best is None:
        raise NothingFits("no choice of widths meets the budget", remedy="relax it, or take a smaller model")
    return best[1:]


@dataclass
class _Scale:
    """The share of the limits that the program is given, found by what its plans need of them."""

    value: float = 1.0
    tried: bool = False
    fits: float | None = None  # the largest share whose plan fits
    fails: float | None = None  # the smallest whose plan does not
    step: float = _LEAST_STEP

    def settled(self, fitting: bool, need: float) -> bool:
        """Choose the next share, by whether the plan of this one fits and what part of the limits it needs.

        Returns:
            True if another plan would be no better.
        """
        if fitting and need >= 1 - _CLOSE:
            return True
        if not self.tried:
            self.tried = True
            return False
        if fitting:
            self.fits = self.value
        else:
            self.fails = self.value
        value = self.value + 1 - need
        if self.fits is not None and self.fails is not None:
            self.value = value if self.fits < value < self.fails else (self.fits + self.fails) / 2
            return self.fails - self.fits < _CLOSE
        if self.fails is not None and value >= self.fails:
            value, self.step = self.fails - self.step, 2 * self.step
        self.value = value
        return False


def uniform_widths(
    table: DamageTable, shape: ModelShape, align: int, fits: Fits, vocabulary: Sequence[VocabularyOption] = ()
) -> tuple[tuple[LayerShape, ...], int]:
    """One width for all layers, and the number of tokens: of all that fit, those of least predicted damage.

    Raises:
        NothingFits: none fit.
    """
    dense, count = shape.layers[0], len(shape.layers)
    widths = sorted({dense.neurons, *range(align, dense.neurons, align)}, reverse=True)
    found: list[tuple[float, tuple[LayerShape, ...], int]] = []
    for size, damage in [(option.size, option.damage) for option in vocabulary] or [(shape.vocab, 0.0)]:
        left = replace(shape, vocab=size)
        for option in table.attention[0]:
            if not option.heads or (shape.fixed_heads and option.heads != dense.heads):
                continue
            # Narrower ones fit too, and lose more.
            alike = ((LayerShape(option.heads, option.kv_heads, neurons),) * count for neurons in widths)
            if widest := next((layers for layers in alike if fits(left.with_layers(layers))), None):
                found.append((damage + table.damage(widest), widest, size))
    if not found:
        raise NothingFits("no width for all layers meets the budget", remedy="relax it, or allow per-layer widths")
    _, layers, size = min(found, key=lambda each: each[0])
    return layers, size


def dense_candidates(
    shape: ModelShape, targets: Sequence[Target], profile: DeviceProfile, budget: Budget, model_hash: str = ""
) -> list[Candidate]:
    """The dense model with every target the device can run.

    Raises:
        BadInput: there is none.
    """
    plan = keep_all(shape, model_hash=model_hash)
    return [candidate_of(plan, shape, target, profile, budget) for target in usable_targets(targets, profile)]


def pruned_candidates(
    table: DamageTable,
    shape: ModelShape,
    tried: Sequence[Candidate],
    profile: DeviceProfile,
    budget: Budget,
    *,
    asked: Mapping[str, Budget] | None = None,
    uniform: bool,
    vocabulary: Sequence[VocabularyOption] = (),
    corpus: str = "",
) -> list[Candidate]:
    """For every target with which the dense model does not fit, the least damaged plan with which it does.

    A target that carries no widths of each layer's own, for this family, gets a uniform plan.

    Args:
        tried: the dense model, or earlier plans; of one that fits, only a plan of clearly less damage is made again.
        asked: name of a target -> what its prediction has to meet, where that is known to differ from `budget`.
        uniform: all layers alike, whatever the target.
        vocabulary: numbers of tokens to choose among; none: all stay.
        corpus: SHA-256 of the text on which the tokens to keep are counted.
    """
    found = []
    for candidate in tried:
        if candidate.fits and candidate.dense:
            continue
        budget_here = (asked or {}).get(str(candidate.target), budget)
        alike = uniform or not candidate.target.format.per_layer(shape)
        try:
            plan = best_plan(table, shape, candidate.target, profile, budget_here, uniform=alike, vocabulary=vocabulary)
        except NothingFits:
            continue
        if plan.reached_ratio == 0:  # the dense model, of which is known that it does not fit
            continue
        if candidate.fits and isinstance(candidate.plan, WidthPlan) and plan.damage * _MARGIN > candidate.plan.damage:
            continue
        if plan.vocabulary:
            plan = replace(plan, corpus=corpus)
        made = candidate_of(plan, shape, candidate.target, profile, budget_here)
        if alike and not uniform:
            note = f"all layers alike: {candidate.target.format.name} holds no others of family {shape.family.name}"
            made = replace(made, notes=(note, *made.notes))
        found.append(made)
    return found


def worth_making(
    pruned: Sequence[Candidate], rounding: Mapping[str, float], limit: int, *, best: float = float("inf")
) -> list[Candidate]:
    """Which of the pruned candidates to make and measure, at most `limit`, least expected damage first.

    Args:
        rounding: name of a target -> measured KL that its rounding alone costs the dense model, nats per token.
        limit: at most so many, but the best of each runtime is among them where it is any good (`HOPELESS`).
        best: measured loss of the best candidate that fits; what is expected to be worse cannot win.
    """

    def expected(candidate: Candidate) -> float:
        assert isinstance(candidate.plan, WidthPlan)
        return candidate.plan.damage + rounding.get(str(candidate.target), float("inf"))

    ordered = sorted((c for c in pruned if expected(c) < best), key=expected)
    chosen = [c for c in ordered[:limit] if expected(c) <= _MARGIN * expected(ordered[0])]
    for runtime in {c.target.runtime for c in ordered} - {c.target.runtime for c in chosen}:
        first = next(c for c in ordered if c.target.runtime == runtime)
        if expected(first) < HOPELESS:
            chosen.append(first)
    return chosen
