"""The prune plan: what every layer keeps. Made from scores by arithmetic, saved as JSON, applied later.

No torch: scores come in as sequences of numbers, so a plan can be made, read and counted anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.files import read_json, write_json
from edgeprune.per_layer import check_layers
from edgeprune.shape import LayerShape, ModelShape

SCHEMA_VERSION = 1

Array = NDArray[np.float64]

# What a uniform plan takes from: heads and neurons in equal shares, as published, or neurons alone. With few key/value
# groups a step of heads is large (a third of them on a model with three groups), and neurons alone can be better.
Scope = Literal["both", "mlp"]
SCOPES: tuple[Scope, ...] = ("both", "mlp")


def scopes_of(shape: ModelShape) -> tuple[Scope, ...]:
    """The scopes that a uniform plan of `shape` can have: "mlp" alone where heads stay."""
    return ("mlp",) if shape.fixed_heads else SCOPES


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: indices into the dense layer, ascending.

    No heads and no key/value heads: the layer has no attention; no neurons: no MLP.
    """

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]  # query heads, grouped as their key/value heads are
    neurons: tuple[int, ...]

    @property
    def widths(self) -> LayerShape:
        """The widths that are left."""
        return LayerShape(len(self.heads), len(self.kv_heads), len(self.neurons))


@dataclass(frozen=True)
class PrunePlan:
    """What a whole model keeps, and where that came from."""

    layers: tuple[LayerPlan, ...]
    method: str
    asked_ratio: float  # of all parameters of the dense model
    reached_ratio: float
    model_hash: str
    text_hash: str
    scope: Scope = "both"

    def shape_after(self, shape: ModelShape) -> ModelShape:
        """The pruned model's shape; `shape` is the dense one."""
        return shape.with_layers(tuple(layer.widths for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, shape: ModelShape) -> PrunePlan:
        """Read a plan and check it against the dense model it is for.

        Raises:
            BadInput: no plan, or one that does not fit `shape`.
        """
        value = read_json(path)
        if value.pop("schema_version", None) != SCHEMA_VERSION:
            raise BadInput("not a prune plan of this version", where=path, remedy="make the plan again")
        try:
            layers = tuple(LayerPlan(**{k: tuple(v) for k, v in layer.items()}) for layer in value.pop("layers"))
            plan = cls(layers=layers, **value)
            if plan.scope not in SCOPES:
                raise ValueError(f"scope {plan.scope!r}")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise BadInput(f"not a prune plan ({error})", where=path, remedy="make the plan again") from error
        check(plan, shape, where=path)
        return plan


@dataclass(frozen=True)
class WidthPlan:
    """How wide every layer becomes, and how many tokens stay. Which ones is found when the weights are compensated."""

    layers: tuple[LayerShape, ...]
    method: str
    asked_ratio: float  # of all parameters of the dense model
    reached_ratio: float
    damage: float  # predicted, nats per token
    scope: Scope = "both"
    vocabulary: int | None = None  # rows of the embedding; None: as many as before
    corpus: str = ""  # SHA-256 of the text on which the tokens to keep are counted, where some go

    def shape_after(self, shape: ModelShape) -> ModelShape:
        """The pruned model's shape; `shape` is the dense one. Its ids of special tokens are still the dense ones."""
        return replace(shape.with_layers(self.layers), vocab=self.vocabulary or shape.vocab)


def check(plan: PrunePlan, shape: ModelShape, *, where: object = "plan") -> None:
    """Check that `plan` can be applied to a model of `shape`.

    Raises:
        BadInput: another number of layers, indices out of order or range, or query heads that leave the key/value
            groups unequal, or as `per_layer.check_layers`.
    """
    if len(plan.layers) != len(shape.layers):
        raise BadInput(f"{len(plan.layers)} layers for a model of {len(shape.layers)}", where=where)
    for index, (layer, dense) in enumerate(zip(plan.layers, shape.layers, strict=True)):
        kept = {"kv_heads": dense.kv_heads, "heads": dense.heads, "neurons": dense.neurons}
        for name, width in kept.items():
            indices = getattr(layer, name)
            whole = all(type(i) is int for i in indices)
            if (
                not whole
                or sorted(set(indices)) != list(indices)
                or (indices and not 0 <= indices[0] <= indices[-1] < width)
            ):
                raise BadInput(f"layer {index}: {name} must be ascending indices below {width}", where=where)
        if not layer.heads and not layer.kv_heads:
            continue
        group = dense.heads // dense.kv_heads
        owners = [head // group for head in layer.heads]
        counts = {owners.count(kv) for kv in layer.kv_heads}
        if set(owners) != set(layer.kv_heads) or len(counts) != 1:
            raise BadInput(f"layer {index}: every key/value head kept must keep as many query heads", where=where)
    check_layers([layer.widths for layer in plan.layers], where=where)


def keep_all(shape: ModelShape, *, model_hash: str = "", text_hash: str = "") -> PrunePlan:
    """The plan that removes nothing."""
    layers = tuple(
        LayerPlan(tuple(range(w.kv_heads)), tuple(range(w.heads)), tuple(range(w.neurons))) for w in shape.layers
    )
    return PrunePlan(layers, "dense", 0.0, 0.0, model_hash, text_hash)


def top(scores: Array, keep: int) -> tuple[int, ...]:
    """Indices of the `keep` largest scores, ascending; of equal ones the first stay."""
    order = np.argsort(-scores, kind="stable")
    return tuple(np.sort(order[:keep]).tolist())


def keep_heads(scores: Array, dense: LayerShape, left: LayerShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which key/value heads and query heads stay in one layer.

    Each group loses its lowest heads, as many as every other, so that grouped-query attention still divides evenly;
    whole groups leave by the sum of the scores of the heads that they would keep.

    Args:
        scores: (heads,), importance of the query heads.
        dense: widths before.
        left: widths after; `heads` must be a multiple of `kv_heads`.
    """
    grouped = np.asarray(scores, dtype=np.float64).reshape(dense.kv_heads, -1)
    per_group = left.heads // left.kv_heads
    kv_heads = top(np.sort(grouped, axis=1)[:, -per_group:].sum(axis=1), left.kv_heads)
    heads = [kv * grouped.shape[1] + head for kv in kv_heads for head in top(grouped[kv], per_group)]
    return kv_heads, tuple(heads)


def head_options(dense: LayerShape) -> Iterator[tuple[int, int]]:
    """All (heads, kv_heads) that grouped-query attention can be left with."""
    for kv_heads, per_group in itertools.product(
        range(1, dense.kv_heads + 1), range(1, dense.heads // dense.kv_heads + 1)
    ):
        yield kv_heads * per_group, kv_heads


def _lost(scores: Array, kept: tuple[int, ...]) -> float:
    """Share of importance that leaves with what is not kept; scores shifted so that all are non-negative."""
    shifted = scores - min(0.0, float(scores.min()))
    total = float(shifted.sum())
    return 1.0 - float(shifted[list(kept)].sum()) / total if total else 0.0


def uniform_plan(
    shape: ModelShape,
    head_scores: Sequence[Array],
    neuron_scores: Sequence[Array],
    ratio: float,
    *,
    align: int = 1,
    scope: Scope = "both",
    method: str = "amp",
    model_hash: str = "",
    text_hash: str = "",
) -> PrunePlan:
    """AMP's uniform plan: the same share of heads and of neurons leaves every layer, lowest scores first.

    `ratio` is counted in all parameters of the model. Heads come in coarse steps under grouped-query attention, so
    they take the step nearest to the share, and the neurons (rounded to `align`) make up the exact number: this is
    the correction between heads and neurons, in parameters. Of head steps equally near (a head of each group, or a
    whole group) the one that loses least importance is taken.

    Args:
        shape: the dense model; all layers alike.
        head_scores: a layer: (heads,).
        neuron_scores: a layer: (neurons,).
        ratio: share of all parameters to remove, in [0, 1).
        align: the number of neurons kept is a multiple of this.
        scope: "both", or "mlp" to keep every head. Models with `fixed_heads` keep them in either scope, and the
            plan says "mlp"; the neurons alone then make up the ratio.

    Raises:
        BadInput: a ratio outside what heads and neurons together can reach, layers that differ, or an alignment
            wider than the layer.
    """
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"ratio {ratio} is not in [0, 1)")
    if ratio == 0.0:  # which any model allows
        return keep_all(shape, model_hash=model_hash, text_hash=text_hash)
    if not shape.uniform:
        raise BadInput("a uniform plan needs a model whose layers are alike")
    if scope not in scopes_of(shape):
        scope = "mlp"
    dense = shape.layers[0]
    if not 0 < align <= dense.neurons:
        raise BadInput(f"alignment {align} is not in 1…{dense.neurons}", remedy="choose a smaller --align")
    count = len(shape.layers)
    to_remove = ratio * shape.parameters / count  # parameters, in each layer
    blocks = shape.parameters - shape.embedding_parameters - shape.norm_parameters
    share = to_remove * count / blocks  # of each layer's heads and neurons
    per_neuron = shape.mlp_parameters(LayerShape(1, 1, 2)) - shape.mlp_parameters(LayerShape(1, 1, 1))

    def missed(left: LayerShape) -> tuple[float, float]:
        """How far a choice of widths is from the ratio, beyond a step, and from equal shares."""
        removed = (shape.parameters - shape.with_layers((left,) * count).parameters) / count
        steps_missed = abs(removed - to_remove) / (per_neuron * align)
        imbalance = abs((1 - left.heads / dense.heads) - share)
        return (steps_missed if steps_missed > 1.0 else 0.0, round(imbalance, 9))

    def lost(left: LayerShape) -> float:
        """Importance that a choice of widths loses, summed over the layers."""
        return sum(
            _lost(h, keep_heads(h, dense, left)[1]) + _lost(n, top(n, left.neurons))
            for h, n in zip(head_scores, neuron_scores, strict=True)
        )

    options = []
    for heads, kv_heads in head_options(dense) if scope == "both" else [(dense.heads, dense.kv_heads)]:
        saved = shape.attention_parameters(dense) - shape.attention_parameters(LayerShape(heads, kv_heads, 1))
        exact = dense.neurons - (to_remove - saved) / per_neuron
        aligned = min(max(round(exact / align), 1), dense.neurons // align) * align
        options.append(LayerShape(heads, kv_heads, dense.neurons if exact >= dense.neurons else aligned))
    least = min(missed(left) for left in options)
    left = min((left for left in options if missed(left) == least), key=lost)
    if least[0]:
        nearest = 1 - shape.with_layers((left,) * count).parameters / shape.parameters
        raise BadInput(
            f"ratio {ratio:.3f} is out of reach: heads and neurons leave in steps",
            remedy=f"the nearest that these widths reach is {nearest:.3f}"
            + (f"; family {shape.family.name} keeps its heads" if shape.fixed_heads else ""),
        )
    layers = tuple(
        LayerPlan(*keep_heads(h, dense, left), top(n, left.neurons))
        for h, n in zip(head_scores, neuron_scores, strict=True)
    )
    reached = 1 - shape.with_layers((left,) * count).parameters / shape.parameters
    return PrunePlan(layers, method, ratio, reached, model_hash, text_hash, scope)
