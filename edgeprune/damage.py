"""The damage table: what narrowing one half of one layer costs, with everything else dense, measured once.

The damage of an option (a layer's query and key/value heads, or its MLP width) is the KL divergence of the model's
next-token distributions to the dense model's, in nats per token, on text that the compensation has not seen, after the
half's projection has been re-solved by least squares. Neither a device nor a budget is in it: any of them is a choice
from the same table (`allocation`), with no further forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.blocks import HALVES, Block, Half, Head, LayeredModel
from edgeprune.compensation import Moments
from edgeprune.elimination import Surgeon, choose_heads, eliminate, rows_of
from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import read_json, write_json
from edgeprune.layerwise import Compensation, Streams, after_half, run_half
from edgeprune.plan import head_options
from edgeprune.shape import LayerShape

SCHEMA_VERSION = 2
# Shares of the MLP at which the KL is measured; between them it is interpolated along the loss of the least squares.
MEASURED_SHARES = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 6, 0.0)

# Of a larger vocabulary so many tokens stand for all: the head would take a third of the table's time on SmolLM2-135M,
# two thirds on Gemma 3 270M, and damages of either come out within 2 and 4 %, less than another text would change them.
JUDGED_TOKENS = 8192

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadOption:
    """Heads left in a layer, and what that costs in nats per token."""

    heads: int
    kv_heads: int
    damage: float


@dataclass(frozen=True)
class WidthOption:
    """Neurons left in a layer, what that costs in nats per token, and the least squares' relative loss."""

    neurons: int
    damage: float
    loss: float


@dataclass(frozen=True)
class DamageTable:
    """Damages of every layer's options; the dense widths are the first of each, at no damage.

    `mlp` holds the widths that were measured, `losses` of each layer the least squares' relative loss at 0, 1, 2 …
    neurons, along which all other widths are interpolated.
    """

    attention: tuple[tuple[HeadOption, ...], ...]
    mlp: tuple[tuple[WidthOption, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    model_hash: str
    text_hash: str

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> DamageTable:
        """Read what `save` wrote.

        Raises:
            BadInput: not a table of this version.
        """
        value: dict[str, Any] = read_json(path)
        if value.pop("schema_version", None) != SCHEMA_VERSION:
            raise BadInput("not a damage table of this version", where=path, remedy="delete it; it is measured again")
        try:
            return cls(
                attention=tuple(tuple(HeadOption(**o) for o in layer) for layer in value.pop("attention")),
                mlp=tuple(tuple(WidthOption(**o) for o in layer) for layer in value.pop("mlp")),
                losses=tuple(tuple(layer) for layer in value.pop("losses")),
                **value,
            )
        except (TypeError, KeyError, ValueError) as error:
            raise BadInput(f"not a damage table ({error})", where=path, remedy="delete it") from error

    def damage(self, layers: Sequence[LayerShape]) -> float:
        """The predicted damage of these widths together: those of all halves of all layers, added up."""
        return sum(
            self.head_damage(i, layer.heads, layer.kv_heads) + self.mlp_damage(i, layer.neurons)
            for i, layer in enumerate(layers)
        )

    def head_damage(self, layer: int, heads: int, kv_heads: int) -> float:
        """The damage of leaving so many heads in a layer."""
        return next(o.damage for o in self.attention[layer] if (o.heads, o.kv_heads) == (heads, kv_heads))

    def mlp_damage(self, layer: int, neurons: int) -> float:
        """The damage at any width: between two measured widths it follows the least squares' loss."""
        options = sorted(self.mlp[layer], key=lambda option: option.loss)
        loss = self.losses[layer][neurons]
        return float(np.interp(loss, [o.loss for o in options], np.maximum.accumulate([o.damage for o in options])))


@dataclass(frozen=True)
class Reference:
    """The dense model's next-token distributions: what changed models are compared with, in as few passes as may be.

    Attributes:
        probabilities: (tokens, vocabulary), float32.
        negative_entropy: Σ p log p, (tokens,).
    """

    probabilities: torch.Tensor
    negative_entropy: torch.Tensor

    @classmethod
    def of(cls, head: Head, residual: torch.Tensor) -> Reference:
        """Distributions at the residual stream after the last layer, (tokens, hidden)."""
        logs = torch.log_softmax(head.logits(residual), dim=-1)
        probabilities = logs.exp()
        return cls(probabilities, (probabilities * logs).sum(-1))

    def divergence(self, head: Head, residual: torch.Tensor) -> float:
        """Mean KL(dense ‖ changed), nats per token, of a changed model's residual stream, (tokens, hidden).

        KL = Σ p log p - Σ p z + log Σ exp z, with z the changed model's logits.
        """
        total = 0.0
        for start in range(0, len(residual), 512):
            part = slice(start, start + 512)
            logits = head.logits(residual[part])
            each = self.negative_entropy[part] - (self.probabilities[part] * logits).sum(-1) + logits.logsumexp(-1)
            total += float(each.sum(dtype=torch.float64))
        if not math.isfinite(total):  # and no damage would be what it looks like
            raise StageFailed("the model's logits are not finite", remedy="its weights are damaged, or need float32")
        return max(0.0, total / len(residual))


@torch.inference_mode()
def measure_damage(
    model: LayeredModel,
    ids: torch.Tensor,
    judged: torch.Tensor,
    how: Compensation,
    *,
    model_hash: str = "",
    text_hash: str = "",
    partial: Path | None = None,
    progress: Progress | None = None,
) -> DamageTable:
    """Measure the damage table.

    All layers are held in memory at once, in the model's number format.

    Args:
        ids: text for the second moments, (windows, length).
        judged: other text, on which the KL is measured, (windows, length).
        how: the compensation; its target is the dense projection's own output, as everything before is dense.
        partial: a file that keeps the layers done, as a table of fewer layers; the same call goes on from it.
    """
    how = Compensation(ridge=how.ridge, stream=0.0, weighted=how.weighted, solved=how.solved)
    embedded = model.embed(ids)
    streams = Streams(embedded, embedded)
    residual = model.embed(judged)
    blocks = [model.block(index) for index in range(len(model.shape.layers))]
    end = _through(blocks, residual).flatten(0, 1)
    head = model.head().sample(end, JUDGED_TOKENS)
    reference = Reference.of(head, end)
    done = DamageTable((), (), (), model_hash, text_hash)
    if partial and partial.exists():
        done = DamageTable.load(partial)
    for index, (block, dense) in enumerate(zip(blocks, model.shape.layers, strict=True)):
        rest = blocks[index + 1 :]

        def judge(after: list[torch.Tensor], rest: list[Block] = rest) -> list[float]:
            ends = torch.split(_through(rest, torch.cat(after)), len(judged))
            return [reference.divergence(head, end.flatten(0, 1)) for end in ends]

        before = Streams(streams.dense.clone(), streams.dense) if block.family.parallel else streams
        if index < len(done.mlp):
            for half in HALVES:
                run_half(block, half, streams, before, None, None)
            residual = _through([block], residual)
            continue
        began = residual
        for half in HALVES:
            moments = _dense_moments(block, half, streams, before, how)
            inner = block.inner(half, began if block.family.parallel else residual)
            if half == "attention":
                # Nothing can be chosen where no format holds other heads.
                heads = [] if model.shape.fixed_heads else _head_choices(moments, dense, model.shape.head_dim, how)
                first = [_narrowed(block, half, residual, inner, kept, weight) for _, kept, weight in heads]
                ends = judge([_past_mlp(block, x, began) for x in first]) if first else []
                options = [HeadOption(o.heads, o.kv_heads, kl) for (o, _, _), kl in zip(heads, ends, strict=True)]
                attention = (HeadOption(dense.heads, dense.kv_heads, 0.0), *options)
            else:
                widths, loss = _width_choices(moments, dense, how)
                ends = judge([_narrowed(block, half, residual, inner, kept, weight) for _, kept, weight in widths])
                found = [WidthOption(n, kl, loss[n]) for (n, _, _), kl in zip(widths, ends, strict=True)]
                mlp = (WidthOption(dense.neurons, 0.0, 0.0), *found)
            residual = after_half(block, half, residual, inner)
        done = replace(
            done, attention=(*done.attention, attention), mlp=(*done.mlp, mlp), losses=(*done.losses, tuple(loss))
        )
        if partial:
            done.save(partial)
        if progress:
            progress(index + 1, len(blocks))
    return done


def _dense_moments(block: Block, half: Half, streams: Streams, read: Streams, how: Compensation) -> Moments:
    """Moments of a half with everything before it dense; the stream is moved past it."""
    moments = run_half(block, half, streams, read, None, how)
    assert moments is not None
    return moments


def _narrowed(
    block: Block, half: Half, residual: torch.Tensor, inner: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The residual stream past a half that keeps the inputs `kept`; past one that is absent if there are none."""
    return after_half(block, half, residual, inner, kept, weight) if len(kept) else residual


def _past_mlp(block: Block, residual: torch.Tensor, began: torch.Tensor) -> torch.Tensor:
    inner = block.inner("mlp", began if block.family.parallel else residual)
    return after_half(block, "mlp", residual, inner)


def _through(blocks: Sequence[Block], residual: torch.Tensor) -> torch.Tensor:
    """The residual stream after `blocks`, a few windows at a time."""
    ends = []
    for part in torch.split(residual, max(1, 2048 // residual.shape[1])):
        for block in blocks:
            part = _past_mlp(block, after_half(block, "attention", part, block.inner("attention", part)), part)
        ends.append(part)
    return torch.cat(ends)


def _head_choices(
    moments: Moments, dense: LayerShape, head_dim: int, how: Compensation
) -> list[tuple[LayerShape, torch.Tensor, torch.Tensor]]:
    """Every number of heads below the dense one: widths, kept inputs, weights. No heads at all is the last."""
    whole = Surgeon(moments, how.ridge, what="attention")
    found = []
    for heads, kv_heads in head_options(dense):
        left = LayerShape(heads, kv_heads, dense.neurons)
        if left == dense:
            continue
        choice = choose_heads(whole.copy(), dense, left, head_dim)
        found.append((left, rows_of(choice.heads, head_dim), choice.weights))
    nothing = torch.empty(0, dtype=torch.int64)
    return [*found, (LayerShape(0, 0, dense.neurons), nothing, torch.empty(0))]


def _width_choices(
    moments: Moments, dense: LayerShape, how: Compensation
) -> tuple[list[tuple[int, torch.Tensor, torch.Tensor]], list[float]]:
    """The measured widths with kept neurons and weights; and the relative loss at 0, 1, 2 … neurons."""
    widths = [round(share * dense.neurons) for share in MEASURED_SHARES]
    found = eliminate(moments, how.ridge, widths=widths)
    loss = [found.error(width) for width in range(dense.neurons + 1)]
    return [(width, found.kept(width), found.weights[width]) for width in widths], loss
