"""What a recovery needs before its first step: a teacher that speaks the student's tokens, and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeprune.calibration import first_ids, self_generated
from edgeprune.checkpoint import Checkpoint
from edgeprune.corpus import up_to
from edgeprune.errors import BadInput
from edgeprune.models import load
from edgeprune.recipe import RECIPES, Method, Recipe
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.vocabulary_plan import PLAN_FILE, VocabularyPlan, tokenizer_hash
from edgeprune.vocabulary_surgery import prune_vocabulary

_OWN_LENGTH = 512  # tokens of a text that the teacher writes itself
_OWN_TEXTS = 2048  # the most that it writes
_OWN_SHARE = 0.2  # of the time, for writing
_SAMPLE = 20_000  # characters on which two tokenizers must agree

Progress = Callable[[str, int, int], None]


def same_vocabulary(student: Path, teacher: Path, cache: Path, say: Progress) -> Path:
    """A folder of the teacher with the student's vocabulary: its own, or one without the tokens that the student lost.

    Distributions over other tokens cannot be compared. The smaller teacher reads text as the student does and is the
    student's starting point, were no layer pruned; it lies in the cache.

    Raises:
        BadInput: a vocabulary plan that is damaged.
        StageFailed: text that the smaller tokenizer does not give back.
    """
    path = student / PLAN_FILE
    if not path.is_file() or not (teacher / "tokenizer.json").is_file():
        return teacher
    plan = VocabularyPlan.load(path)
    if plan.tokenizer != tokenizer_hash(teacher):
        return teacher  # perhaps pruned alike already; `shared_tokenizer` tells
    parts = [Checkpoint(teacher).hash(), plan.to_json()]
    folder = cache / "teachers" / f"vocabulary-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"
    if not (folder / "config.json").exists():
        say(f"giving the teacher the student's vocabulary of {plan.size} tokens", 0, 0)
        prune_vocabulary(teacher, plan, folder)
    return folder


def shared_tokenizer(student: Path, teacher: Path, text: Sequence[str] | None) -> Any:
    """The student's tokenizer.

    Raises:
        BadInput: the teacher's is another, so that its distributions are over other tokens.
    """
    own, other = load_tokenizer(student), load_tokenizer(teacher)
    sizes = [Checkpoint(folder).shape.vocab for folder in (student, teacher)]
    sample = "".join(up_to(text or (), _SAMPLE, len))[:_SAMPLE]
    same = (
        sizes[0] == sizes[1]
        and own.get_vocab() == other.get_vocab()
        and own(sample, verbose=False)["input_ids"] == other(sample, verbose=False)["input_ids"]
    )
    if not same:
        raise BadInput(
            f"the teacher has another vocabulary ({sizes[1]} entries, the student {sizes[0]})",
            where=teacher,
            remedy="prune the dense model's vocabulary as the student's was and give that folder as the teacher",
        )
    return own


def usual_recipe(method: Method, student: Path, teacher: Path) -> Recipe:
    """The method's, in windows no longer than both models read."""
    usual = RECIPES[method]
    read = [Checkpoint(folder).config.get("max_position_embeddings") for folder in (student, teacher)]
    length = min([usual.length, *(most for most in read if isinstance(most, int))])
    return usual if length == usual.length else usual.with_length(length)


def longest_window(text: Sequence[str], tokenizer: Any, length: int) -> int:
    """`length`, halved until the text holds four windows, but not below an eighth."""
    tokens, least = 0, length // 8
    for each in text:
        tokens += len(first_ids(tokenizer, each, 4 * length))
        if tokens > 4 * length:
            return length
    while length > least and tokens <= 4 * length:
        length //= 2
    return max(1, length)


def check_length(student: Path, teacher: Path, length: int) -> None:
    """Raise `BadInput` if either model reads fewer tokens than a window has."""
    for folder in (student, teacher):
        most = Checkpoint(folder).config.get("max_position_embeddings")
        if isinstance(most, int) and length > most:
            raise BadInput(f"windows of {length} tokens; the model reads {most}", where=folder, remedy="shorten them")


def own_text(teacher: Path, seconds: float, seed: int, say: Progress) -> tuple[str, ...]:
    """Text that the teacher writes, as much as it can in a fifth of the time; it is cached."""
    model = load(teacher)
    length = min(_OWN_LENGTH, int(Checkpoint(teacher).config.get("max_position_embeddings", _OWN_LENGTH)))

    def progress(done: int, total: int) -> None:
        say("writing text", done, total)

    found = self_generated(
        model, count=_OWN_TEXTS, length=length, seed=seed, seconds=_OWN_SHARE * seconds, progress=progress
    )
    return found.texts
