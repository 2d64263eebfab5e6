"""The vocabulary plan: which tokens a model keeps, and the text that was counted to decide it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.checkpoint import GGUF_TOKENIZER, Checkpoint
from edgeprune.corpus import corpus
from edgeprune.errors import BadInput
from edgeprune.files import read_json, write_json
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.tokenizer_file import open_tokenizer
from edgeprune.shape import ModelShape
from edgeprune.vocabulary import BpeVocabulary, keep_tokens, read_vocabulary, read_without, smallest
from edgeprune.vocabulary_counts import count_tokens
from edgeprune.vocabulary_tokenizer import gguf_fixed, special_ids_of

_MOST_TOKENS = 1 << 24  # of a vocabulary: none is nearly as large
PLAN_FILE = "vocabulary_plan.json"
SCHEMA_VERSION = 1
# Fast kernels compute rows of the head in groups: llama.cpp's repacked ones by four or eight, others by up to 32.
MULTIPLE = 32

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class VocabularyPlan:
    """Which ids a model keeps, in the numbering of the model it was made for."""

    kept: tuple[int, ...]  # ascending
    size_before: int  # rows of the embedding
    reached_ratio: float  # share of all parameters that goes
    longer: float  # tokens for the counted text after over before, as the counts tell it
    corpus: str  # SHA-256 of the text counted
    corpus_files: tuple[str, ...]
    corpus_tokens: int
    corpus_bytes: int
    counts: str  # SHA-256 of the counts that decided
    expectation_tokens: int  # tokens of that text on which the model's own expectation was taken; 0: counts alone
    tokenizer: str  # SHA-256 of the tokenizer.json it is for
    # What the head is to learn of uses that pass to kept tokens: the logit of each rises by its shift, which is that
    # many times the direction, added to its row. Both are empty where the model was not asked or has no such direction.
    shift: tuple[float, ...] = ()  # (kept,), nats
    direction: tuple[float, ...] = ()  # (hidden,)

    @property
    def size(self) -> int:
        """Rows of the embedding after."""
        return len(self.kept)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: ids that follow one another as one run, "first-last", long vectors as one line."""
        vectors = {name: " ".join(f"{x:.6g}" for x in getattr(self, name)) for name in ("shift", "direction")}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "kept": _runs(self.kept), **vectors}

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> VocabularyPlan:
        """Read a plan.

        Raises:
            BadInput: no plan of this version, or ids out of order or range.
        """
        value = read_json(path)
        remedy = "make the plan again"
        if value.pop("schema_version", None) != SCHEMA_VERSION:
            raise BadInput("not a vocabulary plan of this version", where=path, remedy=remedy)
        try:
            size = int(value["size_before"])
            if size > _MOST_TOKENS:
                raise ValueError(f"a vocabulary of {size} tokens")
            vectors = {name: tuple(float(x) for x in value[name].split()) for name in ("shift", "direction")}
            files = tuple(value["corpus_files"])
            plan = cls(**{**value, "kept": _ids(value["kept"], size), "corpus_files": files, **vectors})
            if len(plan.shift) not in (0, plan.size) or not np.isfinite((*plan.shift, *plan.direction)).all():
                raise ValueError("shifts do not fit the kept ids")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise BadInput(f"not a vocabulary plan ({error})", where=path, remedy=remedy) from error
        return plan

    def counted_on(self) -> str:
        """One line for reports: on what text the choice rests."""
        files = ", ".join(self.corpus_files[:4]) + (" …" if len(self.corpus_files) > 4 else "")
        return f"counted on {self.corpus_tokens:,} tokens ({self.corpus_bytes / 1e6:.1f} MB) of {files}"


def _runs(kept: Sequence[int]) -> list[str]:
    ids = np.asarray(kept, dtype=np.int64)
    ends = np.flatnonzero(np.diff(ids) != 1)
    first, last = ids[np.concatenate([[0], ends + 1])], ids[np.concatenate([ends, [len(ids) - 1]])]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def _ids(runs: Sequence[str], size: int) -> tuple[int, ...]:
    ids: list[int] = []
    for run in runs:
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first)
        if not (ids[-1] if ids else -1) < start <= stop < size:
            raise ValueError(f"ids {run} are out of order or range")
        ids += range(start, stop + 1)
    if not ids:
        raise ValueError("no ids")
    return tuple(ids)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of a folder's `tokenizer.json`, however it is laid out."""
    return hashlib.sha256(json.dumps(read_json(folder / "tokenizer.json"), sort_keys=True).encode()).hexdigest()


def folder_vocabulary(folder: Path, rows: int) -> BpeVocabulary:
    """The vocabulary of a Hugging Face folder whose embedding has `rows` rows, with all that has to stay.

    Raises:
        BadInput: no tokenizer.json, or a tokenizer that is not byte-pair.
    """
    where = folder / "tokenizer.json"
    open_tokenizer(folder)  # the library checks the file's structure
    fixed: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            fixed |= special_ids_of(read_json(folder / name))
    try:
        if (folder / "tokenizer_config.json").is_file():
            decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
            fixed |= {int(token) for token in decoder}
        if (folder / "added_tokens.json").is_file():
            fixed |= {int(token) for token in read_json(folder / "added_tokens.json").values()}
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"an added token has no id ({error})", where=folder, remedy="save the tokenizer again"
        ) from error
    if (folder / GGUF_TOKENIZER).is_file():
        fixed |= gguf_fixed(GgufFile(folder / GGUF_TOKENIZER))
    return _read(where, where.stat().st_mtime_ns, rows, frozenset(fixed))


@lru_cache(maxsize=2)
def _read(where: Path, _changed: int, rows: int, fixed: frozenset[int]) -> BpeVocabulary:
    """Deriving every token of a large vocabulary takes seconds, and every size that is tried needs it twice."""
    return read_vocabulary(read_json(where), rows=rows, fixed=fixed, where=where)


def row_parameters(shape: ModelShape) -> int:
    """Parameters of a row of the vocabulary: of the embedding and, where it is not tied, of the head."""
    return shape.embedding_parameters // shape.vocab


def wanted_size(
    shape: ModelShape, *, size: int | None = None, ratio: float | None = None, multiple: int = MULTIPLE
) -> int:
    """Rows to keep: at most `size`, or so many that at least `ratio` of all parameters go; a multiple of `multiple`.

    Raises:
        BadInput: neither or both are given, or nothing would be left.
    """
    if (size is None) == (ratio is None):
        raise BadInput("give a size or a ratio", remedy="--size ROWS or --ratio SHARE")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise BadInput(f"ratio {ratio:g}", remedy="give a share of all parameters between 0 and 1")
        size = shape.vocab - -(-round(ratio * shape.parameters) // row_parameters(shape))
    assert size is not None
    if size >= shape.vocab:
        told = f"{size} tokens are kept of {shape.vocab}"
        raise BadInput(told, where="--size", remedy="ask for fewer: there is nothing to remove")
    rows = size // multiple * multiple
    if rows <= 0:
        share = shape.vocab * row_parameters(shape) / shape.parameters
        raise BadInput(f"no row would be left: the vocabulary is {share:.1%} of all parameters", remedy="ask for less")
    return rows


def plan_vocabulary(
    folder: Path,
    corpus_paths: Sequence[Path],
    *,
    size: int | None = None,
    ratio: float | None = None,
    multiple: int = MULTIPLE,
    windows: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> VocabularyPlan:
    """Count a corpus, ask the model what it expects, and choose the tokens to keep. Counts and expectation are cached.

    Args:
        folder: a model in Hugging Face format.
        corpus_paths: text and JSONL files, plain or gzipped, and folders of them: what the model will be used for. What
            it will be judged on does not belong there.
        size: rows to keep, at most.
        ratio: instead, the share of all parameters that goes, at least.
        multiple: rows are a multiple of this.
        windows: of 512 tokens of the corpus, on which the model's own expectation of each token is taken, as a prior
            for tokens that the corpus has not; 0: counts alone.
        seed: which windows.
        progress: told stage, done, total.

    Raises:
        BadInput: no byte-pair tokenizer, no text, or a size below what has to stay.
    """
    checkpoint = Checkpoint(folder)
    shape = checkpoint.shape
    vocabulary = folder_vocabulary(folder, shape.vocab)
    rows = wanted_size(shape, size=size, ratio=ratio, multiple=multiple)
    if rows < (least := smallest(vocabulary)):
        share = (shape.vocab - least) * row_parameters(shape) / shape.parameters
        raise BadInput(f"{least} tokens have to stay, {rows} were asked for", remedy=f"ask for {share:.1%} or less")
    tokenizer = open_tokenizer(folder)
    text = corpus(corpus_paths)
    stage = None if progress is None else lambda done, total: progress("counting", done, total)
    counted = count_tokens(tokenizer, text, progress=stage)
    in_text = np.zeros(shape.vocab)
    in_text[: len(counted.counts)] = counted.counts
    counts, expectation = in_text, None
    if windows:
        from edgeprune.vocabulary_usage import MISFIT_LIMIT, expected_use, posterior_counts, prior_shift

        expectation = expected_use(folder, tokenizer, text, windows=windows, seed=seed, progress=progress)
        counts = posterior_counts(in_text, expectation.probability)
    choice = keep_tokens(vocabulary, counts, rows)
    plan = VocabularyPlan(
        kept=tuple(choice.kept.tolist()),
        size_before=shape.vocab,
        reached_ratio=(shape.vocab - len(choice.kept)) * row_parameters(shape) / shape.parameters,
        longer=float(read_without(vocabulary, in_text, choice.removed).sum() / in_text.sum()),
        corpus=text.hash,
        corpus_files=text.names,
        corpus_tokens=counted.n_tokens,
        corpus_bytes=counted.n_bytes,
        counts=hashlib.sha256(counts.tobytes()).hexdigest(),
        expectation_tokens=0 if expectation is None else expectation.n_tokens,
        tokenizer=tokenizer_hash(folder),
    )
    if expectation is None or expectation.misfit > MISFIT_LIMIT:
        return plan
    shift = prior_shift(counts[choice.kept], choice.uses[choice.kept])
    return replace(plan, shift=tuple(shift.tolist()), direction=tuple(expectation.direction.tolist()))
