"""A pool of text on disk, cut into pieces of a few hundred tokens: what a distillation chooses from.

It is made in one pass over a source that may be larger than memory. In memory is, for each piece, where it lies in the
files: 32 bytes; and while it is made, a mark that tells repeats. Pieces that are in the source more than once are in
the pool once, or once under each label that they have there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.calibration import licence_of
from edgeprune.corpus import TEXT_FIELDS, corpus, hub_records, record_text, records, text_path, up_to
from edgeprune.errors import BadInput
from edgeprune.files import atomic_folder, cache_dir, read_json, write_json

SCHEMA_VERSION = 2
LENGTH = 256  # tokens of a piece: a window of recovery
_LEAST = 8  # tokens; less says nothing
_BATCH = 256  # documents tokenised at once

Progress = Callable[[str, int, int], None]
HUB_CHARACTERS = 1 << 28  # read of a hub dataset, which may have no end that a disk could hold


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    Attributes:
        name: as the user gave it.
        hash: of the files' bytes, or of a hub dataset's name and commit.
        licence: as stated beside the file or on the dataset's card; None: nothing is stated.
        read: gives the records, strings or JSON objects, from the first on.
    """

    name: str
    hash: str
    licence: str | None
    read: Callable[[], Iterator[Any]]


def source_of(names: Sequence[str]) -> Source:
    """Files and folders, or one hub dataset.

    Raises:
        BadInput: nothing of that name, or a kind of file that is not read.
    """
    paths = [Path(name).expanduser() for name in names]
    if len(names) == 1 and not paths[0].is_dir() and text_path(names[0]) is None:
        return Source(
            names[0],
            _hub_hash(names[0]),
            licence_of(names[0]),
            lambda: up_to(hub_records(names[0]), HUB_CHARACTERS, _size),
        )
    found = corpus(paths)
    stated = [licence_of(str(file)) for file in found.files]
    # Of text with a part that nothing is stated of, nothing is known.
    licence = None if None in stated else " AND ".join(sorted(set(filter(None, stated)))) or None
    return Source(", ".join(names), found.hash, licence, lambda: (record for _, record in records(found)))


def _size(record: Any) -> int:
    return len(record if isinstance(record, str) else json.dumps(record, ensure_ascii=False))


def _hub_hash(name: str) -> str:
    """SHA-256 over a hub dataset's name and commit; the commit of one that is only in the local cache is not known."""
    try:
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(name.partition(":")[0]).sha
    except Exception:  # of the network; whether the dataset can be read is seen when it is
        commit = None
    return hashlib.sha256(f"{name}@{commit} {HUB_CHARACTERS}".encode()).hexdigest()


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are its text, and which is its label (None: texts have no labels)."""

    text: tuple[str, ...] = TEXT_FIELDS
    label: str | None = None


class Pool:
    """The pieces of a source.

    Args:
        folder: what `make_pool` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_json(folder / "pool.json")
        self._spans: NDArray[np.int64] = np.load(folder / "spans.npy", mmap_mode="r")
        self._ids = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r")
        self._text = np.memmap(folder / "text.bin", dtype=np.uint8, mode="r")
        self.labels: NDArray[np.int64] | None = None  # of each piece, an index of `classes`
        if (folder / "labels.npy").exists():
            self.labels = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def hash(self) -> str:
        """Identity of source, tokenizer and cut."""
        return str(self.facts["key"])

    @property
    def classes(self) -> list[str]:
        """Names of the labels; none without labels."""
        return list(self.facts["classes"])

    def label_of(self, name: str) -> Any:
        """The label of a class as the source has it: a number stays one."""
        return self.facts["classes"][name]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each piece, (n,)."""
        return np.asarray(self._spans[:, 3] - self._spans[:, 2])

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return int(self.lengths.sum())

    def subset(self, indices: NDArray[np.int64]) -> Pool:
        """The same files with these pieces only."""
        part = copy.copy(self)
        part._spans = self._spans[indices]
        part.labels = None if self.labels is None else self.labels[indices]
        part.facts = self.facts | {"key": hashlib.sha256(self.hash.encode() + indices.tobytes()).hexdigest()}
        return part

    def ids(self, index: int) -> NDArray[np.int64]:
        """Token ids of a piece, (length,), without BOS."""
        start, stop = self._spans[index, 2:]
        return self._ids[start:stop].astype(np.int64)

    def text(self, index: int) -> str:
        """The text of a piece."""
        start, stop = self._spans[index, :2]
        return self._text[start:stop].tobytes().decode()


def make_pool(
    source: Source,
    tokenizer: Any,
    *,
    fields: Fields | None = None,
    length: int = LENGTH,
    folder: Path | None = None,
    repeats: bool = False,
    progress: Progress | None = None,
) -> Pool:
    """The pool of `source`, made at first use and found again.

    Args:
        source: the texts.
        tokenizer: a fast tokenizer of transformers.
        fields: of JSON records. With labels a record is one piece, cut off at `length` tokens; without, longer ones
            become several pieces.
        length: tokens of a piece at most.
        folder: where pools are kept; None: the user's cache.
        repeats: keep a piece that is there already, and one that is very short.

    Raises:
        BadInput: unreadable text, records without label or text, no text at all, or a full disk.
    """
    fields = fields or Fields()
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput("the model's tokenizer has no tokenizer.json", remedy="save it as a fast tokenizer")
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    parts = [SCHEMA_VERSION, source.hash, vocabulary, length, fields.text, fields.label, repeats]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = (folder or cache_dir() / "pools") / key[:24]
    if not (path / "pool.json").exists():
        with atomic_folder(path) as temporary:
            writer = _Writer(temporary, tokenizer, length, repeats)
            for batch in _batches(source, fields):
                writer.add(batch)
                if progress:
                    progress("reading the pool (tokens)", writer.tokens, 0)
            writer.finish({"key": key, "source": source.name, "length": length})
    return Pool(path)


def _batches(source: Source, fields: Fields) -> Iterator[list[tuple[str, Any]]]:
    """Texts with their labels (None: without), a batch at a time."""
    batch: list[tuple[str, Any]] = []
    names = [name for name in fields.text if name != fields.label]  # a text that tells its class would be chosen for it
    for number, record in enumerate(source.read(), start=1):
        text = record_text(record, names)
        label = None
        if fields.label is not None:
            label = record.get(fields.label) if isinstance(record, dict) else None
            if label is None or isinstance(label, (list, dict)) or not text:
                lacking = "text" if label is not None else f"field {fields.label!r}"
                raise BadInput(
                    f"record {number} has no {lacking}", where=source.name, remedy="name the fields of text and label"
                )
        if text:
            batch.append((text, label))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _Writer:
    """Appends pieces to a pool's files."""

    def __init__(self, folder: Path, tokenizer: Any, length: int, repeats: bool) -> None:
        self._folder, self._tokenizer, self._length, self._repeats = folder, tokenizer, length, repeats
        self._text, self._ids = (folder / "text.bin").open("wb"), (folder / "ids.bin").open("wb")
        self._spans = array("q")  # four of each piece
        self._labels: list[int] = []
        self._classes: dict[str, int] = {}
        self._values: dict[str, Any] = {}  # labels as they were, by name
        self._seen: set[bytes] = set()
        self.tokens = 0

    def add(self, batch: Sequence[tuple[str, Any]]) -> None:
        """Cut texts and write their pieces."""
        encoded = self._tokenizer(
            [text for text, _ in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (text, label), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            for start, stop in cut(text, offsets, self._length)[: None if label is None else 1]:
                # The first piece has what precedes its first token too; so pieces joined are the text.
                begin = 0 if start == 0 else offsets[start][0]
                piece = text[begin : offsets[stop][0] if stop < len(offsets) else len(text)]
                self._piece(piece.encode("utf-8", errors="replace"), ids[start:stop], label)

    def _piece(self, text: bytes, ids: Sequence[int], label: Any) -> None:
        known = text if label is None else text + b"\0" + str(label).encode()
        mark = hashlib.blake2b(known, digest_size=16).digest()
        if not self._repeats and (mark in self._seen or (len(ids) < _LEAST and label is None)):
            return
        self._seen.add(mark)
        begin = self._text.tell()
        self._text.write(text)
        self._ids.write(np.asarray(ids, dtype=np.uint32).tobytes())
        span = (begin, begin + len(text), self.tokens, self.tokens + len(ids))
        self._spans.extend(span)
        self.tokens += len(ids)
        if label is not None:
            self._values.setdefault(str(label), label)
            self._labels.append(self._classes.setdefault(str(label), len(self._classes)))

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the index."""
        self._text.close()
        self._ids.close()
        if not self._spans:
            raise BadInput("the text has too few tokens", where=facts["source"])
        np.save(self._folder / "spans.npy", np.array(self._spans, dtype=np.int64).reshape(-1, 4))
        if self._labels:
            # Classes by name, whatever order they come in.
            names = sorted(self._classes)
            places = np.array([names.index(name) for name in self._classes])
            np.save(self._folder / "labels.npy", places[np.array(self._labels)])
        write_json(self._folder / "pool.json", {**facts, "classes": dict(sorted(self._values.items()))})


def cut(text: str, offsets: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Where to cut a text: (first token, end) of pieces of at most `length` tokens.

    A piece ends after a line where that leaves it at least half as long as it may be, else wherever it is full; never
    inside a character.

    Args:
        offsets: (start, end) of each token in `text`, in characters.
    """
    pieces, start = [], 0
    while len(offsets) - start > length:
        stop = start + length
        while stop > start + 1 and offsets[stop][0] < offsets[stop - 1][1]:  # two tokens of one character
            stop -= 1
        line = text.rfind("\n", offsets[start + length // 2][0], offsets[stop][0])
        if line >= 0:
            stop = next(i for i in range(start + length // 2, stop + 1) if offsets[i][0] > line or i == stop)
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(offsets))] if len(offsets) > start else pieces
