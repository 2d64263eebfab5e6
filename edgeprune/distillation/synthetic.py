"""`synthetic`: text that the dense model writes for the purpose, matched to the pool's gradient, and edited.

What DiLM (arXiv 2404.00264) trains a generator for, and GRADMM (arXiv 2502.17607) optimises embeddings for, is had here
in three steps that train nothing:

1. the model writes more candidates than are wanted: continuations of the first words of the pool's texts, or, with
   labels, another text after some of one class;
2. of those that it finds likely, and that a classifier trained on the pool takes for their class, the ones whose
   weighted gradient is the pool's are taken, as `gradient-matching` does;
3. some of their tokens are replaced by others that the model finds likely there; an edit stays if it brings the set's
   gradient nearer to the pool's and does not make the text much less likely.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from edgeprune.distillation.base import Basket, Floats, Indices, Order, Written
from edgeprune.distillation.gradient_matching import RIDGE
from edgeprune.distillation.labelled import LabelledReadings
from edgeprune.distillation.matching import each_token, match
from edgeprune.distillation.pool import Fields, Pool, Source, make_pool
from edgeprune.models import Model, load
from edgeprune.precision import fast_copy, fast_products
from edgeprune.writing import continued, in_batches, lines_after, special_ids, with_bos

SURPLUS = 2.0  # candidates for each text wanted
SURPLUS_LABELLED = 6.0  # the same with labels, since a small model often writes for another class than it was shown
ROUNDS = 2  # of edits
_LIKELY = 0.75  # share of the candidates that stay after those of highest perplexity are gone
_BEGUN = 16  # tokens of the pool's text that a candidate begins with
_SHOWN = 4  # texts of a class that the model reads before it writes another
_MOST = 96  # tokens of a text with a label
_EDITED = 0.05  # share of a text's tokens that an edit replaces
_ALTERNATIVES = 20  # of the likeliest tokens at a place, from which an edit draws
_TOLERATED = 0.1  # nats a token that an edit may make a text less likely


@dataclass(frozen=True)
class _Texts:
    """Texts just written: their pool, features in the pool's terms, and mean negative log-likelihood."""

    pool: Pool
    features: Floats
    nlls: Floats
    fitting: Indices  # those that the classifier trained on the pool takes for their class; all without labels


def write(order: Order) -> Written:
    """Write, match and edit; class by class where the pool has labels.

    Raises:
        BadInput: a pool too small to begin texts with.
    """
    model = load(order.model)
    writer = fast_copy(model.module)
    judge = _Judge(order, model)
    classes = list(enumerate(order.pool.classes)) if order.pool.labels is not None else [(None, None)]
    parts = [_matched(order, model, writer, judge, label) for label, _ in classes]
    for label, _ in classes:
        _kept(order, model, label).unlink(missing_ok=True)
    texts = tuple(text for part, _ in parts for text in part)
    weights = tuple(weight for _, part in parts for weight in part)
    labels = [name for (_, name), (part, _) in zip(classes, parts, strict=True) if name is not None for _ in part]
    return Written(texts, tuple(labels) or None, weights)


def _matched(
    order: Order, model: Model, writer: torch.nn.Module, judge: _Judge, label: int | None
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Texts of one class, or of none, and their weights."""
    quota, target = order.quota, judge.target(label)
    rng = np.random.default_rng([order.seed, label or 0])
    texts = judge(_candidates(order, model, writer, label), label)
    unlikely_last = np.argsort(texts.nlls, kind="stable")
    fitting = unlikely_last[np.isin(unlikely_last, texts.fitting)]
    # Where too few fit, the likeliest of the others make up the number.
    others = unlikely_last[~np.isin(unlikely_last, texts.fitting)]
    room = max(round(_LIKELY * len(fitting)), quota.count or 1)
    likely = np.sort(np.concatenate([fitting, others])[:room])
    choice = match(texts.features[likely], target, Basket(quota, texts.pool.lengths[likely]), RIDGE)
    chosen = likely[choice.taken]
    if not len(chosen):
        return (), ()
    weights = choice.weights if choice.weights is not None else np.ones(len(chosen))
    current = [texts.pool.text(int(i)) for i in chosen]
    features, nlls = texts.features[chosen], texts.nlls[chosen]
    for number in range(ROUNDS):
        order.say("editing texts", number, ROUNDS)
        edited = [_edit(model, text, rng) for text in current]
        again = judge(edited, label, keep=True)
        for i in range(len(current)):
            # What the others leave for this text to say, in its own weight.
            total = weights.sum()
            others = weights @ features - weights[i] * features[i]
            before = np.square(target - (others + weights[i] * features[i]) / total).sum()
            after = np.square(target - (others + weights[i] * again.features[i]) / total).sum()
            if i in again.fitting and after < before and again.nlls[i] <= nlls[i] + _TOLERATED:
                current[i], features[i], nlls[i] = edited[i], again.features[i], again.nlls[i]
    sizes = np.ones(len(current)) if quota.tokens is None else texts.pool.lengths[chosen]
    return tuple(current), tuple(map(float, each_token(weights, sizes)))


class _Judge:
    """Gradients of any texts in the scale of the pool's."""

    def __init__(self, order: Order, model: Model) -> None:
        self._order, self._model = order, model
        labels = order.pool.labels
        column = "gradients" if labels is None else "means"
        self._base = order.read(order.pool, (column,))
        self._classified = None if labels is None else LabelledReadings(self._base, labels)

    def target(self, label: int | None) -> Floats:
        """The mean gradient of the pool, or of one class: (k,)."""
        if self._classified is None or label is None:
            lengths = self._order.pool.lengths
            return np.asarray(lengths @ self._base.gradients / lengths.sum())
        assert self._order.pool.labels is not None
        return np.asarray(self._classified.gradients[self._order.pool.labels == label].mean(axis=0))

    def __call__(self, texts: list[str], label: int | None, *, keep: bool = False) -> _Texts:
        """Read texts; the same one twice counts once unless `keep`, which keeps their places."""
        mark = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        source = Source("written", mark, None, lambda: iter([{"text": text, "label": "x"} for text in texts]))
        # With a label a text is one piece, however long.
        pool = make_pool(
            source,
            self._model.tokenizer,
            fields=Fields(label="label"),
            length=self._order.length,
            folder=self._order.scratch,
            repeats=keep,
        )
        if self._classified is None or label is None:
            found = self._order.read(pool, ("gradients", "nlls"))
            return _Texts(pool, found.gradients_like(self._base), np.array(found.nlls), np.arange(len(pool)))
        found = self._order.read(pool, ("means", "nlls"))
        labels = np.full(len(pool), label, dtype=np.int64)
        fitting = self._classified.agrees(found.means, labels).nonzero()[0]
        return _Texts(pool, self._classified.gradients_of(found.means, labels), np.array(found.nlls), fitting)


def _candidates(order: Order, model: Model, writer: torch.nn.Module, label: int | None) -> list[str]:
    """Texts that the model writes, in the pool's manner."""
    generator = torch.Generator().manual_seed(order.seed * 1_000_003 + (label or 0))
    tokens, count = order.quota.tokens, order.quota.count
    wanted = (
        round(SURPLUS_LABELLED * (count or 1)) if tokens is None else max(2, round(SURPLUS * tokens / order.length))
    )

    def write_some(rows: int) -> list[str]:
        if label is None:
            begun = _beginnings(order.pool, rows, generator, order.length)
            written, _ = continued(model, writer, begun, order.length, generator)
            return [model.tokenizer.decode(row, skip_special_tokens=True) for row in written]
        prompt = _prompt(order, model, label, generator)
        return list(filter(None, lines_after(model, writer, prompt, rows, _MOST, generator)))

    return in_batches(
        _kept(order, model, label),
        wanted,
        generator,
        write_some,
        lambda done, total: order.say("writing candidates", done, total),
    )


def _kept(order: Order, model: Model, label: int | None) -> Path:
    """Where the candidates of one class stay until the set is written."""
    parts = [model.hash, order.pool.hash, label, asdict(order.quota), order.seed, order.length, _BEGUN, _SHOWN, _MOST]
    return order.kept / "texts" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.partial.json"


def _beginnings(pool: Pool, rows: int, generator: torch.Generator, most: int) -> torch.Tensor:
    """First tokens of texts of the pool that are long enough, (rows, begun)."""
    begun = int(min(_BEGUN, most // 2, np.median(pool.lengths)))
    long_enough = (pool.lengths >= begun).nonzero()[0]
    drawn = torch.randint(len(long_enough), (rows,), generator=generator)
    return torch.tensor(np.stack([pool.ids(int(i))[:begun] for i in long_enough[drawn]]))


def _prompt(order: Order, model: Model, label: int, generator: torch.Generator) -> torch.Tensor:
    """Some texts of a class, one a line, after which the model writes the next: ids, (length,)."""
    assert order.pool.labels is not None
    members = (order.pool.labels == label).nonzero()[0]
    shown = members[torch.randperm(len(members), generator=generator)[:_SHOWN]]
    lines = [" ".join(order.pool.text(int(i)).split()) for i in shown]
    text = "".join(f"{order.pool.classes[label]}: {line}\n" for line in lines) + f"{order.pool.classes[label]}:"
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def _edit(model: Model, text: str, rng: np.random.Generator) -> str:
    """The text with some tokens replaced by others that the model finds likely after what stands before them."""
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < 2:
        return text
    with fast_products():
        read = with_bos(model.tokenizer, ids[None])
        logits = model.module(input_ids=read, use_cache=False).logits[0, -len(ids) :].float()
    logits[:, special_ids(model.tokenizer)] = -torch.inf
    for place in rng.choice(np.arange(1, len(ids)), size=max(1, round(_EDITED * (len(ids) - 1))), replace=False):
        likely = logits[place - 1].topk(min(_ALTERNATIVES, logits.shape[1])).indices
        others = likely[likely != ids[place]]
        ids[place] = others[int(rng.integers(len(others)))]
    edited: str = model.tokenizer.decode(ids, skip_special_tokens=True)
    return edited.strip() or text
