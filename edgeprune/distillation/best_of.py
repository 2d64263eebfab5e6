"""`best-of`: a few random sets, each tried by pruning with it; the one that leaves the least KL is kept.

How a calibration set does differs from draw to draw more than most methods differ, and KL(dense ‖ pruned) on a little
held-out text tells (NIRVANA). A trial prunes and compensates the model, so this is the dearest method.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edgeprune.checkpoint import Checkpoint
from edgeprune.compensated import Origin, prune_compensated
from edgeprune.distillation.base import Basket, Indices, Order, Written
from edgeprune.distillation.pool import Pool
from edgeprune.distillation.readings import ModelReadings, Reading
from edgeprune.errors import BadInput
from edgeprune.layerwise import Compensation, packed
from edgeprune.pruning import WINDOW
from edgeprune.runtimes.pytorch import bos_of, load_tokenizer
from edgeprune.shape import LayerShape, ModelShape

SETS = 4
RATIO = 0.2  # of all parameters, where no pruned model says how much goes
_JUDGED = 48  # pieces that no set has, on which the KL is taken
_ALIGN = 32


def write(order: Order) -> Written:
    """Draw sets, prune with each, and give the best one's texts.

    Raises:
        BadInput: texts with labels are wanted, or a pool too small for a set beside the text to judge on.
    """
    if order.quota.tokens is None:
        raise BadInput("best-of judges calibration text, not texts with labels", where="--per-class")
    shuffled = np.random.default_rng(order.seed).permutation(len(order.pool))
    judged, free = np.split(shuffled, [min(_JUDGED, len(shuffled) // 4)])
    if not len(judged):
        raise BadInput("the source is too short for best-of", remedy="give more text")
    held_out = order.pool.subset(np.sort(judged))
    widths = _widths(order)
    found: list[tuple[float, Indices]] = []
    for number in range(SETS):
        order.say("pruning with each set", number, SETS)
        drawn = np.random.default_rng([order.seed, number]).permutation(free)
        chosen = drawn[Basket(order.quota, order.pool.lengths[drawn]).fill(range(len(drawn)))]
        if not len(chosen):
            return Written(())
        pruned = order.scratch / f"set-{number}"
        _prune(order, chosen, widths, pruned)
        found.append((_damage(order, pruned, held_out), chosen))
        shutil.rmtree(pruned)
    best = min(found, key=lambda pair: pair[0])[1]
    return Written(tuple(order.pool.text(int(i)) for i in best))


def _widths(order: Order) -> list[LayerShape]:
    if order.student:
        return list(Checkpoint(order.student).shape.layers)
    shape = Checkpoint(order.model).shape
    return [narrowed(shape, RATIO)] * len(shape.layers)


def _prune(order: Order, chosen: Indices, widths: list[LayerShape], out: Path) -> None:
    """Prune the dense model to `widths`, compensated on the chosen pieces."""
    ids = [torch.from_numpy(order.pool.ids(int(i))) for i in chosen]
    windows = packed(ids, min(WINDOW, sum(map(len, ids))), _bos(order))
    how, origin = Compensation.for_tokens(windows.numel()), Origin("best-of", RATIO, "", "")
    prune_compensated(order.model, windows, widths, how, out, origin=origin)


def _damage(order: Order, pruned: Path, held_out: Pool) -> float:
    """Mean KL(dense ‖ pruned) on the held-out pieces, nats a token."""
    how = Reading(("divergences",))
    dense, bos = Checkpoint(order.model), _bos(order)
    found = ModelReadings(held_out, dense, Checkpoint(pruned), how, order.scratch, bos=bos).divergences
    return float(found @ held_out.lengths / held_out.tokens)


def _bos(order: Order) -> int | None:
    return bos_of(load_tokenizer(order.model))


def narrowed(shape: ModelShape, ratio: float) -> LayerShape:
    """One layer's widths when `ratio` of all parameters go, as neurons of every layer alike."""
    dense = shape.layers[0]
    less = shape.with_layers(tuple(replace(layer, neurons=dense.neurons - _ALIGN) for layer in shape.layers))
    steps = round(ratio * shape.parameters / (shape.parameters - less.parameters))
    return replace(dense, neurons=max(_ALIGN, dense.neurons - steps * _ALIGN))
