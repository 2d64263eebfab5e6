"""Held-out text as a model sees it: consecutive windows of its own tokens, and the bytes that they predict."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.runtimes.base import Runtime

LOST_CHARACTER = "\ufffd"  # a decoder's mark for bytes that are no whole character

Window = NDArray[np.int64]


def windows(text_ids: Sequence[int] | Window, length: int = 512, count: int | None = None) -> list[Window]:
    """Consecutive windows of `length` tokens of the text without overlap; a shorter rest is left out.

    Raises:
        BadInput: there are fewer than `count` windows, or than the two that an interval needs.
    """
    if length < 2:
        raise BadInput("a window of fewer than two tokens predicts nothing", remedy="ask for longer windows")
    ids = np.asarray(text_ids, dtype=np.int64)
    n_windows = len(ids) // length
    wanted = max(2, n_windows if count is None else count)
    if n_windows < wanted:
        raise BadInput(
            f"the text has {len(ids)} tokens: {n_windows} windows of {length}, where {wanted} are needed",
            remedy="give a longer text, or ask for fewer or shorter windows",
        )
    return list(ids[: wanted * length].reshape(wanted, length))


@dataclass(frozen=True)
class HeldOut:
    """The head of a text that its windows cover, cut a little behind them, and those windows."""

    text: str
    n_characters: int  # of the text that the windows cover
    windows: list[Window]
    n_bytes: list[int]  # UTF-8 length of what each window predicts


def held_out(runtime: Runtime, text: str, *, length: int = 512, count: int = 20) -> HeldOut:
    """The first `count` windows of `text` in the runtime's own tokens.

    Raises:
        BadInput: the text is too short, or the tokenizer does not give it back, so that bytes cannot be counted.
    """
    needed, n_characters = length * count, length * count * 4
    while True:  # tokenising all of a long text would take longer than the measurement
        head = text[:n_characters]
        ids = runtime.encode(head)
        # The cut can change the tokens around it, so it has to lie well behind the last window.
        if len(ids) >= needed + 16 or len(head) == len(text):
            break
        n_characters *= 2
    chunks = windows(ids, length, count)
    covered = covered_characters(runtime, ids[:needed], head)
    return HeldOut(head, covered, chunks, list(predicted_bytes(runtime.decode, chunks)))


def predicted_bytes(decode: Callable[[Sequence[int]], str], chunks: Sequence[Window]) -> Iterator[int]:
    """UTF-8 length of all but the first token of each consecutive window.

    Each is a difference of two decodings that start with the window before, so that what a decoder does at the start
    of a text (drop a space, replace half a character) cancels. Half a character at an end counts for the next token.
    """
    before: list[int] = []
    for chunk in chunks:
        ids = chunk.tolist()
        lengths = [len(decode(part).rstrip(LOST_CHARACTER).encode()) for part in (before + ids, before + ids[:1])]
        yield lengths[0] - lengths[1]
        before = ids


def covered_characters(runtime: Runtime, ids: Sequence[int], text: str) -> int:
    """How many characters of `text` the first of its tokens, `ids`, stand for.

    Raises:
        BadInput: they do not decode to the beginning of `text`.
    """
    decoded = runtime.decode(ids).rstrip(LOST_CHARACTER)
    start = len(text) - len(text.lstrip())
    if not text[start:].startswith(decoded.lstrip()):
        raise BadInput(
            f"{runtime.name}: the tokenizer does not give the held-out text back, so its bytes cannot be counted",
            remedy="use text without special tokens or unusual characters",
        )
    return start + len(decoded.lstrip())


def stretches(decode: Callable[[Sequence[int]], str], chunks: Sequence[Window], text: str) -> list[str]:
    """The parts of `text` that its first tokens, consecutive windows of them, stand for.

    Cut between whole characters: one that a window ends in the middle of belongs to the next. A model with another
    tokenizer that reads these parts reads, window by window, the same text.
    """
    start = len(text) - len(text.lstrip())
    ids: list[int] = []
    cuts = [0]
    for chunk in chunks:
        ids += chunk.tolist()
        cuts.append(start + len(decode(ids).rstrip(LOST_CHARACTER).lstrip()))
    return [text[begin:end] for begin, end in pairwise(cuts)]


def scripts(text: str) -> dict[str, float]:
    """The writing systems of a text: the share of its letters in each, largest first.

    This is what can be told without a model that identifies languages: English and Spanish are both Latin. A letter's
    script is the first word of its name in Unicode ("LATIN SMALL LETTER A"), which tells the common ones apart.
    """
    letters = Counter(character for character in text if character.isalpha())
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        found[unicodedata.name(letter, "unnamed").partition(" ")[0].capitalize()] += count
    return {script: count / letters.total() for script, count in found.most_common()}


def digest(text: str) -> str:
    """Hexadecimal SHA-256 of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()
