"""How often each token is used: counted over a corpus of any size, in a stream, and cached.

A corpus is text files, JSON Lines files (plain or gzipped), or folders of them. Memory does not grow with it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from edgeprune.calibration import record_text
from edgeprune.errors import BadInput
from edgeprune.files import atomic_file, cache_dir, sha256

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
SCHEMA_VERSION = 1
_BLOCK = 1 << 14  # characters of one piece of a text file
_BATCH = 1 << 18  # characters tokenised at once: their ids and the library's records of them are all that is in memory
_LONGEST_LINE = 1 << 26  # characters of one JSON record

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in order, and SHA-256 over their bytes."""

    files: tuple[Path, ...]
    hash: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all files, as stored."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def names(self) -> tuple[str, ...]:
        """File names, for reports."""
        return tuple(file.name for file in self.files)


def corpus(paths: Sequence[Path]) -> Corpus:
    """The corpus that `paths` name; folders are searched for files with one of `SUFFIXES`.

    Raises:
        BadInput: nothing given, nothing there, or a kind of file that is not read.
    """
    if not paths:
        raise BadInput("no corpus to count on", remedy="give text or JSONL files, or folders of them")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not found:
                raise BadInput("no text in this folder", where=path, remedy=f"known: {', '.join(SUFFIXES)}")
            files += found
        elif not path.is_file():
            raise BadInput("no such file or folder", where=path)
        elif not path.name.endswith(SUFFIXES):
            raise BadInput("not a corpus file", where=path, remedy=f"known: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{'.jsonl' in file.suffixes} {sha256(file)}".encode())
    return Corpus(tuple(files), digest.hexdigest())


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return cast("IO[str]", gzip.open(file, "rt", encoding="utf-8", newline=""))
    return file.open(encoding="utf-8", newline="")


def _lines(file: Path, stream: IO[str]) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise BadInput(f"line {number} is longer than {_LONGEST_LINE >> 20} Mi characters", where=file)
        if not line.strip():
            continue
        try:
            text = record_text(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"line {number} is not JSON ({error})", where=file) from error
        if text:
            yield text


def _blocks(stream: IO[str]) -> Iterator[str]:
    rest = ""
    while block := stream.read(_BLOCK):
        # A piece ends before a space or after a line, where no token goes across.
        rest += block
        cut = max(rest.rfind("\n") + 1, rest.rfind(" "))
        if cut <= 0:
            cut = len(rest) if len(rest) > _BLOCK else 0
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def pieces(found: Corpus) -> Iterator[tuple[Path, str]]:
    """The text of a corpus, record by record or block by block, with the file it is from.

    Raises:
        BadInput: a file that is no UTF-8, no gzip, or no JSON, with its line.
    """
    for file in found.files:
        try:
            with _open(file) as stream:
                for text in _lines(file, stream) if ".jsonl" in file.suffixes else _blocks(stream):
                    yield file, text
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read the text ({error})", where=file, remedy="give UTF-8 text or JSONL") from error


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
