"""How often each token is used: counted over a corpus of any size, in a stream, and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from edgeprune.corpus import Corpus, pieces
from edgeprune.errors import BadInput
from edgeprune.files import atomic_file, cache_dir

SCHEMA_VERSION = 1
_BATCH = 1 << 18  # characters tokenised at once: their ids and the library's records of them are all that is in memory

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenCounts:
    """Uses of each token in a corpus."""

    counts: NDArray[np.int64]  # (vocabulary,)
    n_bytes: int  # UTF-8 length of the text counted
    corpus: str  # SHA-256 of the corpus
    files: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens counted."""
        return int(self.counts.sum())

    @property
    def hash(self) -> str:
        """SHA-256 of the counts."""
        return hashlib.sha256(self.counts.tobytes()).hexdigest()


def count_tokens(tokenizer: Any, found: Corpus, *, progress: Progress | None = None) -> TokenCounts:
    """Count the tokens of a corpus, without special tokens that a tokenizer adds; cached by tokenizer and corpus.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        found: the corpus.
        progress: told files done and files in all.

    Raises:
        BadInput: a file that cannot be read, or a corpus without text.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    key = hashlib.sha256(json.dumps([SCHEMA_VERSION, tokenizer.to_str(), found.hash]).encode()).hexdigest()[:24]
    path = cache_dir() / "vocabulary" / f"{key}.npz"
    if (cached := _load(path, size)) is not None:
        return TokenCounts(*cached, found.hash, found.names)
    counts = np.zeros(size, dtype=np.int64)
    n_bytes = 0
    batch: list[str] = []

    def flush() -> None:
        nonlocal n_bytes
        n_bytes += sum(len(text.encode()) for text in batch)
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *(encoding.ids for encoding in encodings)])
        counts[:] += np.bincount(ids.astype(np.int64), minlength=size)
        batch.clear()

    waiting = 0
    for file, text in pieces(found):
        batch.append(text)
        waiting += len(text)
        if waiting >= _BATCH:
            flush()
            waiting = 0
            if progress:
                progress(found.files.index(file), len(found.files))
    flush()
    if not counts.any():
        raise BadInput("the corpus has no text", where=", ".join(found.names))
    with atomic_file(path) as temporary, temporary.open("wb") as out:
        np.savez_compressed(out, counts=counts, n_bytes=np.int64(n_bytes))
    return TokenCounts(counts, n_bytes, found.hash, found.names)


def _load(path: Path, size: int) -> tuple[NDArray[np.int64], int] | None:
    """Cached counts and bytes; None where there are none, or the file is damaged and has to be made again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            counts, n_bytes = stored["counts"], int(stored["n_bytes"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return (counts, n_bytes) if counts.shape == (size,) and counts.dtype == np.int64 else None
