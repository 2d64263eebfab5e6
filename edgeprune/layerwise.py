"""Prunes a model layer after layer with least-squares compensation, one layer in memory beside the hidden states.

Two residual streams run side by side: the dense model's and the pruned one's. Each half of a layer (attention, MLP) is
run on both; what its projection reads on the pruned stream gives the second moments, and the target lies between what
that projection would say there ("own") and what brings the pruned stream back to the dense one ("stream"):

    own = W₀ᵀ x,    stream = y + (r - r̃)

with y the dense model's output of the projection and r, r̃ the dense and the pruned residual that it is added to. Errors
of earlier layers are so made up for by later ones. Where a norm follows the projection (Gemma), no output of it can
make up for r - r̃, and stream = y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgeprune.blocks import HALVES, Block, Half, LayeredModel, projection_role
from edgeprune.compensation import Moments, add_moments, mirrored, solve, token_weights
from edgeprune.elimination import Surgeon, choose_heads, eliminate, rows_of
from edgeprune.errors import BadInput
from edgeprune.files import disk_errors, preallocate
from edgeprune.plan import LayerPlan
from edgeprune.shape import LayerShape

_TOKENS_AT_ONCE = 2048
# Calibration tokens that a projection's old weights count as. SmolLM2-135M, a fifth pruned to the same widths on 16k
# tokens of C4 and Wikipedia, KL on WikiText-2 validation and other C4, nats a token, means of two sets: a ridge of 0.01
# 0.547 and 0.589, of 0.1 0.518 and 0.570. One of them alone: 0.01 0.562 and 0.587, 0.03 0.554 and 0.577, 0.1 0.531 and
# 0.567, 0.3 0.521 and 0.564. On 131k tokens it matters little: 0.01 0.437 and 0.508, 0.05 0.435 and 0.512. This many
# make 0.01 of 131k tokens and 0.08 of 16k.
_OLD_WEIGHTS_WORTH = 1311
_IN_MEMORY = 1 << 30  # bytes of one stream of hidden states; larger ones lie on disk


@dataclass(frozen=True)
class Compensation:
    """How kept weights take over what removed ones did.

    Attributes:
        ridge: λ of the damping towards the old weights, relative to each input's second moment.
        stream: share of the target that comes from the dense stream; the rest is the projection's own output.
        weighted: whether tokens are weighed by 1 / RMS² of the residual stream.
        solved: whether weights change at all; without, pruning only selects.
    """

    ridge: float = 0.01
    stream: float = 0.5
    weighted: bool = True
    solved: bool = True

    @classmethod
    def for_tokens(cls, tokens: int) -> Compensation:
        """What serves best on so many calibration tokens: the old weights count as much as a fixed number of them."""
        return cls(ridge=min(1.0, _OLD_WEIGHTS_WORTH / tokens))


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer.

    Attributes:
        plan: what it keeps.
        tensors: new weights (outputs, kept inputs) of its projections, by role, and biases (outputs,), by role and
            ".bias"; float32.
        error: Σ s ‖r̃ - r‖² / Σ s ‖r‖² of the residual after the layer, on the calibration text.
    """

    plan: LayerPlan
    tensors: dict[str, torch.Tensor]
    error: float


def widths_of(choice: LayerShape | LayerPlan) -> LayerShape:
    """The widths that a choice for a layer leaves, whether it names heads and neurons or not."""
    return choice.widths if isinstance(choice, LayerPlan) else choice


def packed(texts: Sequence[torch.Tensor], length: int, bos: int | None = None) -> torch.Tensor:
    """Texts, (length,) each, one after the other, cut into windows of `length`: (windows, length). The rest is dropped.

    Args:
        bos: a token that every window begins with, for a model that was never without; None: none.

    Raises:
        BadInput: not one window.
    """
    joined = torch.cat(list(texts)) if texts else torch.empty(0, dtype=torch.int64)
    room = length - (bos is not None)
    count = len(joined) // room if room else 0
    if not count:
        raise BadInput(f"{len(joined)} calibration tokens do not fill a window of {length}", remedy="give more text")
    windows = joined[: count * room].view(count, room)
    return windows if bos is None else torch.cat([windows.new_full((count, 1), bos), windows], dim=1)


def chunks(windows: int, length: int) -> Iterator[slice]:
    """Slices of windows of about `_TOKENS_AT_ONCE` tokens."""
    step = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


@dataclass
class Streams:
    """Residual streams of the dense and the pruned model, (windows, length, hidden) each, float32.

    What is as large as they are lies in files in `folder` where that is much; without one, always in memory.
    """

    dense: torch.Tensor
    pruned: torch.Tensor
    folder: Path | None = None

    def room(self, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An unfilled (windows, length, width), until one of the same name is asked for."""
        return _room((*self.dense.shape[:2], width), dtype, self.folder and self.folder / f"{name}.bin")

    def copy(self) -> Streams:
        """Both as they are now."""
        dense, pruned = (
            self.room(f"began-{name}", each.shape[-1], each.dtype).copy_(each)
            for name, each in (("dense", self.dense), ("pruned", self.pruned))
        )
        return Streams(dense, pruned, self.folder)


def run_half(
    block: Block,
    half: Half,
    streams: Streams,
    read: Streams,
    inner: torch.Tensor | None,
    how: Compensation | None,
) -> Moments | None:
    """Run one half of a layer on both streams; the dense stream is moved past it, the pruned one not yet.

    Args:
        streams: what the half adds to; `dense` is changed in place.
        read: what the half reads: `streams` itself, or in a parallel block what the layer began with.
        inner: receives the projection's input on the pruned stream, (windows, length, inputs). None where both streams
            are one, the dense one.
        how: None where nothing is to be pruned: then no moments are taken.

    Returns:
        The moments of the projection on the pruned stream, in units of the weighted energy of the dense stream after
        the half.
    """
    projection = block.projection(half)
    outputs, inputs = projection.weight.shape
    weight, constant = projection.weight.T, projection.bias is not None
    if constant:  # the bias is solved for as the weights of one more input, which is always 1
        weight, inputs = torch.cat([weight, projection.bias[None]]), inputs + 1
    gram = cross = torch.empty(0)
    if how:
        gram, cross = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs if how.stream else 0)
    scale = 0.0
    for part in chunks(*streams.dense.shape[:2]):
        own = block.inner(half, read.dense[part])
        said = projection(own).float()
        if inner is not None:
            own = inner[part] = block.inner(half, read.pruned[part])
        before = streams.dense[part].clone()
        added = block.added(half, said)
        streams.dense[part] += added
        if how is None:
            continue
        weights = _weights(streams.dense[part], said, added) if how.weighted else torch.ones(said.shape[:2])
        scale += float((weights * streams.dense[part].square().sum(-1)).sum())
        x = own.float().flatten(0, 1)
        if constant:
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        weighted = x * weights.flatten()[:, None]
        add_moments(gram, weighted, x, symmetric=True)
        if how.stream:
            target = said if block.normed_output else said + before - streams.pruned[part]
            add_moments(cross, weighted, target.flatten(0, 1))
    if how is None:
        return None
    return Moments(mirrored(gram), cross, weight, scale, own=1 - how.stream, constant=constant)


def _weights(residual: torch.Tensor, said: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Token weights for errors of the projection's output `said`, of which `added` reaches the residual stream.

    A norm between the two scales an error of `said` as it scales `said` itself.
    """
    gain = 1.0 if added is said else added.square().sum(-1) / said.square().sum(-1).clamp_min(1e-30)
    return gain / residual.square().mean(-1).clamp_min(1e-30)


def after_half(
    block: Block,
    half: Half,
    residual: torch.Tensor,
    inner: torch.Tensor,
    kept: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The residual stream past a half, (windows, length, hidden).

    Args:
        residual: what the half adds to.
        inner: its projection's input, all of it, (windows, length, inputs).
        kept: the inputs that the projection keeps; None: all.
        weight: the weights that it has for them, (outputs, kept), with its bias, if it has one, as one column more;
            None: its own.
    """
    projection = block.projection(half)
    weight, bias = (projection.weight, projection.bias) if weight is None else split_bias(projection, weight)
    said = ((inner if kept is None else inner[..., kept]) @ weight.to(inner.dtype).T).float()
    return residual + block.added(half, said if bias is None else said + bias.float())


def split_bias(projection: torch.nn.Linear, solved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compensated weights of a projection and its bias, where it has one: that is their last column."""
    return (solved, None) if projection.bias is None else (solved[:, :-1], solved[:, -1])


@torch.inference_mode()
def prune_layer(
    block: Block,
    index: int,
    dense: LayerShape,
    choice: LayerShape | LayerPlan,
    head_dim: int,
    streams: Streams,
    how: Compensation,
) -> PrunedLayer:
    """Prune one layer and move both streams past it.

    Args:
        dense: its widths.
        choice: widths to leave, for which the best heads and neurons are found; or just which stay.

    Raises:
        StageFailed: second moments that cannot be solved with.
    """
    widths = widths_of(choice)
    began = streams.copy() if block.family.parallel else streams
    plan = LayerPlan(tuple(range(dense.kv_heads)), tuple(range(dense.heads)), tuple(range(dense.neurons)))
    tensors: dict[str, torch.Tensor] = {}
    for half in HALVES:
        what = f"{half} of layer {index}"
        projection = block.projection(half)
        inner = streams.room("inner", projection.in_features, projection.weight.dtype)
        left = replace(dense, neurons=widths.neurons) if half == "mlp" else replace(widths, neurons=dense.neurons)
        gone = not (left.neurons if half == "mlp" else left.heads)
        moments = run_half(block, half, streams, began, inner, None if left == dense or gone else how)
        if gone:
            plan = replace(plan, **({"neurons": ()} if half == "mlp" else {"heads": (), "kv_heads": ()}))
            continue
        kept = weight = None
        if moments is not None:
            plan, weight = _chosen(plan, half, moments, dense, left, choice, head_dim, how, what)
            del moments  # the largest of all
            kept = torch.tensor(plan.neurons) if half == "mlp" else rows_of(plan.heads, head_dim)
            if not how.solved:
                own = projection.weight[:, kept].float()
                weight = own if projection.bias is None else torch.cat([own, projection.bias[:, None].float()], dim=1)
            tensors[projection_role(half)], bias = split_bias(projection, weight)
            if bias is not None:
                tensors[f"{projection_role(half)}.bias"] = bias
        for part in chunks(*streams.pruned.shape[:2]):
            streams.pruned[part] = after_half(block, half, streams.pruned[part], inner[part], kept, weight)
    return PrunedLayer(plan, tensors, _distance(streams))


def _chosen(
    plan: LayerPlan,
    half: Half,
    moments: Moments,
    dense: LayerShape,
    left: LayerShape,
    choice: LayerShape | LayerPlan,
    head_dim: int,
    how: Compensation,
    what: str,
) -> tuple[LayerPlan, torch.Tensor]:
    """`plan` with what a half keeps, and the compensated weights of its projection."""
    if isinstance(choice, LayerPlan):
        if half == "mlp":
            plan, kept = replace(plan, neurons=choice.neurons), torch.tensor(choice.neurons)
        else:
            plan, kept = replace(plan, heads=choice.heads, kv_heads=choice.kv_heads), rows_of(choice.heads, head_dim)
        return plan, solve(moments, kept, how.ridge, what=what)
    if half == "mlp":
        found = eliminate(moments, how.ridge, widths=[left.neurons], what=what)
        return replace(plan, neurons=tuple(found.kept(left.neurons).tolist())), found.weights[left.neurons]
    heads = choose_heads(Surgeon(moments, how.ridge, what=what), dense, left, head_dim)
    return replace(plan, heads=heads.heads, kv_heads=heads.kv_heads), heads.weights


def _distance(streams: Streams) -> float:
    """Weighted energy of the difference of the streams over that of the dense one."""
    difference = energy = 0.0
    for part in chunks(*streams.dense.shape[:2]):
        weights = token_weights(streams.dense[part])
        difference += float((weights * (streams.pruned[part] - streams.dense[part]).square().sum(-1)).sum())
        energy += float((weights * streams.dense[part].square().sum(-1)).sum())
    return difference / energy


def prune_layers(
    model: LayeredModel,
    streams: Streams,
    choices: Sequence[LayerShape | LayerPlan],
    how: Compensation,
    *,
    start: int = 0,
) -> Iterator[PrunedLayer]:
    """Prune a model layer after layer, from layer `start` on.

    Args:
        streams: hidden states before layer `start`; moved along.
        choices: for each layer of the model the widths to leave, or just which heads and neurons.

    Yields:
        What became of each layer, in order; `streams` is then behind it.
    """
    for index in range(start, len(choices)):
        layer = model.shape.layers[index]
        yield prune_layer(model.block(index), index, layer, choices[index], model.shape.head_dim, streams, how)


def start_streams(model: LayeredModel, ids: torch.Tensor, folder: Path) -> Streams:
    """Both streams before the first layer, on `ids`, (windows, length); large ones lie in files in `folder`."""
    shape = (*ids.shape, model.shape.hidden)
    dense, pruned = (_room(shape, torch.float32, folder / f"{name}.bin") for name in ("dense", "pruned"))
    return Streams(model.embed(ids, dense), pruned.copy_(dense), folder)


def _room(shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> torch.Tensor:
    """An unfilled tensor, in memory or, where it is large and there is a path for it, in a file mapped into memory.

    Raises:
        BadInput: a full disk.
    """
    size = math.prod(shape)
    n_bytes = size * dtype.itemsize
    if path is None or n_bytes <= _IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    path.unlink(missing_ok=True)
    with disk_errors(path.parent):
        preallocate(path, n_bytes)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
