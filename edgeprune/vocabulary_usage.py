"""What the model itself expects to read and write: a prior for the use of tokens that a corpus does not have.

A corpus of a million tokens leaves a third of a vocabulary without one use, and counts alone cannot tell those tokens
apart. The model can: over a few thousand positions its next-token distributions give every token a share.

The same pass gives what it takes to tell the model that kept tokens are used more often than it learnt: `prior_shift`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.checkpoint import Checkpoint
from edgeprune.corpus import Corpus, pieces
from edgeprune.errors import BadInput
from edgeprune.files import atomic_file, cache_dir
from edgeprune.precision import fast_products
from edgeprune.runtimes.pytorch import load_model
from edgeprune.vocabulary import Counts

LENGTH = 512  # tokens of a window
# Tokens that the model's expectation counts as much as: a corpus much larger than this speaks for itself. Chosen on
# text that is neither counted nor judged; between one and four million it makes little difference.
PRIOR_TOKENS = 2e6
SCHEMA_VERSION = 1
# A direction that misses its 1 by more than this (mean squared) on other text would do harm: no shift then.
MISFIT_LIMIT = 0.1
_RIDGE = 1e-3  # of the Gram matrix, relative to its mean diagonal entry
_CHARACTERS = 6 * LENGTH  # of a sampled piece: enough for a window in most languages

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Expectation:
    """What a model expects over some text."""

    probability: NDArray[np.float64]  # mean probability of each token: (vocabulary,), sums to 1
    direction: NDArray[np.float64]  # what to add to a row of the head to raise its logit by about 1: (hidden,)
    misfit: float  # mean squared error of that 1, on text that the direction was not fitted to
    n_tokens: int


def posterior_counts(counts: Counts, probability: NDArray[np.float64]) -> Counts:
    """Counts with a Dirichlet prior: what was counted, and `PRIOR_TOKENS` tokens as the model expects them.

    Up to a constant factor this is the posterior mean of each token's frequency, of multinomial counts under a
    Dirichlet distribution with parameters `PRIOR_TOKENS` · `probability`.
    """
    return counts + PRIOR_TOKENS * probability


def prior_shift(before: Counts, after: Counts) -> NDArray[np.float64]:
    """How far the logit of each token should rise because it is used more often than the model learnt: (n,), nats.

    A classifier's posterior under new class frequencies is the old one times new over old frequency, normalised
    (Saerens, Latinne & Decaestecker 2002, eq. 2.4), so a logit moves by the logarithm of that ratio.

    Args:
        before: uses of each token as the model knows them: (n,).
        after: uses with those of the dropped tokens that are read as this one: (n,).
    """
    shift = np.zeros(len(before))
    rising = (before > 0) & (after > before)
    shift[rising] = np.log(after[rising] / before[rising])
    return shift


def constant_direction(gram: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vector u with h · u nearest to 1 over hidden states h: a bias for a head that has none: (hidden,).

    Ridge least squares: u = (G + λI)⁻¹ m.

    Args:
        gram: mean of h hᵀ, (hidden, hidden).
        mean: mean of h, (hidden,).
    """
    ridge = _RIDGE * float(np.trace(gram)) / len(gram) * np.eye(len(gram))
    return np.asarray(np.linalg.solve(gram + ridge, mean), dtype=np.float64)


def sample(corpus: Corpus, count: int, *, seed: int) -> list[str]:
    """`count` pieces of a corpus drawn with equal chance (fewer if there are fewer), in one pass.

    Reservoir sampling (Vitter 1985, algorithm R); long records and blocks are cut first.
    """
    chance = random.Random(seed)
    drawn: list[str] = []
    seen = 0
    for _, text in pieces(corpus):
        for start in range(0, len(text), _CHARACTERS):
            seen += 1
            at = len(drawn) if len(drawn) < count else chance.randrange(seen)
            if at < count:
                drawn[at : at + 1] = [text[start : start + _CHARACTERS]]
    return drawn


def misfit(direction: NDArray[np.float64], gram: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    """Mean of (h · u - 1)² over hidden states with this Gram matrix and mean; 1 is as good as no direction."""
    return float(direction @ gram @ direction - 2 * direction @ mean + 1)


@dataclass
class _Sums:
    """Sums over positions: next-token distributions, (vocabulary,), and, apart for even and odd windows, hidden states,
    (2, hidden), and their outer products, (2, hidden, hidden)."""

    probability: torch.Tensor
    hidden: torch.Tensor
    gram: torch.Tensor
    positions: NDArray[np.int64]  # (2,)


@torch.inference_mode()
def _observe(module: Any, windows: list[torch.Tensor], report: Callable[[int], None]) -> _Sums:
    head = module.get_output_embeddings()
    vocabulary, width = head.weight.shape
    sums = _Sums(
        probability=torch.zeros(vocabulary, dtype=torch.float64),
        hidden=torch.zeros(2, width, dtype=torch.float64),
        gram=torch.zeros(2, width, width, dtype=torch.float64),
        positions=np.zeros(2, dtype=np.int64),
    )
    half = 0

    def look(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        states = inputs[0].reshape(-1, width).float()
        sums.hidden[half] += states.sum(dim=0).double()
        sums.gram[half] += (states.T @ states).double()
        sums.positions[half] += len(states)

    handle = head.register_forward_pre_hook(look)
    try:
        for done, window in enumerate(windows, start=1):
            half = done % 2
            with fast_products():
                logits = module(input_ids=window[None], use_cache=False).logits[0]  # (length, vocabulary)
            for part in logits.split(64):  # a float32 copy of all of it would be the largest thing in memory
                sums.probability += part.float().softmax(dim=-1).sum(dim=0).double()
            report(done)
    finally:
        handle.remove()
    return sums


def expected_use(
    folder: Path, tokenizer: Any, corpus: Corpus, *, windows: int, seed: int = 0, progress: Progress | None = None
) -> Expectation:
    """What the model expects over `windows` windows of a corpus; cached by model and corpus.

    Args:
        folder: the model, in Hugging Face format.
        tokenizer: its `tokenizers.Tokenizer`.
        corpus: where the windows are drawn from.
        windows: how many, of up to 512 tokens.
        seed: of the draw.
        progress: told "expectation", done, total.

    Raises:
        BadInput: the corpus has no text of two tokens or more, or the model gives no finite numbers.
    """
    key = hashlib.sha256(
        json.dumps([SCHEMA_VERSION, Checkpoint(folder).hash(), tokenizer.to_str(), corpus.hash, windows, seed]).encode()
    ).hexdigest()[:24]
    path = cache_dir() / "vocabulary" / f"expected-{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Expectation(
                stored["probability"], stored["direction"], float(stored["misfit"]), int(stored["n_tokens"])
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass  # not there yet, or damaged: it is made again
    encoded = [
        tokenizer.encode(text, add_special_tokens=True).ids[:LENGTH] for text in sample(corpus, windows, seed=seed)
    ]
    batch = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    if not batch:
        raise BadInput("the corpus is too short", where=", ".join(corpus.names))
    sums = _observe(
        load_model(folder),
        batch,
        lambda done: progress("expectation", done, len(batch)) if progress else None,
    )
    n = int(sums.positions.sum())
    probability = (sums.probability / n).numpy()
    if not (np.isfinite(probability).all() and torch.isfinite(sums.gram).all()):
        raise BadInput("the model's logits are not finite", where=folder, remedy="check the checkpoint")
    grams, means = sums.gram.numpy(), sums.hidden.numpy()
    error = 1.0  # with one window there is no other text to try a direction on
    if sums.positions.all():
        (gram, mean), (other_gram, other_mean) = zip(
            grams / sums.positions[:, None, None], means / sums.positions[:, None], strict=True
        )
        error = misfit(constant_direction(gram, mean), other_gram, other_mean)
        error = (error + misfit(constant_direction(other_gram, other_mean), gram, mean)) / 2
    direction = constant_direction(grams.sum(axis=0) / n, means.sum(axis=0) / n)
    with atomic_file(path) as temporary, temporary.open("wb") as out:
        np.savez_compressed(out, probability=probability, direction=direction, misfit=error, n_tokens=np.int64(n))
    return Expectation(probability, direction, error, n)
