"""What a smaller vocabulary costs: the dense model's loss on held-out text at a few sizes, measured once.

Distributions over different vocabularies have no KL divergence to each other; the likelihood that both give a text can
be compared. The damage is the rise of the text's negative log-likelihood over the number of tokens that the dense
tokenizer makes of it: nats per token, as everything in the damage table.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune.checkpoint import Checkpoint
from edgeprune.corpus import corpus
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.runtimes.pytorch import load_model, load_tokenizer
from edgeprune.vocabulary import smallest
from edgeprune.vocabulary_plan import (
    MULTIPLE,
    VocabularyPlan,
    folder_vocabulary,
    plan_vocabulary,
    row_parameters,
    wanted_size,
)
from edgeprune.vocabulary_surgery import prune_vocabulary

SCHEMA_VERSION = 2
# Shares of all parameters at which the damage is measured, as far as the vocabulary reaches. On SmolLM2-135M 10 % is
# half of the vocabulary, and costs more than as much of the layers; of Gemma 3 270M 30 % cost 0.02 nats of English.
SHARES = (0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
# Nats a token that cannot be told from none on some thousand tokens. No damage is taken to be less, so that of two
# vocabularies that read the text equally well the larger one stays.
UNTOLD = 1e-3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VocabularyOption:
    """A number of tokens kept, and what that costs in nats per token of the dense tokenizer.

    `measured` is False where a much smaller vocabulary was measured and did no harm: the damage is then a share of its.
    """

    size: int
    damage: float
    measured: bool = True


def text_loss(folder: Path, texts: Sequence[str]) -> tuple[float, int]:
    """Negative log-likelihood in nats that the model in `folder` gives `texts`, each after the token that begins one.

    Returns:
        The sum over all tokens of all texts, and the number of tokens.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                continue
            row = torch.tensor([([] if start is None else [start]) + ids])
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += len(ids)
    return total, count


def smaller_sizes(source: Path) -> list[int]:
    """The numbers of tokens that are tried for the model in `source`, largest first; no forward pass.

    Raises:
        BadInput: a tokenizer whose vocabulary cannot be pruned.
    """
    shape = Checkpoint(source).shape
    least = smallest(folder_vocabulary(source, shape.vocab))
    room = (shape.vocab - 2 * MULTIPLE) * row_parameters(shape) / shape.parameters
    wanted = {wanted_size(shape, ratio=share) for share in SHARES if share < room}
    return sorted((size for size in wanted if size >= least), reverse=True)


def measure_vocabulary(
    source: Path, model_hash: str, paths: Sequence[Path], judged: Sequence[str], *, progress: Progress | None = None
) -> tuple[VocabularyOption, ...]:
    """Measure what smaller vocabularies cost the dense model; cached by model, corpus and text.

    The smallest comes first: once one does no harm that can be told, larger ones are not measured.

    Args:
        source: the dense model's folder.
        model_hash: its identity.
        paths: the counting corpus (`plan_vocabulary`).
        judged: texts that are not in the corpus.

    Returns:
        The dense size at no damage first, then smaller ones.

    Raises:
        BadInput: no corpus, or a tokenizer whose vocabulary cannot be pruned.
    """
    depends: list[Any] = [SCHEMA_VERSION, model_hash, corpus(paths).hash, list(judged), SHARES]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    path = cache_dir() / "damage" / f"vocabulary-{key}.json"
    if path.exists():
        return tuple(VocabularyOption(**option) for option in read_json(path)["options"])
    dense, tokens = text_loss(source, judged)
    sizes = smaller_sizes(source)
    found: dict[int, float] = {}
    for done, size in enumerate(reversed(sizes)):
        if progress:
            progress("measuring smaller vocabularies", done, len(sizes))
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
            plan = plan_vocabulary(source, paths, size=size, progress=progress)
            small = prune_vocabulary(source, plan, Path(scratch) / "small", check=False)
            loss, _ = text_loss(small, judged)
        found[size] = (loss - dense) / tokens
        if found[size] < UNTOLD:
            break
    options = options_of(Checkpoint(source).shape.vocab, sizes, found)
    write_json(path, {"schema_version": SCHEMA_VERSION, "options": [asdict(option) for option in options]})
    return options


def options_of(dense: int, sizes: Sequence[int], measured: Mapping[int, float]) -> tuple[VocabularyOption, ...]:
    """The options from what was measured.

    Args:
        dense: tokens of the dense model.
        sizes: smaller numbers of tokens, largest first.
        measured: the rise in nats per token by size, of the smallest sizes, up to one or all.

    Returns:
        The dense size, and each of `sizes`. A smaller vocabulary is never taken for a better model: that would be
        chance.
    """
    largest = max(measured, default=dense)
    options = [VocabularyOption(dense, 0.0)]
    for size in sizes:
        if size in measured:
            options.append(VocabularyOption(size, max(measured[size], UNTOLD, options[-1].damage)))
        else:
            share = (dense - size) / (dense - largest)
            options.append(VocabularyOption(size, share * max(measured[largest], UNTOLD), measured=False))
    return tuple(options)


def with_vocabulary(
    source: Path, paths: Sequence[Path], size: int, out: Path, *, progress: Progress | None = None
) -> VocabularyPlan:
    """Write the dense model with `size` tokens to `out`, and return the plan."""
    plan = plan_vocabulary(source, paths, size=size, progress=progress)
    prune_vocabulary(source, plan, out)
    return plan
