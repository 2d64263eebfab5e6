"""What a smaller vocabulary costs: the dense model's loss on held-out text at a few sizes, measured once.

Distributions over different vocabularies have no KL divergence to each other; the likelihood that both give a text can
be compared. The damage is the rise of the text's negative log-likelihood over the number of tokens that the dense
tokenizer makes of it: nats per token, as everything in the damage table.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
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

SCHEMA_VERSION = 1
# Shares of all parameters at which the damage is measured. On SmolLM2-135M 10 % is a third of the vocabulary, and costs
# more than as much of the layers.
SHARES = (0.02, 0.035, 0.05, 0.075, 0.1)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VocabularyOption:
    """A number of tokens kept, and what that costs in nats per token of the dense tokenizer."""

    size: int
    damage: float


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
    options = [VocabularyOption(Checkpoint(source).shape.vocab, 0.0)]
    sizes = smaller_sizes(source)
    for done, size in enumerate(sizes):
        if progress:
            progress("measuring smaller vocabularies", done, len(sizes))
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
            plan = plan_vocabulary(source, paths, size=size, progress=progress)
            small = prune_vocabulary(source, plan, Path(scratch) / "small", check=False)
            loss, _ = text_loss(small, judged)
        # A smaller vocabulary is never taken for a better model: that would be chance.
        options.append(VocabularyOption(plan.size, max((loss - dense) / tokens, options[-1].damage)))
    write_json(path, {"schema_version": SCHEMA_VERSION, "options": [asdict(option) for option in options]})
    return tuple(options)


def with_vocabulary(
    source: Path, paths: Sequence[Path], size: int, out: Path, *, progress: Progress | None = None
) -> VocabularyPlan:
    """Write the dense model with `size` tokens to `out`, and return the plan."""
    plan = plan_vocabulary(source, paths, size=size, progress=progress)
    prune_vocabulary(source, plan, out)
    return plan
