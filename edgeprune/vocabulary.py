"""Which tokens of a byte-pair vocabulary to keep: pure functions over tokens, merges and counts.

A token may go when no kept token is built from it. The text it stood for is then read as its pieces, so their counts
rise by its own: a token is judged by what it would be used for at the moment it is up for removal.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput

SPACE = "\u2581"  # sentencepiece's mark for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST = 1024  # characters of a token: real ones stay below 260, and deriving one takes time by the square

Ids = NDArray[np.int64]
Counts = NDArray[np.float64]
Pair = tuple[str, str]


@dataclass(frozen=True)
class BpeVocabulary:
    """A byte-pair vocabulary, and how each token comes about."""

    tokens: tuple[str | None, ...]  # by id; None where an id (a row of the embedding) has no token
    pieces: tuple[tuple[int, ...], ...]  # by id: what takes its place when it goes; () where nothing does
    order: tuple[int, ...]  # by id: place of the merge that makes it in the list of merges, -1 if none does
    fixed: frozenset[int]  # ids that never go

    @property
    def size(self) -> int:
        """Rows: tokens and ids without a token."""
        return len(self.tokens)


def merge_pairs(model: Mapping[str, Any], *, where: object = "tokenizer.json") -> list[Pair]:
    """The merges of a tokenizer.json's model, in order; they are pairs, or strings in files of older versions.

    Raises:
        BadInput: one is no pair.
    """
    pairs = []
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise BadInput(f"merge {merge!r} is not a pair", where=where)
        pairs.append((pair[0], pair[1]))
    return pairs


def read_vocabulary(
    spec: Mapping[str, Any], *, rows: int | None = None, fixed: Iterable[int] = (), where: object = "tokenizer.json"
) -> BpeVocabulary:
    """The vocabulary of a `tokenizer.json`.

    Args:
        spec: the parsed file.
        rows: rows of the embedding, where it is larger than the vocabulary.
        fixed: ids to keep beside bytes, single characters that nothing replaces, added and special tokens.
        where: its name in errors.

    Raises:
        BadInput: no byte-pair vocabulary, one with marks for parts of words, or one whose parts do not fit together.
    """
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE" if "merges" in model else None) != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise BadInput(f"a {kind or 'nameless'} tokenizer cannot be pruned", where=where, remedy="supported: BPE")
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(mark):
            raise BadInput(f"a tokenizer with a {mark} cannot be pruned", where=where, remedy="supported: BPE without")
    vocabulary, added = model["vocab"], spec.get("added_tokens") or []
    tokens = _by_id(dict(vocabulary) | {token["content"]: token["id"] for token in added}, rows, where)
    ranks: dict[Pair, int] = {}
    for place, pair in enumerate(merge_pairs(model, where=where)):
        if pair[0] not in vocabulary or pair[1] not in vocabulary or "".join(pair) not in vocabulary:
            raise BadInput(f"merge {pair!r} has a part that is no token", where=where)
        ranks.setdefault(pair, place)
    keep = {index for index in fixed if 0 <= index < len(tokens)} | {token["id"] for token in added}
    if model.get("unk_token") in vocabulary:
        keep.add(vocabulary[model["unk_token"]])
    in_bytes = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    pieces: list[tuple[int, ...]] = [()] * len(tokens)
    order = [-1] * len(tokens)
    for token, index in vocabulary.items():
        if len(token) > _LONGEST:
            raise BadInput(f"a token of {len(token)} characters", where=where, remedy=f"at most {_LONGEST}")
        if in_bytes and _BYTE.fullmatch(token):
            keep.add(index)
        elif len(token) <= 1:
            # A space that became bytes would be decoded as the mark it is written with, not as a space. A character of
            # one byte saves nothing as that byte, which no text the model learnt from was ever read as.
            if not in_bytes or token == SPACE or token.isascii():
                keep.add(index)
            else:
                pieces[index] = _as_bytes(token, vocabulary)
        elif index not in keep:
            left, last = derive(token, ranks)
            if len(left) == 1 and last is not None:
                order[index], pieces[index] = ranks[last], (vocabulary[last[0]], vocabulary[last[1]])
            elif model.get("ignore_merges") and all(part in vocabulary for part in left):
                pieces[index] = tuple(vocabulary[part] for part in left)  # taken whole, and no merge leads to it
    return BpeVocabulary(tuple(tokens), tuple(pieces), tuple(order), frozenset(keep))


def _by_id(ids: Mapping[str, int], rows: int | None, where: object) -> list[str | None]:
    count = max(ids.values(), default=-1) + 1
    if min(ids.values(), default=0) < 0 or len(set(ids.values())) != len(ids):
        raise BadInput("two tokens share an id, or one has a negative id", where=where)
    if rows is not None and count > rows:
        raise BadInput(f"the tokenizer has ids up to {count - 1}, the embedding only {rows} rows", where=where)
    tokens: list[str | None] = [None] * (count if rows is None else rows)
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def _as_bytes(text: str, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(vocabulary[f"<0x{byte:02X}>"] for byte in text.encode())


def derive(token: str, ranks: Mapping[Pair, int]) -> tuple[list[str], Pair | None]:
    """Byte-pair merging of a token's own characters: what is left, and the last merge made (None: none was)."""
    parts, last = list(token), None
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(ranks)))
        pair = (parts[best], parts[best + 1])
        if pair not in ranks:
            break
        parts[best : best + 2] = ["".join(pair)]
        last = pair
    return parts, last


def closure(vocabulary: BpeVocabulary, ids: Iterable[int]) -> Ids:
    """`ids`, the fixed ones, and every token that one of them is built from; ascending."""
    found: set[int] = set()
    pending = [*ids, *vocabulary.fixed]
    while pending:
        index = pending.pop()
        if index not in found:
            found.add(index)
            pending += vocabulary.pieces[index]
    return np.array(sorted(found), dtype=np.int64)


def smallest(vocabulary: BpeVocabulary) -> int:
    """How many ids remain when everything that may go is gone."""
    return len(closure(vocabulary, ()))


@dataclass(frozen=True)
class Choice:
    """What stays of a vocabulary."""

    kept: Ids  # ascending
    uses: Counts  # of each id once the others are read as their pieces (0 for those): (vocabulary.size,)
    removed: Ids  # the others, in the order in which they left


def keep_tokens(vocabulary: BpeVocabulary, counts: Counts, size: int) -> Choice:
    """Keep exactly `size` ids (all, if there are no more): the greedy choice by use.

    Of the tokens that nothing kept is built from, the one whose removal costs least goes, and its count passes to its
    pieces. Its cost is its count times the tokens that each use becomes longer by; where the pieces are bytes, which
    the model hardly knows, times all of them. Ids without a token go before any other; of equals the one merged last,
    since the order of merges is one of use, too.

    The counts passed on are very nearly those of the text read anew (0.02 % off where half of a vocabulary went).

    Args:
        vocabulary: what may go.
        counts: uses of each id, or expected uses: (vocabulary.size,).
        size: how many ids to keep.

    Raises:
        BadInput: `size` is below what has to stay.
    """
    if counts.shape != (vocabulary.size,):
        raise BadInput(f"counts of shape {counts.shape} for a vocabulary of {vocabulary.size}")
    builds = np.zeros(vocabulary.size, dtype=np.int64)  # how often each id is a piece of a kept one
    for parts in vocabulary.pieces:
        for piece in parts:
            builds[piece] += 1
    uses: list[float] = counts.astype(np.float64).tolist()

    def entry(index: int) -> tuple[float, int, int]:
        token, longer = vocabulary.tokens[index], len(vocabulary.pieces[index])
        if token is None:
            return -1.0, 0, -index
        if len(token) > 1:  # a single character is taken apart into bytes
            longer = max(longer - 1, 0)
        return uses[index] * longer, -vocabulary.order[index], -index

    kept = np.ones(vocabulary.size, dtype=bool)
    heap = [entry(i) for i in range(vocabulary.size) if not builds[i] and i not in vocabulary.fixed]
    heapq.heapify(heap)
    left = vocabulary.size
    removed: list[int] = []
    while left > size:
        if not heap:
            raise BadInput(f"{left} tokens have to stay, {size} were asked for", remedy=f"ask for {left} or more")
        index = -heapq.heappop(heap)[2]
        kept[index] = False
        removed.append(index)
        left -= 1
        for piece in vocabulary.pieces[index]:
            uses[piece] += uses[index]
            builds[piece] -= 1
            # Only now does it enter the heap: while a token is built from it, its count can still rise.
            if not builds[piece] and piece not in vocabulary.fixed:
                heapq.heappush(heap, entry(piece))
    gone = np.array(removed, dtype=np.int64)
    return Choice(np.flatnonzero(kept).astype(np.int64), np.where(kept, uses, 0.0), gone)


def read_without(vocabulary: BpeVocabulary, counts: Counts, removed: Ids) -> Counts:
    """Uses of each id in a text of these `counts` once the `removed` are read as their pieces, (vocabulary.size,)."""
    uses: list[float] = counts.astype(np.float64).tolist()
    for index in removed:
        for piece in vocabulary.pieces[index]:
            uses[piece] += uses[index]
        uses[index] = 0.0
    return np.array(uses)
